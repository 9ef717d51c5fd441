"""MobileNetV2 with plugins: where they sit, and that nothing else has changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS

import plugin_core

BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of layer1 to layer7
NARROW = {"widen_factor": 0.25}
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def plugin(*, stages: tuple[bool, ...] | None = None, **layer: Any) -> dict:
    entry = {
        "cfg": {"type": "TripletAttention", "kernel_size": 3, **layer},
        "position": "after_linear_conv",
    }
    return entry if stages is None else entry | {"stages": stages}


def build(*plugins: dict, **changed: Any) -> nn.Module:
    cfg = {"type": "PluginMobileNetV2", "plugins": list(plugins), **NARROW, **changed}
    return MODELS.build(copy.deepcopy(cfg))


def build_plain(**changed: Any) -> nn.Module:
    return MODELS.build({"type": "MobileNetV2", **NARROW, **changed})


def randomize(module: nn.Module) -> None:
    """Give norms and gates values that differ from their initial ones, as training does."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)


def evaluating(model: nn.Module) -> nn.Module:
    """``model.eval()``, which returns nothing for MMDetection's backbones."""
    model.eval()
    return model


def blocks(model: nn.Module) -> list[InvertedResidual]:
    return [m for m in model.modules() if isinstance(m, InvertedResidual)]


def is_attention(name: str) -> bool:
    return ".triplet_attention." in name


def assert_equal_features(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for feature, expected in zip(model(X), other(X), strict=True):
            assert torch.isfinite(expected).all()
            assert torch.equal(feature, expected)


def test_every_block_has_attention_under_its_published_name():
    expected = {
        f"layer{stage}.{block}.triplet_attention.{name}"
        for stage, count in enumerate(BLOCKS, start=1)
        for block in range(count)
        for name in plugin_core.TripletAttention().state_dict()
    }
    names = set(build(plugin()).state_dict())
    assert {name for name in names if is_attention(name)} == expected
    assert "layer2.0.triplet_attention.cw.conv.conv.weight" in names


def test_other_names_are_the_plain_backbones():
    names = [name for name in build(plugin()).state_dict() if not is_attention(name)]
    assert names == list(build_plain().state_dict())


@pytest.mark.parametrize(
    ("plugins", "parameters"),
    [([], 3_504_872), ([plugin()], 3_505_892), ([plugin(kernel_size=7)], 3_509_972)],
    ids=["plain", "k=3", "k=7"],
)
def test_classifier_has_the_published_size(plugins, parameters):
    model = build(*plugins, widen_factor=1.0)
    classifier = nn.Linear(model.out_channel, 1000)
    assert sum(p.numel() for m in (model, classifier) for p in m.parameters()) == parameters


def test_no_plugins_is_mmdetections_mobilenet():
    plain = evaluating(build_plain())
    for model in (build(), MODELS.build({"type": "PluginMobileNetV2", **NARROW})):
        model.load_state_dict(plain.state_dict(), strict=True)
        assert_equal_features(evaluating(model), plain)


def by_formula(block: InvertedResidual, x: Tensor, *names: str) -> Tensor:
    out = block.expand_conv(x) if block.with_expand_conv else x
    out = block.depthwise_conv(out)
    out = block.linear_conv.bn(block.linear_conv.conv(out))
    for name in names:
        out = getattr(block, name)(out)
    return x + out if block.with_res_shortcut else out


def test_attention_comes_after_the_last_norm_and_before_the_sum():
    model = evaluating(build(plugin()))
    randomize(model)
    assert {block.with_res_shortcut for block in blocks(model)} == {True, False}
    for block in blocks(model):
        first = block.expand_conv if block.with_expand_conv else block.depthwise_conv
        x = torch.randn(2, first.in_channels, 6, 6)
        torch.testing.assert_close(block(x), by_formula(block, x, "triplet_attention"))


def test_several_plugins_are_applied_in_their_order():
    model = evaluating(build(plugin(), plugin(postfix="_2", no_spatial=True)))
    randomize(model)
    block = blocks(model)[2]
    x = torch.randn(2, block.linear_conv.out_channels, 6, 6)
    expected = by_formula(block, x, "triplet_attention", "triplet_attention_2")
    torch.testing.assert_close(block(x), expected)


def test_stages_are_respected():
    stages = (False, True, False, False, True, False, True)
    model = build(plugin(stages=stages))
    for index, wanted in enumerate(stages, start=1):
        for block in getattr(model, f"layer{index}"):
            assert hasattr(block, "triplet_attention") == wanted


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_warm_start_gives_exactly_the_plain_backbones_features(mode):
    plain, warm = build_plain(), build(plugin(warm_start=True))
    randomize(plain)
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(map(is_attention, missing)) and not unexpected
    for model in (plain, warm):
        model.train(mode)
    assert_equal_features(warm, plain)


def test_every_gate_learns():
    model = build(plugin())
    model.init_weights()
    model.train()
    sum(feature.square().mean() for feature in model(X)).backward()
    for name, parameter in model.named_parameters():
        if is_attention(name):
            assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # of MMDetection's block
def test_recomputed_activations_give_equal_gradients():
    model, recomputing = build(plugin()).double(), build(plugin(), with_cp=True).double()
    recomputing.load_state_dict(model.state_dict())
    for m in (model, recomputing):
        m.train()
        sum(f.square().mean() for f in m(X.double())).backward()
    expected = dict(model.named_parameters())
    for name, parameter in recomputing.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copy_is_independent(duplicate):
    model = evaluating(build(plugin()))
    before = [feature.clone() for feature in model(X)]
    twin = duplicate(model)
    assert_equal_features(twin, model)
    for block in blocks(twin):
        nn.init.constant_(block.triplet_attention.cw.conv.bn.bias, 9.0)
    for feature, same, changed in zip(model(X), before, twin(X), strict=True):
        assert torch.equal(feature, same) and not torch.allclose(feature, changed)


def test_block_compiles_without_a_graph_break():
    block = blocks(build(plugin()))[2]
    twin = copy.deepcopy(block)
    x = torch.randn(2, block.linear_conv.out_channels, 6, 6)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(dict(block.named_buffers()), dict(twin.named_buffers()))


def test_gates_gather_statistics_below_a_backbone_in_evaluation_mode():
    model = build(plugin(), norm_eval=True, frozen_stages=2)
    model.train()
    model(X)
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            frozen = name.startswith(("layer1.", "layer2."))
            assert buffer == int(is_attention(name) and not frozen), name


def test_wrong_position_is_named_with_the_right_one():
    with pytest.raises(ValueError) as error:
        build(plugin() | {"position": "after_conv3"})
    assert "position must be 'after_linear_conv'" in str(error.value)
    assert str(error.value).endswith("got 'after_conv3'")


@pytest.mark.parametrize("stages", [(), (True,) * 4])
def test_wrong_number_of_stages_is_named_with_the_right_one(stages):
    with pytest.raises(ValueError) as error:
        build(plugin(stages=stages))
    assert "stages must be 7 times True or False" in str(error.value)
    assert str(error.value).endswith(f"got {stages!r}")
