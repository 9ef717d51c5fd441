"""A check that a dataset's samples can be read, before a run writes anything."""

from __future__ import annotations

import os
from typing import Any

from mm_plugins.mmpretrain.coco_multi_label import CocoMultiLabel
from plugin_core.errors import ArgumentError, origin
from plugin_core.inspection.building import silence


def check_samples(dataset: Any, setting: str) -> str:
    """Load a dataset, which then knows its classes, and say what is wrong; empty if nothing.

    One that may download its files is left alone. Of the images the first one must be there.
    """
    if getattr(dataset, "download", False) or not hasattr(dataset, "full_init"):
        return ""
    dataset.serialize_data = False  # mmengine's way fails without samples
    try:
        with silence():
            dataset.full_init()
    except ArgumentError as error:
        return f"{setting}.{error.argument}: {error.reason}"
    except Exception as error:  # a dataset may raise anything
        if isinstance(dataset, CocoMultiLabel) and isinstance(error, ValueError):
            return f"{setting}.ann_file: {error}"
        if isinstance(error, FileNotFoundError) and error.filename:
            return f"{setting}: there is no file {os.fspath(error.filename)!r}"
        text = " ".join(str(error).split())[:500]
        return f"{setting}: cannot be read: {type(error).__name__}: {text} ({origin(error)})"
    if not len(dataset):
        return f"{setting}: has no sample"
    image = dataset.get_data_info(0).get("img_path")
    if not isinstance(image, str) or "://" in image or os.path.isfile(image):
        return ""
    folder = os.path.dirname(image)
    missing = f"image {image!r}" if os.path.isdir(folder) else f"image folder {folder!r}"
    return f"{setting}.data_prefix: there is no {missing}"
