"""Checkpoints of any origin in Detectron2's backbones with attention."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from backbones import (
    DEPTHS,
    attention_of,
    by_state_dict,
    is_attention,
    randomize,
    set_depth,
    without_plugins,
)
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from d2_plugins.checkpointer import CheckpointError, PluginCheckpointer

# -------------------------------------------------------------------------------------- checkpoints

SECOND_SPELLING = {
    "cw.conv.": "ChannelGateH.spatial.",
    "hc.conv.": "ChannelGateW.spatial.",
    "hw.conv.": "SpatialGate.spatial.",
}


def in_second_spelling(name: str, child: str = "triplet_attention") -> str:
    for ours, published in SECOND_SPELLING.items():
        name = name.replace(f".triplet_attention.{ours}", f".{child}.{published}")
    return name


class Detector(nn.Module):
    """The keys of a detection checkpoint: ``backbone.bottom_up.res2.0.…``."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)


def fpn_detector(cfg: CfgNode) -> Detector:
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_fpn_backbone"
    model = Detector(cfg).eval()
    randomize(model)
    return model


def load_checkpoint(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Load with Detectron2's checkpointer; names that it found missing, and those unexpected."""
    found = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(path))
    (incompatible,) = found
    return incompatible.missing_keys, incompatible.unexpected_keys


@pytest.mark.parametrize("freeze_at", [0, 3])
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("child", ["triplet_attention", "triplet", "pcam"])
def test_published_detection_checkpoint_loads_whole(
    resnet_cfg, tmp_path, freeze_at, warm_start, child
):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    source = fpn_detector(resnet_cfg)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    state = {in_second_spelling(k, child): v for k, v in source.state_dict().items()}
    assert f"backbone.bottom_up.res2.0.{child}.ChannelGateH.spatial.conv.weight" in state
    torch.save({"model": state}, tmp_path / "model.pth")
    resnet_cfg.MODEL.RESNETS.PLUGINS[0]["WARM_START"] = warm_start
    target = Detector(resnet_cfg).eval()
    assert load_checkpoint(target, tmp_path / "model.pth") == ([], [])
    x = torch.randn(1, 3, 64, 64).double()
    expected = source.double().backbone(x)
    for name, feature in target.double().backbone(x).items():
        torch.testing.assert_close(feature, expected[name])


def test_unread_attention_that_looks_like_the_models_is_an_error(resnet_cfg, tmp_path):
    source = fpn_detector(resnet_cfg)
    state = {k.replace("triplet_attention", "my_gates"): v for k, v in source.state_dict().items()}
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(
        CheckpointError, match=r"MODEL.WEIGHTS: .*\.res2\.0\.triplet_attention would"
    ):
        PluginCheckpointer(Detector(resnet_cfg)).load(str(tmp_path / "model.pth"))
    few = {k: v for k, v in state.items() if ".my_gates.hw" not in k}  # another attention
    torch.save({"model": few}, tmp_path / "model.pth")
    PluginCheckpointer(Detector(resnet_cfg)).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"BLOCKS": "last"}, r'has ida in more blocks of res4 than .*0, 1, .* blocks "all"'),
        (
            {"NUM_HEADS": 2},
            r"res4\.0\.ida was trained with num_heads=4, and the model has num_heads=2",
        ),
        ({"PROJECTION": "scale"}, r"trained with projection='full', .* has projection='scale'"),
    ],
)
def test_ida_of_more_blocks_or_other_arguments_says_what_to_state(
    resnet_cfg, tmp_path, changed, said
):
    old = {"NAME": "ida", "STAGES": ["res4"], "NUM_QUERIES": 5, "WARM_START": True}
    old |= {"BLOCKS": "all", "NUM_HEADS": 4, "PROJECTION": "full"}
    resnet_cfg.MODEL.RESNETS.PLUGINS = [old]
    torch.save({"model": fpn_detector(resnet_cfg).state_dict()}, tmp_path / "model.pth")
    resnet_cfg.MODEL.RESNETS.PLUGINS = [old | changed]
    for whole in (False, True):
        checkpointer = PluginCheckpointer(Detector(resnet_cfg), whole=whole)
        with pytest.raises(CheckpointError, match=said) if said else nullcontext():
            checkpointer.load(str(tmp_path / "model.pth"))


