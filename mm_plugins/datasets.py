"""Checks of a config's datasets, and their classes told by name."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mmdet.datasets import CocoPanopticDataset
from mmdet.evaluation import CocoMetric, CocoPanopticMetric
from mmdet.registry import METRICS
from mmengine.config import Config
from torch import nn

from mm_plugins.dataset_nodes import DatasetNode, classes_of, find_datasets
from mm_plugins.launch import is_main
from mm_plugins.panoptic_datasets import check_panoptic_dataset, check_panoptic_evaluators
from mm_plugins.panoptic_quality import PanopticQualityMetric
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.datasets.check import Reads, Use
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.findings import ERROR, WARNING, DatasetError
from plugin_core.datasets.stamps import checked_dataset


def prepare(
    cfg: Config, model: nn.Module | None, *, train: bool, checkpoint: str | None = None
) -> dict[str, str]:
    """Check the datasets of a config, and give each class one label in all of them, by name.

    Args:
        cfg: the whole config.
        model: built from it; None if it has none.
        train: whether ``train_dataloader`` will be used, or ``test_dataloader`` only.
        checkpoint: that is tested or resumed from; it may name its classes.

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
    found_panoptic: set[bool] = set()
    reads_texts = hasattr(model, "language_model")
    loaders = ("train_dataloader", "val_dataloader") if train else ("test_dataloader",)
    for loader in loaders:
        node = cfg.get(loader)
        if not isinstance(node, dict):
            continue
        evaluator = loader.replace("dataloader", "evaluator")
        evaluators = list(_evaluators(cfg, evaluator, CocoMetric))
        panoptic: list[DatasetNode] = []
        copies: dict[str, str] = {}
        for dataset in find_datasets(node.get("dataset"), f"{loader}.dataset"):
            is_panoptic = issubclass(dataset.kind, CocoPanopticDataset)
            found_panoptic.add(is_panoptic)
            if is_panoptic:
                if known and first:
                    wrong += filter(None, [_other_classes(*classes_of(dataset), *first)])
                wrong += check_panoptic_dataset(dataset, model, train=loader == "train_dataloader")
                panoptic.append(dataset)
                continue
            classes, setting = classes_of(dataset)
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
        if panoptic:
            metrics = _evaluators(cfg, evaluator, CocoPanopticMetric, PanopticQualityMetric)
            wrong += check_panoptic_evaluators(panoptic, metrics, model)
        for setting, metric in evaluators:
            if copies and isinstance(ann_file := metric.get("ann_file"), str):
                read = copies.get(os.path.realpath(ann_file), "")
                if not read:
                    wrong.append(
                        f"{setting}.ann_file: {ann_file!r} is not what {loader} reads, "
                        f"{', '.join(map(repr, copies))}; name the same file"
                    )
                elif os.path.realpath(read) != os.path.realpath(ann_file):
                    changes[f"{setting}.ann_file"] = read
    # Of panoptic datasets alone the numbers of things and stuff were checked already.
    if first and not reads_texts and found_panoptic != {True}:
        wrong += _check_heads(model, first[1])
    if wrong:
        raise ValueError("\n".join(wrong))
    return {key.replace("[", ".").replace("]", ""): value for key, value in changes.items()}


def reads(cfg: Config, model: nn.Module) -> Reads:
    """Tell what a config reads of its training data, without looking at its files."""
    node = cfg.get("train_dataloader") or {}
    for dataset in find_datasets(node.get("dataset"), "train_dataloader.dataset", files=False):
        use = _use("train_dataloader", node, dataset, ())
        return Reads(use, classes_of(dataset)[0], list(_numbers_of_classes(model)))
    return Reads(Use("train"), heads=list(_numbers_of_classes(model)))


def _other_classes(classes: Sequence[str], setting: str, first: str, known: Sequence[str]) -> str:
    """Say that a dataset has other classes than the first one; empty if not."""
    if list(classes) == list(known):
        return ""
    how = "in another order than" if set(classes) == set(known) else "are not"
    return (
        f"{setting}: {tuple(classes)!r:.300} {how} {first}, {tuple(known)!r:.300}; labels are "
        "places in this list, so all datasets need the same"
    )


def _use(
    loader: str, node: Any, dataset: DatasetNode, evaluators: Sequence[tuple[str, Any]]
) -> Use:
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


def _check(dataset: DatasetNode, classes: Sequence[str], setting: str, use: Use) -> str:
    where = f"{dataset.setting}.ann_file"
    try:
        found = checked_dataset(
            dataset.ann_file,
            dataset.images,
            use,
            classes,
            framework="mmdetection",
            other_classes=True,
        )
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


def _evaluators(cfg: Config, setting: str, *kinds: type) -> Iterator[tuple[str, Any]]:
    """Find the evaluators of some classes that compare with a file on this machine."""
    node = cfg.get(setting)
    if isinstance(node, dict) and "metrics" in node:
        node, setting = node["metrics"], f"{setting}.metrics"
    nodes = [(setting, node)]
    if isinstance(node, (list, tuple)):
        nodes = [(f"{setting}[{i}]", part) for i, part in enumerate(node)]
    for place, part in nodes:
        kind = part.get("type") if isinstance(part, dict) else None
        kind = METRICS.get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(kind) and issubclass(kind, kinds) and not part.get("backend_args"):
            yield place, part


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
