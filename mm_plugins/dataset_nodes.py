"""The datasets in a config."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset, ODVGDataset
from mmdet.registry import DATASETS

from plugin_core.datasets.coco_file import check_whole, read_text


@dataclass
class DatasetNode:
    """A dataset in COCO's format in a config."""

    setting: str
    node: Any
    kind: type
    ann_file: str
    images: str | None
    segments: str | None = None  # folder of a panoptic dataset's PNGs


def find_datasets(node: Any, setting: str, *, files: bool = True) -> Iterator[DatasetNode]:
    """Find the datasets in COCO's format, also those that others wrap, join or repeat.

    With ``files`` the files of others are checked on the way.
    """
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            yield from find_datasets(part, f"{setting}[{i}]", files=files)
    if not isinstance(node, dict):
        return
    for key in ("dataset", "datasets"):
        yield from find_datasets(node.get(key), f"{setting}.{key}", files=files)
    kind = node.get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    ann_file, root = node.get("ann_file"), node.get("data_root") or ""
    if (
        not inspect.isclass(kind)
        or (node.get("backend_args") or {}).get("backend", "local") != "local"
        or not isinstance(ann_file, str)
        or not ann_file
        or "://" in os.path.join(root, ann_file)
    ):
        return
    ann_file = os.path.join(root, ann_file)
    if files and issubclass(kind, ODVGDataset):
        _check_odvg(node, ann_file, setting)
    if not issubclass(kind, CocoDataset):
        return
    if issubclass(kind, LVISV05Dataset):
        if not files:
            return
        try:
            check_whole(ann_file)
        except ValueError as error:
            raise ValueError(f"{setting}.ann_file: {error}") from error
        return
    prefix = node.get("data_prefix")
    if files and kind.__module__.startswith("mmdet.") and "img" not in (prefix or ()):
        raise ValueError(
            f"{setting}.data_prefix: must name the folder of the images, dict(img=…), got {prefix}"
        )
    is_panoptic = issubclass(kind, CocoPanopticDataset)
    if files or not is_panoptic:
        segments = _folder(node, root, "seg") if is_panoptic else None
        yield DatasetNode(setting, node, kind, ann_file, _folder(node, root, "img"), segments)


def _folder(node: Any, root: str, key: str) -> str | None:
    """Read a folder of a dataset; None if there is none on this machine."""
    prefix = node.get("data_prefix")
    folder = prefix.get(key) if isinstance(prefix, dict) else None
    if not isinstance(folder, str) or "://" in folder:
        return None
    return os.path.join(root, folder) or "."


def classes_of(dataset: DatasetNode) -> tuple[Sequence[str], str]:
    """Read the classes of a dataset, and say which setting has them."""
    metainfo = dataset.node.get("metainfo")
    setting = f"{dataset.setting}.metainfo.classes"
    classes = metainfo.get("classes") if isinstance(metainfo, dict) else None
    if isinstance(classes, str):
        if not os.path.isfile(classes):
            raise ValueError(
                f"{setting}: must be a tuple of names, got {classes!r}: ({classes!r},)"
            )
        classes = names_in(classes)
    if classes is None:
        classes = dataset.kind.METAINFO.get("classes", ())  # type: ignore[attr-defined]
        setting += f" (not set: those of {dataset.kind.__name__})"
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"{setting}: {twice!r} occurs twice")
    return classes, setting


def names_in(names: Any) -> Any:
    """Read names that are in a file, as MMDetection does."""
    if not isinstance(names, str) or not os.path.isfile(names):
        return names
    with open(names, encoding="utf-8") as file:
        return file.read().splitlines()


def _check_odvg(node: Any, ann_file: str, setting: str) -> None:
    """Check a file of ODVG, one JSON object in a line."""
    where = f"{setting}.ann_file: {ann_file!r}"
    try:
        text, rewritten = read_text(ann_file)
    except ValueError as error:
        raise ValueError(f"{setting}.ann_file: {error}") from error
    if rewritten:
        raise ValueError(f"{where} begins with {rewritten}; write it as plain UTF-8")
    if text.lstrip()[:1] == b"[":
        raise ValueError(f"{where} is a JSON list; ODVG's format is one object in each line")
    wanted = "grounding" if not node.get("label_map_file") else "detection"
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            raise ValueError(f"{where}: line {number} is blank; take it out")
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{where}: line {number} is no JSON: {error}") from error
        for key in ("filename", "height", "width", wanted):
            if not isinstance(record, dict) or (key not in record and key != "detection"):
                raise ValueError(f"{where}: line {number} is no object with {key!r}")
    label_map = node.get("label_map_file")
    if label_map:
        path = os.path.join(node.get("data_root") or "", label_map)
        try:
            check_whole(path)
        except ValueError as error:
            raise ValueError(f"{setting}.label_map_file: {error}") from error
