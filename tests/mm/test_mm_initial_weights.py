"""Initial weights of MMDetection's backbones with block plugins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.models.backbones import ResNet
from plugin_backbones import (
    assert_equal_features,
    build,
    evaluating,
    is_plugins,
    plain,
    plugins_of,
    randomize,
    triplet,
)

from mm_plugins.block_plugins import BlockPlugin
from plugin_core.block_plugins import make_module


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
