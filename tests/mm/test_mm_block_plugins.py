"""Block plugins in MMDetection's backbones: which of them take plugins, and what is theirs alone.

What holds for every block plugin in both frameworks is tested in ``tests/registry``.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.backbones import ResNet
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict

import plugin_core
from mm_plugins.block_plugins import BlockPlugin
from mm_plugins.weights import check_weights, fit_names
from plugin_core.block_plugins import make_module

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
NARROW = {"stem_channels": 8, "base_channels": 8}
WIDE_REGNET = {"w0": 16, "wa": 16.0, "wm": 2.0, "group_w": 8, "depth": 8, "bot_mul": 1.0}
SWITCHABLE = {
    "sac": {"type": "SAC", "use_deform": False},
    "stage_with_sac": (False, True, False, False),
}
TRIDENT = {"num_branch": 3, "test_branch_idx": 1, "trident_dilations": (1, 2, 3), "num_stages": 3}
# The arguments of each row of the table in configs/README.md
BACKBONES: dict[str, list[dict[str, Any]]] = {
    "ResNet": [{"depth": depth, **NARROW} for depth in (50, 101, 152)],
    "PluginResNet": [{"depth": depth, **NARROW} for depth in (18, 34, 50)],
    "ResNetV1d": [{"depth": 50, **NARROW}],
    "ResNeXt": [{"depth": 50, "groups": 2, "base_width": 4, **NARROW}],
    "Res2Net": [{"depth": 50, "scales": 2, "base_width": 8, **NARROW}],
    "ResNeSt": [{"depth": 50, "radix": 2, "reduction_factor": 4, "base_channels": 8}],
    "RegNet": [{"arch": WIDE_REGNET}],
    "DetectoRS_ResNet": [{"depth": 50, **NARROW, **SWITCHABLE}],
    "DetectoRS_ResNeXt": [{"depth": 50, "groups": 2, "base_width": 4, **NARROW, **SWITCHABLE}],
    "TridentResNet": [
        {"depth": 50, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (2,)}
        | {**NARROW, **TRIDENT}
    ],
    "PluginMobileNetV2": [{"widen_factor": 0.25, "out_indices": (1, 2, 4, 7)}],
}
VARIANTS = {
    f"{kind}-{arguments['depth']}" if len(rows) > 1 else kind: {"type": kind, **arguments}
    for kind, rows in BACKBONES.items()
    for arguments in rows
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def position(backbone: dict[str, Any]) -> str:
    if backbone["type"] == "PluginMobileNetV2":
        return "after_linear_conv"
    return "after_conv2" if backbone.get("depth") in (18, 34) else "after_conv3"


def build(variant: str, *layers: dict[str, Any], stages: Any = None, **changed: Any) -> nn.Module:
    """A backbone of the table, with plugin layers where some are given."""
    backbone = copy.deepcopy(VARIANTS[variant] | changed)
    place = {"position": position(backbone)} | ({"stages": stages} if stages else {})
    plugins = [layer if "cfg" in layer else {"cfg": layer, **place} for layer in layers]
    return MODELS.build(backbone | ({"plugins": plugins} if plugins else {}))


def plain(variant: str, **changed: Any) -> nn.Module:
    """MMDetection's own of the same weights."""
    return build(variant, type=VARIANTS[variant]["type"].removeprefix("Plugin"), **changed)


def triplet(**arguments: Any) -> dict[str, Any]:
    return {"type": "TripletAttention", "kernel_size": 3, **arguments}


def evaluating(module: nn.Module) -> nn.Module:
    """``module.eval()``, which returns nothing for MMDetection's backbones."""
    module.eval()
    return module


def is_plugins(name: str) -> bool:
    return any(f".{child}." in name for child in ("triplet_attention", "ida", "block_plugin"))


def plugins_of(module: nn.Module) -> list[BlockPlugin]:
    return [m for m in module.modules() if isinstance(m, BlockPlugin)]


