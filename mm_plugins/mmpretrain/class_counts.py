"""How many training images each class has, which a hook counts for losses and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS

from plugin_core.errors import ArgumentError


class NeedsClassCounts:
    """Base of a loss or a metric that must know the training images of each class."""

    counted_by = "ClassCountsHook"
    no_counts = (
        "must be the training images of each class, got None; add dict(type='ClassCountsHook') to "
        "custom_hooks, which counts those of train_dataloader"
    )
    counts: list[int] | None

    def set_counts(self, counts: Sequence[int]) -> None:
        """Take the training images of each class, unless the config has them."""
        if self.counts is None:
            self.counts = check_counts(counts)


def check_counts(counts: Any) -> list[int]:
    """Return the training images of each class; raise ArgumentError if they are no such list."""
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not counts:
        raise ArgumentError("counts", f"must be the training images of each class, got {counts!r}")
    for k, n in enumerate(counts):
        if type(n) is not int or n < 0:
            raise ArgumentError(
                "counts", f"must be at least 0 training images for each class, got {n!r} for {k}"
            )
    return list(counts)


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Counts the training images of each class, for ``BalancedSoftmaxLoss`` and ``LongTailMetric``.

    A repeated or resampled dataset counts as what it is made of. In a test the training set's
    annotations are read, too.

    Raises:
        ValueError: if there is no training set, or an image of it has several labels or one that is
            no class of the model.
    """

    def before_train(self, runner: Runner) -> None:
        self._counts = count_classes(runner.train_dataloader.dataset, _num_classes(runner))
        self._tell(runner, runner.model.modules())

    def before_val(self, runner: Runner) -> None:
        self._tell(runner, runner.val_loop.evaluator.metrics)

    def before_test(self, runner: Runner) -> None:
        self._tell(runner, runner.test_loop.evaluator.metrics)

    def _tell(self, runner: Runner, parts: Iterable[Any]) -> None:
        waiting = [p for p in parts if isinstance(p, NeedsClassCounts) and p.counts is None]
        if waiting and not hasattr(self, "_counts"):
            loader = runner.cfg.get("train_dataloader")
            if loader is None:
                raise ValueError(f"{type(waiting[0]).__name__}: counts: {waiting[0].no_counts}")
            self._counts = count_classes(DATASETS.build(loader.dataset), _num_classes(runner))
        for part in waiting:
            part.set_counts(self._counts)


def _num_classes(runner: Runner) -> int:
    model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return int(getattr(getattr(model, "head", None), "num_classes", 0))


def count_classes(dataset: Any, num_classes: int = 0) -> list[int]:
    """Count the images of each class in a dataset of MMPretrain, whatever repeats it.

    Args:
        dataset: that has one label for each image, or is made of such.
        num_classes: at least as many are counted.

    Raises:
        ValueError: if an image has several labels, or one that is no class of the model.
    """
    parts = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if parts[0] is not None:
        counted = [count_classes(part, num_classes) for part in parts]
        return [sum(n) for n in zip_longest(*counted, fillvalue=0)]
    labels = [dataset.get_data_info(i)["gt_label"] for i in range(len(dataset))]
    several = next((label for label in labels if np.ndim(label)), None)
    if several is not None:
        raise ValueError(
            "train_dataloader.dataset: each image must have one label to be counted, got "
            f"{list(several)}"
        )
    counts = np.bincount(np.array(labels, dtype=int), minlength=num_classes).tolist()
    if num_classes and len(counts) > num_classes:
        raise ValueError(
            f"train_dataloader.dataset: has an image of class {len(counts) - 1}, and "
            f"model.head.num_classes is {num_classes}"
        )
    return [int(n) for n in counts]
