"""Checks of a multi-label training before it writes anything: IDA's head, and the targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config

from mm_plugins.mmpretrain.features import last_features
from mm_plugins.mmpretrain.ida_heads import IDAClsHead
from plugin_core.datasets.classes import check_number_of_classes
from plugin_core.errors import ArgumentError


def check_model(cfg: Config, model: Any, classes: Sequence[str]) -> Iterator[str]:
    """Say where a head does not fit its backbone, or targets have another number of classes.

    Args:
        cfg: the whole config.
        model: built from it.
        classes: of the data; empty if they are not known.
    """
    if isinstance(getattr(model, "head", None), IDAClsHead):
        yield from filter(None, [_check_map(model)])
    if hasattr(model, "check_parts"):
        try:
            model.check_parts()
        except ArgumentError as error:
            yield f"model.{error.argument}: {error.reason}"
    pixels, setting = cfg.get("model", {}).get("data_preprocessor"), "model.data_preprocessor"
    if pixels is None:
        pixels, setting = cfg.get("data_preprocessor") or {}, "data_preprocessor"
    number = pixels.get("num_classes")
    if classes and pixels.get("to_onehot") and isinstance(number, int):
        text = check_number_of_classes(number, classes, f"{setting}.num_classes")
        yield from [text] if text else []


def _check_map(model: Any) -> str:
    """Say why IDA's head cannot take the features that reach it; empty if it can."""
    takes, given, source = (
        model.head.classifier.in_channels,
        last_features(model.backbone),
        "backbone",
    )
    if given is not None and len(given) == 4 and model.neck is not None:
        given, source = last_features(model.backbone, model.neck), "neck"
    if given is None:
        return ""
    if len(given) != 4:
        name = type(getattr(model, source)).__name__
        right = (
            "must be None" if source == "neck" else "must give a map (such as out_type='featmap')"
        )
        return (
            f"model.{source}: {right}, as IDAClsHead classifies a map (B, C, H, W); "
            f"{name} gives {('B', *given[1:])}"
        )
    if given[1] != takes:
        return (
            f"model.head.in_channels: must be {given[1]}, the channels of the {source}'s last map, "
            f"got {takes}"
        )
    return ""
