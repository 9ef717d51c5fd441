"""Checks of a classifier's datasets before a run: their files, and the names of their classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope
from mmpretrain.datasets import CustomDataset, MultiLabelDataset
from mmpretrain.models.heads import ClsHead, MultiLabelClsHead
from torch import nn

from mm_plugins.mmpretrain.loss_kinds import check_loss
from mm_plugins.mmpretrain.multi_label_checks import check_model
from mm_plugins.mmpretrain.sample_checks import check_samples
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.datasets.classes import check_number_of_classes
from plugin_core.errors import ArgumentError, few


def prepare(
    cfg: Config, model: nn.Module | None, *, train: bool, checkpoint: str | None = None
) -> dict[str, str]:
    """Check the datasets of a config, and that all of them have the same classes.

    Args:
        cfg: the whole config.
        model: built from it; None if it has none.
        train: whether ``train_dataloader`` will be used, or ``test_dataloader`` only.
        checkpoint: that is tested or resumed from; it may name its classes.

    Returns:
        Settings to change; there are none. As of :func:`mm_plugins.datasets.prepare`.

    Raises:
        ValueError: names each setting that is wrong, its value and what would be right.
    """
    wrong: list[str] = []
    known = class_names_of(checkpoint) if checkpoint else None
    source, first = f"the checkpoint's, {checkpoint}", tuple(known or ())
    loaders = ("train_dataloader", "val_dataloader") if train else ("test_dataloader",)
    head = getattr(model, "head", None)
    number = getattr(head, "num_classes", None)
    number = number if isinstance(number, int) else 0
    loss = getattr(head, "loss_module", None)
    takes_one = isinstance(head, ClsHead) and not getattr(loss, "use_soft", False)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        for loader in loaders:
            node = (cfg.get(loader) or {}).get("dataset")
            for setting, dataset in _datasets(node, f"{loader}.dataset", wrong):
                classes = _check(dataset, setting, wrong, number)
                if isinstance(dataset, MultiLabelDataset) and takes_one:
                    wrong.append(
                        f"{setting}: its images have several labels, and {type(head).__name__} is "
                        "for one; use a multi-label head such as MultiLabelLinearClsHead"
                    )
                if not classes:
                    continue
                if not first:
                    source, first = f"those of {setting}", classes
                if classes != first:
                    wrong.append(
                        f"{setting}: its classes, {few(classes)}, are not {source}, "
                        f"{few(first)}; labels are places in this list, so all need the same "
                        "(names of folders in their order, or classes=… of a dataset)"
                    )
        for loader in loaders:
            wrong += _check_metrics(cfg, loader.replace("dataloader", "evaluator"), first, number)
    if first and number:
        wrong += filter(None, [check_number_of_classes(number, first, "model.head.num_classes")])
    wrong += _check_counts(getattr(loss, "counts", None), number, "model.head.loss.counts")
    wrong += check_model(cfg, model, first)
    if isinstance(head, MultiLabelClsHead):
        try:
            check_loss(head.loss_module, "several")
        except ArgumentError as error:
            wrong.append(f"model.head.{error.argument}: {error.reason}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return {}


def _check_metrics(cfg: Config, setting: str, classes: Sequence[str], number: int) -> Iterator[str]:
    """Say which metric of an evaluator does not fit the data's classes or the model's number."""
    metrics = cfg.get(setting) or ()
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        most = max(np.atleast_1d(metric.get("topk") or 1))
        if classes and metric.get("type") == "Accuracy" and most > len(classes):
            yield (
                f"{setting}.topk: must be at most the number of classes, {len(classes)}, "
                f"got {metric['topk']!r}; use topk=(1,)"
            )
        yield from _check_counts(metric.get("counts"), number, f"{setting}.counts")


def _check_counts(counts: Any, number: int, setting: str) -> Iterator[str]:
    """Say that training images are counted of another number of classes than the model's."""
    if isinstance(counts, Sequence) and number and len(counts) != number:
        yield (
            f"{setting}: must be the training images of each of the {number} classes, got "
            f"{len(counts)} numbers; leave it out, and ClassCountsHook counts them"
        )


