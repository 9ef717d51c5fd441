"""Checkpoints of any spelling in MMDetection's backbones with block plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict
from plugin_backbones import NARROW, X, build, evaluating, randomize, triplet

from mm_plugins.weights import check_weights, fit_names

ROOT = Path(__file__).resolve().parents[2]

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
    """The keys of a detection checkpoint: ``backbone.layer1.0.…``."""

    def __init__(self, variant: str, **arguments: Any) -> None:
        super().__init__()
        self.backbone = evaluating(build(variant, triplet(**arguments)))


@pytest.mark.parametrize(
    ("variant", "child"),
    [
        ("ResNet-50", "triplet_attention"),  # of MMDetection itself, which reads no other name
        *(("PluginResNet-18", child) for child in ("triplet_attention", "triplet", "pcam")),
    ],
)
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_published_detection_checkpoint_loads_whole(variant, warm_start, child, tmp_path):
    source = evaluating(Detector(variant).double())
    randomize(source)
    state = {in_second_spelling(k, child): v for k, v in source.state_dict().items()}
    assert f"backbone.layer1.0.{child}.ChannelGateH.spatial.conv.weight" in state
    path = str(tmp_path / "model.pth")
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, path)
    expected = source.backbone(X.double())

    from_file, from_state = (Detector(variant, warm_start=warm_start).double() for _ in range(2))
    load_checkpoint(from_file, path, map_location="cpu", strict=True)
    load_state_dict(from_state, state, strict=True)
    for target in (from_file, from_state):
        target.eval()
        for feature, other in zip(target.backbone(X.double()), expected, strict=True):
            torch.testing.assert_close(feature, other)


@pytest.mark.parametrize("child", ["triplet", "pcam"])
def test_whole_detectors_files_are_read_under_all_names(child, tmp_path):
    source = Detector("ResNet-50")
    state = {in_second_spelling(k, child): v for k, v in source.state_dict().items()}
    content = {"state_dict": dict(state)}
    fit_names(content, source)  # as the launcher's runner does for any backbone
    assert content["state_dict"].keys() == source.state_dict().keys()


def test_unread_attention_that_looks_like_the_models_is_an_error(tmp_path):
    source, path = Detector("PluginResNet-18"), str(tmp_path / "model.pth")
    names = {k: k.replace("triplet_attention", "my_gates") for k in source.state_dict()}
    torch.save({"state_dict": {names[k]: v for k, v in source.state_dict().items()}}, path)
    for whole in (False, True):
        with pytest.raises(
            ValueError, match=r"layer1\.0\.triplet_attention would stay at its start"
        ):
            check_weights(Detector("PluginResNet-18"), path, "load_from", whole=whole)


def test_ida_of_more_blocks_or_other_arguments_says_what_to_state(tmp_path):
    path, place = str(tmp_path / "model.pth"), {"position": "after_conv2"}
    layer = {"type": "IDABlock", "num_queries": 5, "warm_start": True, "num_heads": 4}
    old = {"cfg": {**layer, "projection": "full"}, **place, "blocks": "all"}
    torch.save({"state_dict": build("PluginResNet-18", old).state_dict()}, path)
    check_weights(build("PluginResNet-18", old), path, "load_from", whole=True)
    for changed, said in (
        ({"blocks": "last"}, r'has ida in more blocks of layer1 than the model, .* blocks "all"'),
        ({"cfg": layer}, r"trained with projection='full', and the model has projection='scale'"),
    ):
        with pytest.raises(ValueError, match=said):
            check_weights(build("PluginResNet-18", old | changed), path, "load_from", whole=False)


class Triplet(nn.Module):
    """A user's own, whose child and parameters are called as published ones of ours."""

    _abbr_ = "triplet"

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.cw = nn.Sequential()
        self.cw.conv = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cw.conv(x)


def test_plugin_of_the_users_own_keeps_its_names():
    types = (Triplet, "TripletAttention")  # in one block
    plugins = [{"cfg": {"type": kind}, "position": "after_conv2"} for kind in types]
    source, target = (
        MODELS.build({"type": "PluginResNet", "depth": 18, "plugins": plugins}) for _ in range(2)
    )
    assert "layer1.0.triplet.cw.conv.weight" in source.state_dict()
    content = {"state_dict": source.state_dict()}
    fit_names(content, target)
    target.load_state_dict(content["state_dict"], strict=True)
    load_state_dict(target, source.state_dict(), strict=True)


def test_attention_that_would_be_random_is_not_evaluated(tmp_path):
    state = Detector("PluginResNet-18").state_dict()
    plain = {k: v for k, v in state.items() if "triplet" not in k}
    path = str(tmp_path / "plain.pth")
    torch.save({"state_dict": plain}, path)
    with pytest.raises(ValueError, match="would be evaluated with random ones"):
        check_weights(Detector("PluginResNet-18"), path, "CHECKPOINT", whole=True)
    warm = Detector("PluginResNet-18", warm_start=True)
    assert check_weights(warm, path, "CHECKPOINT", whole=True) == []  # the identity
    assert check_weights(Detector("PluginResNet-18"), path, "load_from", whole=False) == []


@pytest.mark.parametrize("detector", ["faster-rcnn", "retinanet"])
def test_checkpoint_that_mmdetection_2_saved_loads_whole(detector, tmp_path):
    name = f"{detector}_r50-triplet_fpn_1x_coco.py"
    cfg = Config.fromfile(ROOT / "configs" / "mm" / "triplet_attention" / name)
    cfg.merge_from_dict({"model.backbone": NARROW | {"init_cfg": None}})
    cfg.merge_from_dict({"model.neck": {"in_channels": [32, 64, 128, 256], "out_channels": 32}})
    if detector == "faster-rcnn":
        cfg.merge_from_dict(
            {
                "model.rpn_head": {"in_channels": 32, "feat_channels": 32},
                "model.roi_head.bbox_head": {"in_channels": 32, "fc_out_channels": 32},
            }
        )
    else:
        cfg.merge_from_dict({"model.bbox_head": {"in_channels": 32, "feat_channels": 32}})
    saved = {
        in_second_spelling(name): torch.rand(tensor.shape).to(tensor.dtype)
        for name, tensor in MODELS.build(cfg.model).state_dict().items()
        if not name.endswith("alpha")
    }
    assert "backbone.layer1.0.triplet_attention.ChannelGateH.spatial.conv.weight" in saved
    meta = {"mmdet_version": "2.10.0", "epoch": 12, "CLASSES": ("person", "bicycle"), "config": ""}
    path = str(tmp_path / "model.pth")
    torch.save({"meta": meta, "state_dict": saved, "optimizer": {"param_groups": []}}, path)

    model = MODELS.build(cfg.model)
    load_checkpoint(model, path, map_location="cpu", strict=True)
    for name, tensor in model.state_dict().items():
        expected = torch.ones(()) if name.endswith("alpha") else saved[in_second_spelling(name)]
        assert torch.equal(tensor, expected), name


def test_missing_attention_is_reported_by_its_name():
    state = Detector("PluginResNet-18").state_dict()
    del state["backbone.layer1.0.triplet_attention.cw.conv.conv.weight"]
    with pytest.raises(
        RuntimeError, match=r"layer1\.0\.triplet_attention\.\S*cw\.conv\.conv\.weight"
    ):
        load_state_dict(Detector("PluginResNet-18"), state, strict=True)
