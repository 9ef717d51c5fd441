"""Check that a config gives pretrained weights the same pixels as their training did.

MMDetection does not notice a mismatch: the model trains, and is worse.
"""

from __future__ import annotations

from typing import Any

from mmengine.config import Config, ConfigDict

from mm_plugins.init_cfgs import pretrained
from plugin_core.checkpoints.pixel_format import PixelFormat, explain_mismatch, find_pixel_format


def pixel_format(model: ConfigDict, backbone: ConfigDict) -> PixelFormat | None:
    """Read the pixel format that a model's config gives to its backbone; None if it gives none."""
    return _format_of(model.get("data_preprocessor"), backbone)


def _format_of(pixels: Any, backbone: ConfigDict) -> PixelFormat | None:
    if not isinstance(pixels, dict) or pixels.get("mean") is None or pixels.get("std") is None:
        return None
    has_style = "depth" in backbone and backbone["depth"] >= 50
    return PixelFormat(
        # MMPretrain's name of the setting is the second one
        channel_order="RGB" if pixels.get("bgr_to_rgb", pixels.get("to_rgb")) else "BGR",
        mean=tuple(pixels["mean"]),
        std=tuple(pixels["std"]),
        stride_in_1x1=backbone.get("style", "pytorch") == "caffe" if has_style else None,
    )


def pixel_settings(pixels: PixelFormat) -> dict[str, tuple[str, Any]]:
    """Give the name and value of MMDetection's setting for each field of a pixel format."""
    return {
        "channel_order": ("model.data_preprocessor.bgr_to_rgb", pixels.channel_order == "RGB"),
        "mean": ("model.data_preprocessor.mean", list(pixels.mean)),
        "std": ("model.data_preprocessor.std", list(pixels.std)),
        "stride_in_1x1": ("model.backbone.style", "caffe" if pixels.stride_in_1x1 else "pytorch"),
    }


def find_mismatches(cfg: Config) -> list[str]:
    """Describe the settings that disagree with a config's weights, a sentence for each.

    Args:
        cfg: the whole config. ``load_from`` names the weights, or else the backbone's ``init_cfg``.
    """
    model = cfg.get("model", {})
    backbone = model.get("backbone")
    is_classifier = cfg.get("default_scope") == "mmpretrain"
    pixels = model.get("data_preprocessor") or cfg.get("data_preprocessor")
    used = _format_of(pixels, backbone) if isinstance(backbone, dict) else None
    if used is None:
        return []
    begins = [init.get("checkpoint") for init in pretrained(backbone.get("init_cfg"))]
    # Of several mmengine loads the last one last.
    weights = next(filter(None, [cfg.get("load_from"), *reversed(begins)]), "")
    wanted = find_pixel_format(weights) if weights else None
    settings = _classifier_settings if is_classifier else pixel_settings
    return [] if wanted is None else explain_mismatch(weights, wanted, used, settings)


def _classifier_settings(pixels: PixelFormat) -> dict[str, tuple[str, Any]]:
    """As :func:`pixel_settings`, in MMPretrain's names."""
    order = "data_preprocessor.to_rgb", pixels.channel_order == "RGB"
    settings = pixel_settings(pixels) | {"channel_order": order}
    return {
        field: (name.replace("model.data_", "data_"), value)
        for field, (name, value) in settings.items()
    }