def test_other_plugin_with_tensors_of_the_same_shapes_is_no_error(resnet_cfg, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    eca, ceca = ({"NAME": f"timm:{n}", "STAGES": ["res2"]} for n in ("eca", "ceca"))
    resnet_cfg.MODEL.RESNETS.PLUGINS = [eca]
    torch.save({"model": Detector(resnet_cfg).state_dict()}, tmp_path / "model.pth")
    resnet_cfg.MODEL.RESNETS.PLUGINS = [ceca]
    target = Detector(resnet_cfg)
    assert "backbone.res2.0.timm_ceca.conv.weight" in target.state_dict()
    PluginCheckpointer(target).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("attention", ["none", "another kernel"])
def test_attention_that_would_be_random_is_not_evaluated(resnet_cfg, tmp_path, attention):
    target = Detector(resnet_cfg)
    state = target.state_dict()
    if attention == "none":
        state = {k: v for k, v in state.items() if "triplet" not in k}
    else:
        resnet_cfg.MODEL.RESNETS.PLUGINS[0]["KERNEL_SIZE"] = 7
        target = Detector(resnet_cfg)
    torch.save({"model": state}, tmp_path / "model.pth")
    PluginCheckpointer(target).load(str(tmp_path / "model.pth"))  # a training begins
    with pytest.raises(CheckpointError, match=r"MODEL.WEIGHTS: .*triplet_attention"):
        PluginCheckpointer(target, whole=True).load(str(tmp_path / "model.pth"))


class TripletAttention(nn.Module):
    """A user's copy of the authors' class, with names that are published ones of ours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ChannelGateH = nn.Sequential()
        self.ChannelGateH.spatial = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ChannelGateH.spatial(x)


class Triplet(TripletAttention):
    """Another one, whose child is called as a published one of ours."""


@pytest.mark.parametrize("kind", [TripletAttention, Triplet])
def test_plugin_of_the_users_own_keeps_its_names(resnet_cfg, tmp_path, kind):
    name = f"{__name__}:{kind.__name__}"
    resnet_cfg.MODEL.RESNETS.PLUGINS = [{"NAME": name, "STAGES": ["res2"]}]
    source, target = Detector(resnet_cfg), Detector(resnet_cfg)
    names = [n for n in source.state_dict() if "ChannelGateH.spatial" in n]
    assert names
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    PluginCheckpointer(target, whole=True).load(str(tmp_path / "model.pth"))
    assert all(torch.equal(source.state_dict()[n], target.state_dict()[n]) for n in names)


def test_ida_of_an_earlier_version_keeps_its_alpha(resnet_cfg, tmp_path):
    resnet_cfg.MODEL.RESNETS.PLUGINS = [
        {"NAME": "ida", "STAGES": ["res5"], "NUM_QUERIES": 5, "WARM_START": True}
    ]
    source = fpn_detector(resnet_cfg)
    with torch.no_grad():
        source.backbone.bottom_up.res5[-1].ida.alpha.fill_(0.3)
    state = {n.replace(".ida.alpha", ".ida.gamma"): t for n, t in source.state_dict().items()}
    assert any(name.endswith(".ida.gamma") for name in state)
    torch.save({"model": state}, tmp_path / "model.pth")
    target = Detector(resnet_cfg)
    assert load_checkpoint(target, tmp_path / "model.pth") == ([], [])
    alpha = target.backbone.bottom_up.res5[-1].ida.alpha
    assert alpha == alpha.new_tensor(0.3)


@DEPTHS
@pytest.mark.parametrize("file", ["model.pth", "R.pkl"])
def test_plain_checkpoint_lacks_the_attention_only(resnet_cfg, tmp_path, file, depth):
    set_depth(resnet_cfg, depth)
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    randomize(plain)
    state = plain.state_dict()
    path = tmp_path / file
    if path.suffix == ".pkl":  # as Detectron2's model zoo has ResNets of ImageNet
        model = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
        zoo = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(zoo))
    else:
        torch.save({"model": state}, path)
    resnet_cfg.MODEL.RESNETS.PLUGINS[0]["WARM_START"] = True
    warm = build_backbone(resnet_cfg).eval()
    missing, unexpected = load_checkpoint(warm, path)
    assert by_state_dict(missing) == attention_of(warm)
    assert not unexpected
    x = torch.randn(1, 3, 32, 32)
    for name, feature in warm(x).items():
        assert torch.equal(feature, plain(x)[name]), name


def in_caffe2_spelling(name: str) -> str:
    if name.startswith("stem."):
        name = name.removeprefix("stem.").replace("conv1.norm", "res_conv1.norm")
    else:
        for ours, theirs in (("shortcut", "1"), ("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c")):
            name = name.replace(ours, f"branch{theirs}")
    name = name.replace("norm.weight", "bn_s").replace("norm.bias", "bn_b")
    return name.replace("weight", "w").replace(".", "_")


@DEPTHS
def test_warm_start_keeps_the_features_of_a_caffe2_checkpoint(resnet_cfg, tmp_path, depth):
    # What Detectron2's own configs start from, MSRA/R-50.pkl: scales and shifts, no statistics.
    set_depth(resnet_cfg, depth)
    resnet_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    resnet_cfg.MODEL.RESNETS.PLUGINS[0]["WARM_START"] = True
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    for name, tensor in plain.state_dict().items():
        if name.endswith(("norm.weight", "norm.bias")):
            tensor.uniform_(0.5, 1.5)
    state = plain.state_dict().items()
    content = {in_caffe2_spelling(k): v.numpy() for k, v in state if ".running_" not in k}
    assert {"conv1_w", "res_conv1_bn_s", "res5_1_branch2b_bn_b"} < content.keys()
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(content))
    assert load_checkpoint(plain, tmp_path / "R.pkl") == ([], [])
    warm = build_backbone(resnet_cfg).eval()
    missing, unexpected = load_checkpoint(warm, tmp_path / "R.pkl")
    assert by_state_dict(missing) == attention_of(warm)
    assert not unexpected
    x = torch.randn(1, 3, 32, 32)
    for name, feature in warm(x).items():
        assert torch.equal(feature, plain(x)[name]), name


def test_converted_imagenet_checkpoint_brings_its_attention(resnet_cfg, tmp_path):
    # Detectron2's convert-torchvision-to-d2.py: names without the detector's prefix, to be matched.
    source = build_backbone(resnet_cfg).eval()
    randomize(source)
    model = {k: v.numpy() for k, v in source.state_dict().items()}
    zoo = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(zoo))
    target = fpn_detector(resnet_cfg)
    missing, unexpected = load_checkpoint(target, tmp_path / "R-50.pkl")
    assert not [n for n in missing if is_attention(n)] and not unexpected
    bottom_up = target.backbone.bottom_up.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(bottom_up[name], value), name
