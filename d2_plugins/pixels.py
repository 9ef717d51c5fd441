"""Check that a config gives pretrained weights the same pixels as their training did.

Detectron2 does not notice a mismatch: the model trains, and is worse.
"""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from d2_plugins.mmdet_bridge import find_detector_mismatches, is_bridge
from plugin_core.checkpoints.pixel_format import PixelFormat, explain_mismatch, find_pixel_format


def pixel_format(cfg: CfgNode) -> PixelFormat:
    """Read the pixel format that a config gives to its backbone."""
    return PixelFormat(
        channel_order=cfg.INPUT.FORMAT,
        mean=tuple(cfg.MODEL.PIXEL_MEAN),
        std=tuple(cfg.MODEL.PIXEL_STD),
        # A ResNet of basic blocks has no 1×1 convolution to stride in.
        stride_in_1x1=cfg.MODEL.RESNETS.STRIDE_IN_1X1 if cfg.MODEL.RESNETS.DEPTH >= 50 else None,
    )


def pixel_settings(pixels: PixelFormat) -> dict[str, tuple[str, Any]]:
    """Give the name and value of Detectron2's setting for each field of a pixel format."""
    return {
        "channel_order": ("INPUT.FORMAT", pixels.channel_order),
        "mean": ("MODEL.PIXEL_MEAN", list(pixels.mean)),
        "std": ("MODEL.PIXEL_STD", list(pixels.std)),
        "stride_in_1x1": ("MODEL.RESNETS.STRIDE_IN_1X1", pixels.stride_in_1x1),
    }


def find_mismatches(cfg: CfgNode) -> list[str]:
    """Describe the settings that disagree with ``MODEL.WEIGHTS``, a sentence for each."""
    if is_bridge(cfg):
        return find_detector_mismatches(cfg)
    weights = cfg.MODEL.WEIGHTS
    wanted = find_pixel_format(weights) if weights else None
    if wanted is None:
        return []
    return explain_mismatch(weights, wanted, pixel_format(cfg), pixel_settings)


def find_lazy_mismatches(cfg: DictConfig) -> list[str]:
    """Describe a LazyConfig's settings that disagree with ``train.init_checkpoint``."""
    model, weights = cfg.model, cfg.train.init_checkpoint
    wanted = find_pixel_format(weights) if weights else None
    if wanted is None or not {"input_format", "pixel_mean", "pixel_std"} <= set(model):
        return []
    stride = OmegaConf.select(cfg, _LAZY_STRIDE)
    used = PixelFormat(model.input_format, tuple(model.pixel_mean), tuple(model.pixel_std), stride)
    return explain_mismatch(weights, wanted, used, _lazy_pixel_settings)


_LAZY_STRIDE = "model.backbone.bottom_up.stages.stride_in_1x1"


def _lazy_pixel_settings(pixels: PixelFormat) -> dict[str, tuple[str, Any]]:
    return {
        "channel_order": ("model.input_format", pixels.channel_order),
        "mean": ("model.pixel_mean", list(pixels.mean)),
        "std": ("model.pixel_std", list(pixels.std)),
        "stride_in_1x1": (_LAZY_STRIDE, pixels.stride_in_1x1),
    }
