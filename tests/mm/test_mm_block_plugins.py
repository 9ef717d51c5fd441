"""Block plugins in MMDetection's backbones: which of them take plugins, and what is theirs alone.

What holds for every block plugin in both frameworks is tested in ``tests/registry``.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.backbones import ResNet
from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS
from plugin_backbones import (
    BACKBONES,
    VARIANTS,
    X,
    assert_equal_features,
    build,
    evaluating,
    is_plugins,
    plain,
    plugins_of,
    position,
    randomize,
    triplet,
)

import plugin_core
from mm_plugins.block_plugins import BlockPlugin

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")

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


# -------------------------------------------------------------------------------- size and dilation


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
