"""MMDetection's backbones that take block plugins, made small, and what their tests ask of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.registry import MODELS
from torch import nn

from mm_plugins.block_plugins import BlockPlugin

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
