"""Checks of a config's datasets, and their classes told by name."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset, ODVGDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from torch import nn

from mm_plugins.launch import is_main
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.datasets.check import Reads, Use
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.coco_file import check_whole, read_text
from plugin_core.datasets.findings import ERROR, WARNING, DatasetError
from plugin_core.datasets.stamps import checked_dataset


@dataclass
class _Dataset:
    """A dataset in COCO's format in a config."""

    setting: str
    node: Any
    kind: type
    ann_file: str
    images: str | None


def prepare(
    cfg: Config, model: nn.Module | None, *, train: bool, checkpoint: str | None = None
) -> dict[str, str]:
    """Check the datasets of a config, and give each class one label in all of them, by name.

    Args:
        cfg: the whole config.
        model: built from it; None if it has none.
        train: whether ``train_dataloader`` will be used, or ``test_dataloader`` only.
        checkpoint: that is tested; it may name its classes.

    Returns:
        Settings to change, each ``ann_file`` that is read from a copy in the cache folder: where a
        file says something in a way that MMDetection does not read, or lists its categories in
        another order. The user's files stay as they are.

    Raises:
        ValueError: names the setting, and what is wrong in the file.
    """
    changes: dict[str, str] = {}
    known = class_names_of(checkpoint) if checkpoint else None
    first: tuple[str, Sequence[str]] | None = (
        (f"the checkpoint's, {checkpoint}", known) if known else None
    )
    wrong: list[str] = []
    reads_texts = hasattr(model, "language_model")
    loaders = ("train_dataloader", "val_dataloader") if train else ("test_dataloader",)
    for loader in loaders:
        node = cfg.get(loader)
        if not isinstance(node, dict):
            continue
        evaluators = list(_evaluators(cfg, loader.replace("dataloader", "evaluator")))
        copies: dict[str, str] = {}
        for dataset in _datasets(node.get("dataset"), f"{loader}.dataset"):
            classes, setting = _classes(dataset)
            if not reads_texts:
                first = first or (setting, classes)
                if text := _other_classes(classes, setting, *first):
                    wrong.append(text)
            use = _use(loader, node, dataset, evaluators)
            skips = use.split == "train" and cfg.get("unreadable_images") == "skip"
            try:
                read = _check(dataset, classes, setting, replace(use, skips_unreadable=skips))
            except ValueError as error:
                wrong.append(str(error))
                read = dataset.ann_file
            copies[os.path.realpath(dataset.ann_file)] = read
            if read != dataset.ann_file:
                changes[f"{dataset.setting}.ann_file"] = read
        for setting, evaluator in evaluators:
            if copies and isinstance(ann_file := evaluator.get("ann_file"), str):
                if os.path.realpath(ann_file) not in copies:
                    raise ValueError(
                        f"{setting}.ann_file: {ann_file!r} is not what {loader} reads, "
                        f"{', '.join(map(repr, copies))}; name the same file"
                    )
                read = copies[os.path.realpath(ann_file)]
                if os.path.realpath(read) != os.path.realpath(ann_file):
                    changes[f"{setting}.ann_file"] = read
    if first and not reads_texts:
        wrong += _check_heads(model, first[1])
    if wrong:
        raise ValueError("\n".join(wrong))
    for path in changes.values():
        if set(path) & set(",[](){}'\""):  # which --cfg-options would take apart
            raise ValueError(
                f"DETECTION_PLUGINS_CACHE: {path!r} has commas, brackets or quotes; name a folder "
                "without them"
            )
    return {key.replace("[", ".").replace("]", ""): value for key, value in changes.items()}


def reads(cfg: Config, model: nn.Module) -> Reads:
    """Tell what a config reads of its training data, without looking at its files."""
    node = cfg.get("train_dataloader") or {}
    for dataset in _datasets(node.get("dataset"), "train_dataloader.dataset", files=False):
        use = _use("train_dataloader", node, dataset, ())
        return Reads(use, _classes(dataset)[0], list(_numbers_of_classes(model)))
    return Reads(Use("train"), heads=list(_numbers_of_classes(model)))


def _datasets(node: Any, setting: str, *, files: bool = True) -> Iterator[_Dataset]:
    """Find the datasets in COCO's format, also those that others wrap, join or repeat.

    With ``files`` the files of others are checked on the way.
    """
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            yield from _datasets(part, f"{setting}[{i}]", files=files)
    if not isinstance(node, dict):
        return
    for key in ("dataset", "datasets"):
        yield from _datasets(node.get(key), f"{setting}.{key}", files=files)
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
    prefix = node.get("data_prefix")
    folder = prefix.get("img") if isinstance(prefix, dict) else None
    images = None
    if isinstance(folder, str) and "://" not in folder:
        images = os.path.join(root, folder) or "."
    if issubclass(kind, (CocoPanopticDataset, LVISV05Dataset)):
        if not files:
            return
        try:
            check_whole(ann_file)
        except ValueError as error:
            raise ValueError(f"{setting}.ann_file: {error}") from error
        return
    yield _Dataset(setting, node, kind, ann_file, images)