def _datasets(node: Any, setting: str, wrong: list[str]) -> Iterator[tuple[str, BaseDataset]]:
    """Build the datasets of a config without their samples, also those that others wrap."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            yield from _datasets(part, f"{setting}[{i}]", wrong)
    if not isinstance(node, Mapping):
        return
    inner = [key for key in ("dataset", "datasets") if key in node]
    for key in inner:
        yield from _datasets(node[key], f"{setting}.{key}", wrong)
    if inner:
        return
    try:
        try:
            dataset = DATASETS.build({**node, "lazy_init": True, "pipeline": []})
        except TypeError:  # it reads its samples as it is built
            dataset = DATASETS.build({**node, "pipeline": []})
    except ArgumentError as error:
        wrong.append(f"{setting}.{error.argument}: {error.reason}")
    except Exception as error:  # a constructor may raise anything
        wrong.append(f"{setting}: {' '.join(str(error).split())}")
    else:
        yield setting, dataset


def _check(dataset: Any, setting: str, wrong: list[str], number: int) -> tuple[str, ...]:
    """Check a dataset's files, and return its classes; none if they are not known yet."""
    if not isinstance(dataset, CustomDataset):
        wrong += filter(None, [check_samples(dataset, setting)])
    classes = tuple(dataset.metainfo.get("classes") or ())
    if not isinstance(dataset, CustomDataset) or "://" in dataset.img_prefix:
        return classes
    images = dataset.img_prefix
    if not os.path.isdir(images):
        wrong.append(f"{setting}: there is no folder of images {images!r} (data_root, data_prefix)")
    elif dataset.ann_file:
        wrong += filter(None, [_check_list(dataset, f"{setting}.ann_file", len(classes) or number)])
    elif dataset.with_label:
        folders = sorted(entry.name for entry in os.scandir(images) if entry.is_dir())
        if classes and len(classes) != len(folders):
            wrong.append(
                f"{setting}: {images!r} has {len(folders)} folders, and there are {len(classes)} "
                "classes; each class needs a folder"
            )
        elif set(classes) == set(folders) and list(classes) != folders:
            wrong.append(
                f"{setting}: its classes, {few(classes)}, are not in the order of their labels, "
                f"which MMPretrain gives to folders by their sorted names: {few(folders)}; name "
                "them in this order, or choose the labels in an ann_file"
            )
        empty = [name for name in folders if not _has_image(dataset, os.path.join(images, name))]
        if not folders or empty:
            what = f"no image in {few(empty)}" if empty else "no folder for a class"
            wrong.append(
                f"{setting}: {images!r} has {what}; put each class's images into a folder that has "
                "its name, or list them in ann_file"
            )
        return classes or tuple(folders)
    elif not _has_image(dataset, images):
        wrong.append(f"{setting}: there is no image in {images!r}")
    return classes


def _has_image(dataset: Any, folder: str) -> bool:
    with os.scandir(folder) as entries:  # up to the first one, as folders may be large
        for entry in entries:
            if (
                _has_image(dataset, entry.path)
                if entry.is_dir()
                else dataset.is_valid_file(entry.name)
            ):
                return True
    return False


def _check_list(dataset: Any, setting: str, num_classes: int) -> str:
    """Say what is wrong with a file that lists images and labels; empty if nothing."""
    path = dataset.ann_file
    if not os.path.isfile(path):
        return f"{setting}: there is no file {path!r}"
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        return f"{setting}: {path!r} lists no image"
    for number, line in enumerate(lines, start=1) if dataset.with_label else ():
        image, _, label = line.rpartition(" ")
        if not image or not label.isdecimal() or (num_classes and int(label) >= num_classes):
            most = f" from 0 to {num_classes - 1}" if num_classes else ""
            where = f"{setting}: {path!r}, line {number}"
            return f"{where}: expected a path and a label{most}, got {line!r}"
    image = lines[0].rpartition(" ")[0] if dataset.with_label else lines[0]
    if not os.path.isfile(os.path.join(dataset.img_prefix, image)):
        return (
            f"{setting}: {path!r} lists {image!r}, which is not in {dataset.img_prefix!r} "
            "(data_prefix)"
        )
    return ""
