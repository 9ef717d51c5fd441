"""Checks of a multi-label training before it writes anything: its files, and IDA's head."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmpretrain.models.necks import GlobalAveragePooling

from mm_plugins.mmpretrain.coco_multi_label import CocoMultiLabel
from mm_plugins.mmpretrain.ida_heads import IDAClsHead
from plugin_core.datasets.classes import check_number_of_classes
from plugin_core.errors import ArgumentError


def check_coco_multi_label(dataset: CocoMultiLabel, setting: str) -> str:
    """Load a dataset, which then knows its classes, and say what is wrong; empty if nothing."""
    try:
        dataset.full_init()
    except ArgumentError as error:
        return f"{setting}.{error.argument}: {error.reason}"
    except ValueError as error:
        return f"{setting}.ann_file: {error}"
    image = dataset.get_data_info(0)["img_path"]
    if "://" in image or os.path.isfile(image):
        return ""
    folder = os.path.dirname(image)
    missing = f"image {image!r}" if os.path.isdir(folder) else f"image folder {folder!r}"
    return f"{setting}.data_prefix: there is no {missing}"


def check_model(cfg: Config, model: Any, classes: Sequence[str]) -> Iterator[str]:
    """Say where IDA's head does not fit its backbone, or targets have another number of classes.

    Args:
        cfg: the whole config.
        model: built from it.
        classes: of the data; empty if they are not known.
    """
    head = getattr(model, "head", None)
    if isinstance(head, IDAClsHead):
        channels, takes = getattr(model.backbone, "feat_dim", None), head.classifier.in_channels
        if isinstance(model.neck, GlobalAveragePooling):
            yield "model.neck: must be None, as IDAClsHead classifies a map"
        elif model.neck is None and isinstance(channels, int) and channels != takes:
            yield (
                f"model.head.in_channels: must be {channels}, the channels of the backbone's last "
                f"map, got {takes}"
            )
    pixels, setting = cfg.get("model", {}).get("data_preprocessor"), "model.data_preprocessor"
    if pixels is None:
        pixels, setting = cfg.get("data_preprocessor") or {}, "data_preprocessor"
    number = pixels.get("num_classes")
    if classes and pixels.get("to_onehot") and isinstance(number, int):
        text = check_number_of_classes(number, classes, f"{setting}.num_classes")
        yield from [text] if text else []