def randomize(module: nn.Module) -> None:
    """Give norms values that differ from their initial ones, as training does."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, TridentConv):
                m.weight.normal_(std=0.05)  # it holds anything before init_weights
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)


def assert_equal_features(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for feature, expected in zip(model(X), other(X), strict=True):
            assert torch.isfinite(expected).all()
            assert torch.equal(feature, expected)


# ------------------------------------------------------------------------ which backbone takes them


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbone_starts_as_it_was_and_trains_with_plugins(variant):
    layers = [triplet(), {"type": "IDABlock", "num_queries": 3, "num_heads": 4}]
    expected = plain(variant, norm_eval=False)
    randomize(expected)
    # In the many blocks of a deep one's other stages it is no different.
    stages = (False, False, False, True) if VARIANTS[variant].get("depth", 0) > 50 else None
    warm = [{**layer, "warm_start": True} for layer in layers]
    model = build(variant, *warm, stages=stages, norm_eval=False)
    missing, unexpected = model.load_state_dict(expected.state_dict(), strict=False)
    assert not unexpected and missing and all(map(is_plugins, missing))
    for mode in (False, True):
        model.train(mode), expected.train(mode)
        assert_equal_features(model, expected)
    with torch.no_grad():
        for plugin in plugins_of(model):
            plugin.alpha.fill_(0.1)
    sum(feature.square().mean() for feature in model(X)).backward()
    for name, parameter in model.named_parameters():
        if is_plugins(name):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_table_of_the_docs_names_these_backbones():
    (section,) = TABLE.split("## Which backbone takes block plugins")[1:]
    section = section.partition("\n## ")[0]
    for kind, rows in BACKBONES.items():
        (row,) = (line for line in section.splitlines() if line.startswith(f"| `{kind}` |"))
        assert {f"`{position({'type': kind, **arguments})}`" for arguments in rows} <= set(
            re.findall(r"`\w+`", row)
        )


@pytest.mark.parametrize("variant", ["PluginResNet-18", "PluginResNet-50", "PluginMobileNetV2"])
@pytest.mark.parametrize("blocks", ["all", "last", None])
def test_plugin_is_in_all_blocks_of_a_stage_or_in_the_last(variant, blocks):
    place = {"position": position(VARIANTS[variant])} | ({"blocks": blocks} if blocks else {})
    ida = {"cfg": {"type": "IDABlock", "num_heads": 4, "num_queries": 3}, **place}
    model = build(variant, triplet(), ida)
    assert len(plugins_of(model)) > 4
    for name, layer in model.named_children():
        for i, block in enumerate(layer.children() if name.startswith("layer") else ()):
            children = [child for child, m in block.named_children() if isinstance(m, BlockPlugin)]
            has_ida = blocks == "all" or i == len(layer) - 1
            assert children == ["triplet_attention", "ida"][: 1 + has_ida]
    assert len(model(X)) == 4 or "Mobile" in variant


@pytest.mark.parametrize("variant", ["ResNet-50", "PluginResNet-18", "PluginMobileNetV2"])
def test_blocks_of_the_chosen_stages_have_them_under_their_published_names(variant):
    count = 7 if "Mobile" in variant else 4
    stages = tuple(stage in (2, 4) for stage in range(1, count + 1))
    model = build(variant, triplet(), stages=stages)
    assert {name for name in model.state_dict() if is_plugins(name)} == {
        f"layer{stage}.{block}.triplet_attention.{name}"
        for stage in (2, 4)
        for block in range(len(getattr(model, f"layer{stage}")))
        for name in plugin_core.TripletAttention().state_dict()
    }
    assert "layer2.0.triplet_attention.cw.conv.conv.weight" in model.state_dict()


@pytest.mark.parametrize("variant", ["PluginResNet-18", "PluginResNet-50", "PluginMobileNetV2"])
def test_without_plugins_it_is_mmdetections_backbone(variant):
    expected, model = plain(variant), build(variant)
    model.load_state_dict(expected.state_dict(), strict=True)
    assert_equal_features(evaluating(model), evaluating(expected))


@pytest.mark.parametrize(
    ("variant", "wrong", "message"),
    [
        (
            "PluginResNet-18",
            {"position": "after_conv3"},
            "position 'after_conv2' in .*'after_conv3'",
        ),
        (
            "PluginMobileNetV2",
            {"position": "after_conv3"},
            "'after_linear_conv' in .*'after_conv3'",
        ),
        ("PluginMobileNetV2", {"stages": (True,) * 4}, r"7 times True or False .*got \(True, True"),
        ("PluginMobileNetV2", {"stages": ()}, r"7 times True or False .*got \(\)"),
    ],
)
def test_wrong_place_is_named_with_the_right_one(variant, wrong, message):
    entry = {"cfg": triplet(), "position": position(VARIANTS[variant]), **wrong}
    with pytest.raises(ValueError, match=f"^plugins must have .*{message}"):
        MODELS.build(copy.deepcopy(VARIANTS[variant]) | {"plugins": [entry]})


@pytest.mark.parametrize("depth", [18, 34])
def test_mmdetections_own_small_resnets_still_refuse_plugins(depth):
    with pytest.raises(AssertionError, match="Not implemented yet"):
        ResNet(depth=depth, plugins=[{"cfg": triplet(), "position": "after_conv2"}])


# -------------------------------------------------------------------------------- the layers' types


def test_registered_plugin_has_a_type_of_its_own_and_any_has_its_name():
    own = MODELS.build({"type": "mmdet.TripletAttention", "in_channels": 8, "no_spatial": True})
    named = MODELS.build(
        {"type": "BlockPlugin", "in_channels": 8, "name": "triplet_attention", "no_spatial": True}
    )
    for layer in (own, named):
        assert isinstance(layer, plugin_core.BlockPlugin)
        assert isinstance(layer.module, plugin_core.TripletAttention) and layer.module.hw is None
        assert layer.alpha is None and layer.plugin_name == "triplet_attention"
    named.load_state_dict(own.state_dict(), strict=True)


@pytest.mark.parametrize("norm", ["SyncBN", "FrozenBN"])
def test_norm_of_the_gates_is_the_core_modules_and_changes_no_name(norm):
    layer = MODELS.build({"type": "TripletAttention", "in_channels": 8, "norm": norm})
    assert layer.module.norm == plugin_core.TripletAttention(norm=norm).norm
    assert layer.state_dict().keys() == plugin_core.TripletAttention().state_dict().keys()


def test_ida_gets_the_channels_of_its_stage_and_its_old_scale_is_alpha():
    model = build("ResNet-50", {"type": "IDABlock", "num_queries": 5, "warm_start": True})
    assert [model.layer1[0].ida.module.in_channels, model.layer4[0].ida.module.in_channels] == [
        32,
        256,
    ]
    old = {
        name.replace("ida.alpha", "ida.gamma"): torch.full_like(tensor, 0.25)
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(old, strict=True)
    assert {plugin.alpha.item() for plugin in plugins_of(model)} == {0.25}


# --------------------------------------------------------------------------------- norms of plugins


def batches_seen(backbone: nn.Module) -> dict[str, int]:
    return {
        name: int(buffer)
        for name, buffer in backbone.named_buffers()
        if name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("variant", ["ResNet-50", "PluginResNet-18", "PluginMobileNetV2"])
def test_gates_of_training_stages_gather_statistics_where_the_backbones_norms_do_not(variant):
    backbone = build(variant, triplet(), norm_eval=True, frozen_stages=2)
    backbone.train()
    backbone(X)
    for name, count in batches_seen(backbone).items():
        frozen = name.startswith(("layer1.", "layer2."))
        assert count == int(is_plugins(name) and not frozen), name
    for name, parameter in backbone.named_parameters():
        if is_plugins(name):
            assert parameter.requires_grad == (not name.startswith(("layer1.", "layer2.")))
    backbone.eval()
    before = batches_seen(backbone)
    backbone(X)
    assert batches_seen(backbone) == before


def test_frozen_norm_of_the_gates_stays_frozen():
    backbone = build("PluginResNet-18", triplet(norm="FrozenBN"), norm_eval=True)
    backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(X)
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


# --------------------------------------------------------------------------------- initial weights


@pytest.mark.parametrize("variant", ["PluginResNet-18", "PluginResNet-50"])
@pytest.mark.parametrize("zero_init_residual", [True, False])
def test_weights_are_initialized_as_in_mmdetections_resnet(variant, zero_init_residual):
    last_norm = "bn2" if variant.endswith("18") else "bn3"
    for model in (
        build(variant, triplet(), zero_init_residual=zero_init_residual),
        plain(variant, zero_init_residual=zero_init_residual),
    ):
        randomize(model)
        model.init_weights()
        for stage in (1, 2, 3, 4):
            for block in getattr(model, f"layer{stage}"):
                assert (getattr(block, last_norm).weight == 1 - zero_init_residual).all()
                assert (block.bn1.weight == 1).all() and (block.bn1.bias == 0).all()


def weights_of_gates(model: nn.Module) -> Tensor:
    weights = [p for plugin in plugins_of(model) for p in plugin.module.parameters() if p.dim() > 1]
    return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.mark.parametrize(
    "init_cfg", [None, {"type": "TruncNormal", "layer": "Conv2d", "std": 0.03}]
)
def test_gates_of_a_mobilenet_start_as_their_setting_says_whatever_the_other_weights(init_cfg):
    for init, std in (("kaiming", 2**0.5 / 7), ("pytorch", 1 / 7 / 6**0.5)):
        layer = {"type": "TripletAttention", "init": init}
        model = build("PluginMobileNetV2", layer, init_cfg=copy.deepcopy(init_cfg))
        model.init_weights()
        weights = weights_of_gates(model)
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        model.init_weights()  # which mmengine does only once
        assert torch.equal(weights_of_gates(model), weights)


def test_gates_of_a_mobilenet_with_weights_of_a_file_are_the_files_or_the_constructors(tmp_path):
    torch.save(build("PluginMobileNetV2", triplet()).state_dict(), tmp_path / "whole.pth")
    torch.save(plain("PluginMobileNetV2").state_dict(), tmp_path / "plain.pth")
    for name in ("whole.pth", "plain.pth"):
        init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / name)}
        model = build("PluginMobileNetV2", triplet(warm_start=True), init_cfg=init_cfg)
        constructed = weights_of_gates(model)
        model.init_weights()
        file = torch.load(tmp_path / name)
        expected = [t.flatten() for n, t in file.items() if is_plugins(n) and t.dim() > 1]
        assert torch.equal(weights_of_gates(model), torch.cat(expected or [constructed]))


@pytest.mark.parametrize("variant", ["ResNet-50", "PluginResNet-18", "PluginMobileNetV2"])
def test_warm_start_is_the_identity_after_the_weights_are_initialized(variant):
    layers = [triplet(warm_start=True), {"type": "IDABlock", "num_heads": 4, "warm_start": True}]
    model = build(variant, *layers)
    model.init_weights()
    plugins = plugins_of(model)
    assert plugins and all(plugin.alpha == 0 for plugin in plugins)
    for plugin in plugins:
        if plugin.plugin_name == "triplet_attention":  # whose gate is one, and not 0
            assert (plugin.module.cw.conv.bn.weight == 1).all()
            assert plugin.module.cw.conv.conv.weight.any()


def test_plain_weights_of_a_file_give_the_plain_backbones_features(tmp_path):
    expected = plain("PluginResNet-18")
    path = str(tmp_path / "plain.pth")
    torch.save({"state_dict": expected.state_dict()}, path)
    pretrained = {"type": "Pretrained", "checkpoint": path}
    model = build("PluginResNet-18", triplet(warm_start=True), init_cfg=pretrained)
    model.init_weights()
    assert_equal_features(evaluating(model), evaluating(expected))


# ------------------------------------------------------------------------------ size, checkpoints

BIG = triplet(kernel_size=7)


@pytest.mark.parametrize(
    ("variant", "layers", "parameters"),
    [
        ("ResNet-50", [], 25_557_032),
        ("ResNet-50", [BIG], 25_561_832),
        ("PluginResNet-18", [BIG], 11_691_912),
        ("PluginMobileNetV2", [], 3_504_872),
        ("PluginMobileNetV2", [triplet()], 3_505_892),
        ("PluginMobileNetV2", [BIG], 3_509_972),
    ],
)
def test_classifier_has_the_published_size(variant, layers, parameters):
    mobile = "Mobile" in variant
    wide = {"widen_factor": 1.0} if mobile else {"base_channels": 64, "stem_channels": 64}
    with torch.device("meta"):
        model = build(variant, *layers, **wide)
        classifier = nn.Linear(model.out_channel if mobile else model.feat_dim, 1000)
    assert sum(p.numel() for m in (model, classifier) for p in m.parameters()) == parameters


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


def test_dilation_is_contracted_in_the_dilated_stage_alone():
    plugins = [{"cfg": {"type": "BlockPlugin", "name": f"{__name__}:Dilated"}}]
    plugins[0]["position"] = "after_conv3"
    settings = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2), "plugins": plugins}
    net = MODELS.build({"type": "PluginResNet", "depth": 50, **settings, "contract_dilation": True})
    for stage in (net.layer1, net.layer4):
        for i, block in enumerate(stage):
            dilation = 2 if stage is net.layer4 and i > 0 else 1
            assert block.conv2.dilation == block.conv2.padding == (dilation, dilation)
            assert block.block_plugin.module.conv.dilation == (4, 4)


class Dilated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=4, dilation=4, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


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


# -------------------------------------------------------------------------------------- MobileNetV2


def mobile_blocks(model: nn.Module) -> list[InvertedResidual]:
    return [m for m in model.modules() if isinstance(m, InvertedResidual)]


def by_formula(block: InvertedResidual, x: Tensor) -> Tensor:
    out = block.expand_conv(x) if block.with_expand_conv else x
    out = block.depthwise_conv(out)
    out = block.linear_conv.bn(block.linear_conv.conv(out))
    out = block.ida(block.triplet_attention(out))
    return x + out if block.with_res_shortcut else out


def test_mobilenets_plugins_come_in_their_order_after_the_last_norm_and_before_the_sum():
    ida = {"cfg": {"type": "IDABlock", "num_heads": 4}, "position": "after_linear_conv"}
    model = evaluating(build("PluginMobileNetV2", triplet(), {**ida, "blocks": "all"}))
    randomize(model)
    assert {block.with_res_shortcut for block in mobile_blocks(model)} == {True, False}
    for block in mobile_blocks(model):
        first = block.expand_conv if block.with_expand_conv else block.depthwise_conv
        x = torch.randn(2, first.in_channels, 6, 6)
        torch.testing.assert_close(block(x), by_formula(block, x))


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # of MMDetection's block
def test_mobilenets_recomputed_activations_give_equal_gradients():
    gradients = []
    model = build("PluginMobileNetV2", triplet()).double()
    for with_cp in (False, True):
        for block in mobile_blocks(model):
            block.with_cp = with_cp
        model.zero_grad()
        model.train()
        sum(feature.square().mean() for feature in model(X.double())).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copy_of_a_mobilenet_is_independent(duplicate):
    model = evaluating(build("PluginMobileNetV2", triplet(init="kaiming")))
    before = [feature.clone() for feature in model(X)]
    twin = duplicate(model)
    assert_equal_features(twin, model)
    for plugin in plugins_of(twin):
        nn.init.constant_(plugin.module.cw.conv.bn.bias, 9.0)
    for feature, same, changed in zip(model(X), before, twin(X), strict=True):
        assert torch.equal(feature, same) and not torch.allclose(feature, changed, atol=0)


def test_block_of_a_mobilenet_compiles_without_a_graph_break():
    block = mobile_blocks(build("PluginMobileNetV2", {"type": "SimAM"}))[2]
    twin = copy.deepcopy(block)
    x = torch.randn(2, block.linear_conv.out_channels, 6, 6)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("timm:gc", {"init_last_zero": True}),
        ("timm:se", {}),
        ("triplet_attention", {}),
        ("ida", {"num_queries": 4}),
    ],
)
def test_mmengine_leaves_the_weights_that_a_modules_constructor_draws(name, arguments, monkeypatch):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    made: list[nn.Module] = []

    def make(*given: Any) -> nn.Module:
        made.append(make_module(*given))
        return made[-1]

    monkeypatch.setattr("mm_plugins.block_plugins.make_module", make)
    layer = {"type": "BlockPlugin", "name": name, "warm_start": True, **arguments}
    backbone = ResNet(
        50, base_channels=16, plugins=[{"cfg": layer, "position": "after_conv3"}]
    )  # without pretrained weights, mmengine draws those of all convolutions
    backbone.init_weights()
    plugins = [m for m in backbone.modules() if isinstance(m, BlockPlugin)]
    assert len(made) == 2 * len(plugins) == 32
    for plugin, fresh in zip(plugins, made[16:], strict=True):
        expected = fresh.state_dict()
        assert plugin.module is not fresh and not plugin.alpha.any()
        for key, value in plugin.module.state_dict().items():
            assert torch.equal(value, expected[key]), key
