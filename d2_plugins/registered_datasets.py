"""Checks of registered datasets: their files, and what evaluates them."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from d2_plugins.datasets import describe
from d2_plugins.evaluation import check_evaluator
from plugin_core.datasets.coco_file import check_whole
from plugin_core.datasets.findings import ERROR, WARNING, DatasetError
from plugin_core.datasets.panoptic import check_panoptic
from plugin_core.errors import did_you_mean

# Folders that a dataset's metadata may name
_FOLDERS = {
    "image_root": "image",
    "panoptic_root": "panoptic annotations'",
    "sem_seg_root": "semantic annotations'",
}
# Packages for evaluating some datasets. Without this check Detectron2 misses them after training.
_PACKAGES = {
    "lvis": ("lvis", "pip install lvis"),
    "cityscapes_instance": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "pip install cityscapesscripts"),
    "coco_panoptic_seg": ("hotcoco", "pip install 'hotcoco<2'"),
}


def check_datasets(setting: str, names: tuple[str, ...], train: bool = False) -> None:
    """Check that datasets are registered, have their files and can be evaluated.

    Args:
        setting: that names them, for messages.
        names: of the datasets.
        train: whether they are trained on.

    Raises:
        ValueError: names the setting, the dataset and what is wrong.
    """
    for name in names:
        if name not in DatasetCatalog:
            hint = did_you_mean(name, DatasetCatalog.list())
            raise ValueError(
                f"{setting}: no dataset is registered as {name!r}{hint}. A COCO-format dataset is "
                f"registered by --register-coco {name} ANNOTATIONS.json IMAGES"
            )
        metadata = MetadataCatalog.get(name)
        kind = metadata.get("evaluator_type")
        if kind in _PACKAGES and not (train and kind == "coco_panoptic_seg"):
            package, install = _PACKAGES[kind]
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{setting} {name!r}: it needs the package {package}: {install}")
        json_file = metadata.get("json_file")
        where = describe(setting, name)
        if json_file and not os.path.isfile(json_file):
            raise ValueError(f"{where}: there is no annotation file {json_file!r}")
        is_coco_panoptic = kind == "coco_panoptic_seg"  # others have loaders of their own
        panoptic_json = metadata.get("panoptic_json")
        other = json_file if kind == "lvis" else None if is_coco_panoptic else panoptic_json
        try:
            if other:
                check_whole(other)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for key, what in _FOLDERS.items():
            folder = metadata.get(key)
            if folder and not os.path.isdir(folder):
                raise ValueError(f"{where}: there is no {what} folder {folder!r}")
        # Processes of a run set up anew, and the one that starts them has checked this file.
        if panoptic_json and is_coco_panoptic and comm.get_world_size() == 1:
            _check_panoptic(where, metadata)
        if not train:
            try:
                check_evaluator(name)
            except ValueError as error:
                raise ValueError(f"{setting}: {error}") from error


def _check_panoptic(where: str, metadata: Any) -> None:
    """Check a panoptic dataset of Detectron2's registration, standard or separated."""
    # The separated one reads its images from json_file, and this file at the evaluation only.
    images = None if metadata.get("sem_seg_root") else metadata.get("image_root")
    try:
        report = check_panoptic(metadata.panoptic_json, metadata.get("panoptic_root"), images)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    things = metadata.get("thing_dataset_id_to_contiguous_id")
    stuff = metadata.get("stuff_dataset_id_to_contiguous_id")
    if things is not None and stuff is not None:
        used = [category for category in report.categories if category.segments]
        unknown = [c for c in used if c.id not in things and c.id not in stuff]
        report.add(
            "unknown-class",
            ERROR,
            "categories with segments whose id is in neither of thing_dataset_id_to_contiguous_id "
            "and stuff_dataset_id_to_contiguous_id",
            [f"{c.id!r} ({c.name!r}, {c.segments:,} segments)" for c in unknown],
            left={"detectron2": "stops with a KeyError, or counts them as never found"},
            remedy="add these ids to the dataset's metadata, or take the segments out",
        )
        mixed = [c for c in used if c not in unknown and c.isthing != (c.id in things)]
        report.add(
            "thing-or-stuff",
            ERROR,
            "things that the metadata has as stuff, or stuff as things",
            [f"{c.id!r} ({c.name!r}, isthing {int(c.isthing)} in the file)" for c in mixed],
            left={"detectron2": "learns them as one kind and evaluates them as the other"},
            remedy="list things in thing_dataset_id_to_contiguous_id, and stuff in the other",
        )
    if report.of(ERROR, "detectron2"):
        raise DatasetError(where, report, "detectron2")
    warnings = report.text("detectron2", (WARNING,))
    if warnings:
        print(f"{where}:\n{warnings}", file=sys.stderr, flush=True)
