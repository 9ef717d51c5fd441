"""Targets of converted weights in Detectron2, and the layout of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import Tensor

from d2_plugins.block_plugins import RESNET_STAGES
from d2_plugins.config import add_plugin_config, merge_config
from d2_plugins.mmdet_bridge import is_bridge
from d2_plugins.pixels import pixel_format, pixel_settings
from plugin_core.checkpoints.conversion import FoundPlugin
from plugin_core.checkpoints.pixel_format import PixelFormat
from plugin_core.checkpoints.report import Target


def backbone_target(depth: int, plugins: Sequence[FoundPlugin]) -> Target:
    """Build a ResNet with block plugins."""
    cfg = get_cfg()
    add_plugin_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.OUT_FEATURES = list(RESNET_STAGES)
    cfg.MODEL.RESNETS.PLUGINS = [
        {
            "NAME": plugin.name,
            "STAGES": [RESNET_STAGES[stage - 1] for stage in plugin.stages],
            "BLOCKS": plugin.blocks,
            "WARM_START": plugin.warm_start,
            **{argument.upper(): value for argument, value in plugin.arguments.items()},
        }
        for plugin in plugins
    ]
    with torch.device("meta"):
        return Target(build_backbone(cfg).state_dict(), pixel_settings)


def config_target(config: str) -> Target:
    """Build the backbone of a yaml config; raises ValueError if it is none of Detectron2's own."""
    if config.endswith(".py"):
        raise ValueError("is a LazyConfig; take a yaml config of the same backbone, or none")
    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, config, ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0"])
    if is_bridge(cfg):
        raise ValueError(
            "is of a detector of MMDetection, and so are its weights: "
            f"use --to mm --config {cfg.MODEL.MMDET.CONFIG}"
        )
    model = build_model(cfg)
    state_dict = getattr(model.backbone, "bottom_up", model.backbone).state_dict()
    res5 = getattr(getattr(model, "roi_heads", None), "res5", None)
    if res5 is not None:  # a C4 detector; Detectron2 matches names by their ends
        state_dict.update({f"res5.{name}": t for name, t in res5.state_dict().items()})
    return Target(state_dict, pixel_settings, pixel_format(cfg))


def checkpoint_of(
    tensors: Mapping[str, Tensor], pixels: PixelFormat | None, *, as_arrays: bool
) -> dict[str, Any]:
    """Lay out a checkpoint.

    Args:
        tensors: by names without the detector's prefix for its backbone; Detectron2's heuristics
            add the prefix.
        pixels: pixel format of the weights, for preflight; None if unknown.
        as_arrays: write numpy arrays, as a .pkl of the model zoo holds.
    """
    model = {name: t.numpy() if as_arrays else t for name, t in tensors.items()}
    record = {} if pixels is None else {"pixel_format": asdict(pixels)}
    return {
        "model": model,
        "matching_heuristics": True,
        "__author__": "detection-plugins",
        **record,
    }
