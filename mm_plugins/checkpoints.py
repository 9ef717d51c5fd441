"""What converted weights are for in MMDetection, and how its checkpoints hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mm_plugins.analysis import load_config
from mm_plugins.pixels import pixel_format, pixel_settings
from plugin_core.block_plugins import child_name, registered_block_plugins
from plugin_core.checkpoints.conversion import FoundPlugin
from plugin_core.checkpoints.detr_conversion import DetrConversion
from plugin_core.checkpoints.detr_settings import check_detr
from plugin_core.checkpoints.pixel_format import PixelFormat
from plugin_core.checkpoints.report import Target


def backbone_target(depth: int | None, plugins: Sequence[FoundPlugin]) -> Target:
    """Build a ResNet, or without a depth a MobileNetV2, with block plugins."""
    with torch.device("meta"):
        return Target(_build(backbone_settings(depth, plugins)).state_dict(), pixel_settings)


def backbone_settings(depth: int | None, plugins: Sequence[FoundPlugin]) -> dict[str, Any]:
    """Give the settings of a ResNet, or without a depth of a MobileNetV2, with block plugins."""
    position = "after_conv3" if depth and depth >= 50 else "after_conv2"
    settings: dict[str, Any] = {"type": "PluginResNet", "depth": depth}
    if depth is None:
        position, settings = "after_linear_conv", {"type": "PluginMobileNetV2"}
    stages = range(1, 5 if depth else 8)
    settings["plugins"] = [
        {
            "cfg": _layer(plugin),
            "stages": tuple(stage in plugin.stages for stage in stages),
            "position": position,
            "blocks": plugin.blocks,
        }
        for plugin in plugins
    ]
    return settings


def _layer(plugin: FoundPlugin) -> dict[str, Any]:
    kind = registered_block_plugins().get(plugin.name)
    layer = (
        {"type": "BlockPlugin", "name": plugin.name, "postfix": f"_{child_name(plugin.name)}"}
        if kind is None or MODELS.get(kind.__name__) is None
        else {"type": kind.__name__}
    )
    return {**layer, "warm_start": plugin.warm_start, **plugin.arguments}


def config_target(config: str) -> Target:
    """Build the backbone of a config."""
    model = load_config(config).model
    with torch.device("meta"):
        built = _build({**model.backbone, "init_cfg": None})
    return Target(built.state_dict(), pixel_settings, pixel_format(model, model.backbone))


def detr_target(config: str | None, conversion: DetrConversion) -> Target:
    """Build the detector of a config, or without one take the converted one as it is.

    Raises:
        ValueError: if the config's is not the converted one.
    """
    if config is None:
        return Target(conversion.tensors, pixel_settings)
    settings = load_config(config).model
    with torch.device("meta"):
        model = _build(settings)
    check_detr(conversion, model)
    return Target(model.state_dict(), pixel_settings, pixel_format(settings, settings.backbone))


def _build(settings: Mapping[str, Any]) -> nn.Module:
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(settings)


def checkpoint_of(tensors: Mapping[str, Tensor], pixels: PixelFormat | None) -> dict[str, Any]:
    """Lay out a checkpoint of tensors and, if they are known, the pixels that they want."""
    meta = {} if pixels is None else {"pixel_format": asdict(pixels)}
    return {"state_dict": dict(tensors), "meta": meta}