def _classes(dataset: _Dataset) -> tuple[Sequence[str], str]:
    """Read the classes of a dataset, and say which setting has them."""
    metainfo = dataset.node.get("metainfo")
    setting = f"{dataset.setting}.metainfo.classes"
    classes = metainfo.get("classes") if isinstance(metainfo, dict) else None
    if isinstance(classes, str):
        if not os.path.isfile(classes):
            raise ValueError(
                f"{setting}: must be a tuple of names, got {classes!r}: ({classes!r},)"
            )
        with open(classes, encoding="utf-8") as file:  # as MMDetection does
            classes = file.read().splitlines()
    if classes is None:
        classes = dataset.kind.METAINFO.get("classes", ())  # type: ignore[attr-defined]
        setting += f" (not set: those of {dataset.kind.__name__})"
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"{setting}: {twice!r} occurs twice")
    return classes, setting


def _other_classes(classes: Sequence[str], setting: str, first: str, known: Sequence[str]) -> str:
    """Say that a dataset has other classes than the first one; empty if not."""
    if list(classes) == list(known):
        return ""
    how = "in another order than" if set(classes) == set(known) else "are not"
    return (
        f"{setting}: {tuple(classes)!r:.300} {how} {first}, {tuple(known)!r:.300}; labels are "
        "places in this list, so all datasets need the same"
    )


def _use(loader: str, node: Any, dataset: _Dataset, evaluators: Sequence[tuple[str, Any]]) -> Use:
    if loader != "train_dataloader":
        metrics = [e.get("metric") for _, e in evaluators]
        return Use("test", "any" if any("segm" in (m or ()) for m in metrics) else "")
    filters = dict(dataset.node.get("filter_cfg") or {})
    alone = "datasets" not in dataset.setting
    masks = _holds(node, "with_mask", True)
    keeps_empty = not (alone and filters.get("filter_empty_gt", False))
    min_size = filters.get("min_size", 0)
    return Use("train", "any" if masks else "", keeps_empty=keeps_empty, min_size=min_size)


def _holds(node: Any, key: str, value: Any) -> bool:
    """Tell whether a key somewhere below a node has a value."""
    if isinstance(node, (list, tuple)):
        return any(_holds(part, key, value) for part in node)
    if not isinstance(node, dict):
        return False
    return node.get(key) == value or any(_holds(part, key, value) for part in node.values())


def _check(dataset: _Dataset, classes: Sequence[str], setting: str, use: Use) -> str:
    where = f"{dataset.setting}.ann_file"
    try:
        found = checked_dataset(dataset.ann_file, dataset.images, use, classes, other_classes=True)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if dataset.images is not None and not os.path.isdir(dataset.images):
        raise ValueError(
            f"{dataset.setting}.data_prefix.img: there is no image folder {dataset.images!r}"
        )
    check_classes(found.report, classes, setting, may_leave_out=True)
    if found.report.of(ERROR, "mmdetection"):
        raise DatasetError(where, found.report, "mmdetection")
    if is_main():
        warnings = found.report.text("mmdetection", (WARNING,))
        if warnings:
            print(f"{where}:\n{warnings}", file=sys.stderr, flush=True)
        if found.ann_file != dataset.ann_file:
            print(
                f"{where}: reading a copy of {dataset.ann_file!r}, {found.ann_file!r}",
                file=sys.stderr,
                flush=True,
            )
    return found.ann_file


def _evaluators(cfg: Config, setting: str) -> Iterator[tuple[str, Any]]:
    """Find the evaluators that compare with a file in COCO's format."""
    node = cfg.get(setting)
    nodes = [(setting, node)]
    if isinstance(node, (list, tuple)):
        nodes = [(f"{setting}[{i}]", part) for i, part in enumerate(node)]
    for place, part in nodes:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = METRICS.get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(kind) and issubclass(kind, CocoMetric) and not part.get("backend_args"):
            yield place, part


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


def _check_heads(model: Any, classes: Sequence[str]) -> list[str]:
    """Say which heads have other numbers of classes than the data."""
    texts = [check_number_of_classes(n, classes, s) for s, n in _numbers_of_classes(model)]
    return [text for text in texts if text]


def number_of_classes(detector: Any) -> int | None:
    """Count a detector's classes of things; None if it does not tell them."""
    return next((number for _, number in _numbers_of_classes(detector)), None)


def _numbers_of_classes(detector: Any) -> Iterator[tuple[str, int]]:
    """List the numbers of classes in a detector, each with its setting."""
    if hasattr(detector, "language_model"):
        return  # its classes are words of a text
    if hasattr(detector, "num_things_classes"):
        yield "model.panoptic_head.num_things_classes", detector.num_things_classes
        return
    owner, prefix = detector, "model"
    if getattr(detector, "roi_head", None) is not None:
        owner, prefix = detector.roi_head, "model.roi_head"
    for name in ("bbox_head", "mask_head"):
        head = getattr(owner, name, None)
        stages = list(head) if isinstance(head, nn.ModuleList) else [head]
        for i, stage in enumerate(stages):
            number = getattr(stage, "num_classes", None)
            if isinstance(number, int) and "RPN" not in type(stage).__name__:
                place = f"[{i}]" if len(stages) > 1 else ""
                yield f"{prefix}.{name}{place}.num_classes", number
