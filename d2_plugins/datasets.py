"""Datasets in COCO's format: registered without code, checked, and their classes told by name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils import comm

from plugin_core.datasets.check import Reads
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.coco_file import Category, class_names, read_categories, sort_categories
from plugin_core.datasets.findings import ERROR, WARNING, DatasetError
from plugin_core.datasets.records import is_id
from plugin_core.datasets.stamps import Dataset, checked_dataset

# Evaluators whose annotation files are COCO's instances
_COCO_KINDS = ("coco", "coco_panoptic_seg")


_registered: dict[str, tuple[str, str]] = {}  # by register_coco: annotations and images


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Register a COCO-format dataset of boxes, and of masks and keypoints where it has them.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: annotations, as ``instances_*.json`` or ``person_keypoints_*.json`` of COCO.
        image_root: folder that the annotations' file names are relative to.

    Raises:
        ValueError: if the name is taken, or the annotations cannot be read.
    """
    setting = f"--register-coco {name}"
    if name in DatasetCatalog:
        raise ValueError(f"{setting}: a dataset of this name exists; choose another name")
    try:
        categories = read_categories(json_file)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if not categories or not all(is_id(c.id) and isinstance(c.name, str) for c in categories):
        raise ValueError(
            f"{setting}: {json_file!r} has no list of categories, each with an id and a name"
        )
    ids = {category.id: i for i, category in enumerate(sort_categories(categories))}
    metadata = MetadataCatalog.get(name)
    metadata.set(evaluator_type="coco", **_keypoint_metadata(categories))
    _registered[name] = json_file, image_root
    DatasetCatalog.register(name, lambda: _load(name))
    _describe(name, json_file, class_names(categories), ids)


def _describe(name: str, json_file: str, classes: Sequence[str], ids: dict[Any, int]) -> None:
    """Say in a dataset's metadata which file is read, and which category is which class."""
    metadata = MetadataCatalog.get(name)
    new = {
        "json_file": json_file,
        "image_root": _registered[name][1],
        "thing_classes": list(classes),
        "thing_dataset_id_to_contiguous_id": ids,
    }
    for key, value in new.items():
        metadata.__dict__.pop(key, None)  # Detectron2 refuses another value for a known key
        setattr(metadata, key, value)


def _load(name: str) -> list[dict[str, Any]]:
    metadata = MetadataCatalog.get(name)
    # Without a name Detectron2 leaves the categories' ids as they are.
    images = load_coco_json(metadata.json_file, metadata.image_root)
    ids = metadata.thing_dataset_id_to_contiguous_id
    for image in images:  # only crowds may be of another class
        known = [a for a in image["annotations"] if a["category_id"] in ids]
        image["annotations"] = [{**a, "category_id": ids[a["category_id"]]} for a in known]
    return images


def _keypoint_metadata(categories: Sequence[Category]) -> dict[str, Any]:
    """Collect Detectron2's metadata of keypoints: their names, and the pairs that a flip swaps."""
    lists = [c.keypoints for c in categories if isinstance(c.keypoints, list) and c.keypoints]
    if not lists:
        return {}
    names = lists[0]
    flips = [(n, right) for n in map(str, names) if (right := _mirrored(n)) != n]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [(left, right) for left, right in flips if right in names],
    }


def _mirrored(name: str) -> str:
    """Name the right counterpart of a left keypoint: left_eye, LeftEye, l_eye, LEye, eye_l."""
    for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
        name = name.replace(left, right)
    name = re.sub(r"^l(?=[_\-. ])|(?<=[_\-. ])l$", "r", name)
    return re.sub(r"^L(?=[_\-. A-Z])|(?<=[_\-. ])L$", "R", name)


def prepare(
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    reads: Reads,
    classes: Sequence[str] | None = None,
) -> None:
    """Check the datasets of a run, and give each class one number in all of them, by name.

    Where a file says something in a way that Detectron2 does not read, a copy in the cache folder
    is read instead. The user's files stay as they are.

    Args:
        train: pairs of a setting and a registered name.
        test: likewise.
        reads: what the model reads of the data.
        classes: of a checkpoint that the run goes on with or evaluates; None if there is none, or
            it does not tell them.

    Raises:
        ValueError: names the setting, and what is wrong in the file.
    """
    whence, wrong = "the checkpoint", []
    for setting, name, use in [
        *((*named, reads.use) for named in train),
        *((*named, reads.use.for_test()) for named in test),
    ]:
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if not json_file or metadata.get("evaluator_type") not in _COCO_KINDS:
            continue
        where = describe(setting, name)
        annotations, images = _registered.get(name, (json_file, metadata.get("image_root")))
        try:
            dataset = checked_dataset(annotations, images, use, classes, framework="detectron2")
        except ValueError as error:
            wrong.append(f"{where}: {error}")
            continue
        own = [str(c) for c, _ in dataset.categories]
        if classes is None:
            classes, whence = own, f"{setting} {name!r}"
        else:
            check_classes(dataset.report, classes, whence, may_leave_out=False)
        if name not in _registered:
            _check_as_it_is(dataset, annotations, classes, own)
        if dataset.report.of(ERROR, "detectron2"):
            wrong.append(str(DatasetError(where, dataset.report, "detectron2")))
            continue
        for node, number in reads.heads:
            text = check_number_of_classes(number, classes, node, dataset.report)
            if text and text not in wrong:
                wrong.append(text)
        if name in _registered:
            _take(name, dataset, annotations, classes)
        warnings = dataset.report.text("detectron2", (WARNING,))
        if warnings and comm.get_world_size() == 1:  # processes check anew, and say it no more
            print(f"{where}:\n{warnings}", file=sys.stderr, flush=True)
    if wrong:
        raise ValueError("\n".join(wrong))


def describe(setting: str, name: str) -> str:
    """Say which dataset of which setting is meant, and where Detectron2 looks for its own."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    json_file = MetadataCatalog.get(name).get("json_file")
    if str(json_file).startswith(os.path.join(root, "")):
        return f"{setting} {name!r} (below {root!r}, which DETECTRON2_DATASETS sets)"
    return f"{setting} {name!r}"


def _take(name: str, dataset: Dataset, annotations: str, classes: Sequence[str]) -> None:
    """Read a registered dataset from its checked file, with these classes."""
    categories = dataset.categories
    if dataset.ann_file != annotations:
        print(f"{name}: reading a copy of {annotations!r}, {dataset.ann_file!r}", file=sys.stderr)
        categories = [(str(c.name), c.id) for c in read_categories(dataset.ann_file)]
    numbers = {name: i for i, name in enumerate(classes)}
    ids = {id_: numbers[name] for name, id_ in categories if name in numbers}
    _describe(name, dataset.ann_file, classes, ids)


def _check_as_it_is(
    dataset: Dataset, annotations: str, classes: Sequence[str], own: Sequence[str]
) -> None:
    """Make errors of what only ``--register-coco`` can read right."""
    for finding in dataset.report.findings:
        if finding.mended == "read" and finding.concerns("detectron2"):
            finding.level, finding.mended = ERROR, "fix"
    if not dataset.report.of(ERROR) and list(own) != list(classes):
        dataset.report.add(
            "class-order",
            ERROR,
            f"classes in another order than the training's, which is {', '.join(classes)}",
            [", ".join(own)],
            left={"detectron2": "takes one class for another"},
            remedy="number the categories as in training, or register the file by --register-coco",
        )
