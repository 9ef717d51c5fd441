"""Long-tailed recognition in MMPretrain: loss, and accuracy of many, medium and few.

How many training images a class has is counted by a hook, for the loss and for the metric::

    custom_hooks = [dict(type="ClassCountsHook")]
    model = dict(head=dict(loss=dict(type="BalancedSoftmaxLoss")))
    val_evaluator = dict(type="LongTailMetric")

Lists of images (ImageNet-LT, iNaturalist 2018) are read by MMPretrain's ``CustomDataset``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmpretrain.models.losses import CrossEntropyLoss
from mmpretrain.registry import DATASETS, HOOKS, METRICS, MODELS
from torch import Tensor

from plugin_core.errors import ArgumentError
from plugin_core.evaluation.long_tail import check_thresholds, long_tail_accuracy
from plugin_core.methods.balanced_softmax import balanced_logits

_NO_COUNTS = (
    "must be the training images of each class, got None; add dict(type='ClassCountsHook') to "
    "custom_hooks, which counts them"
)


@MODELS.register_module()
class BalancedSoftmaxLoss(CrossEntropyLoss):
    """Cross entropy of the balanced softmax (:mod:`plugin_core.methods.balanced_softmax`).

    Args:
        counts: training images of each class; None where ``ClassCountsHook`` counts them.
        use_soft: labels are probabilities (N, K), as mixup makes them.
        **kwargs: ``reduction``, ``loss_weight`` and ``class_weight`` of ``CrossEntropyLoss``.

    Raises:
        ArgumentError: if a class has no image.
        ValueError: in training, if labels are missing their counts or are several for an image.
    """

    counted_by = "ClassCountsHook"

    def __init__(
        self, counts: Sequence[int] | None = None, use_soft: bool = False, **kwargs: Any
    ) -> None:
        if kwargs.pop("use_sigmoid", False):
            raise ArgumentError(
                "use_sigmoid", "must be False, as the loss is of a softmax over the classes"
            )
        super().__init__(use_soft=use_soft, **kwargs)
        self.counts = None if counts is None else _check_counts(counts)

    def set_counts(self, counts: Sequence[int]) -> None:
        """Take the training images of each class, unless the config has them."""
        if self.counts is None:
            self.counts = _check_counts(counts)

    def forward(self, cls_score: Tensor, label: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of logits (N, K) for labels (N,), or (N, K) with ``use_soft``."""
        if self.counts is None:
            raise ValueError(f"BalancedSoftmaxLoss: counts: {_NO_COUNTS}")
        if len(self.counts) != cls_score.shape[1]:
            raise ValueError(
                "BalancedSoftmaxLoss: counts: must be of the model's "
                f"{cls_score.shape[1]} classes, got {len(self.counts)} numbers"
            )
        if label.dim() > 1 and not (self.use_soft and (label.sum(1) - 1).abs().max() < 1e-3):
            raise ValueError(
                "BalancedSoftmaxLoss: labels must be one class for each image, or with "
                "use_soft=True probabilities that sum to 1; a multi-label head needs a loss such "
                "as AsymmetricLoss"
            )
        counts = cls_score.new_tensor(self.counts)
        loss: Tensor = super().forward(balanced_logits(cls_score, counts), label, *args, **kwargs)
        return loss


def _check_counts(counts: Any) -> list[int]:
    if isinstance(counts, str) or not isinstance(counts, Sequence) or not counts:
        raise ArgumentError("counts", f"must be the training images of each class, got {counts!r}")
    for k, n in enumerate(counts):
        if type(n) is not int or n < 1:
            raise ArgumentError(
                "counts", f"must be at least 1 training image for each class, got {n!r} for {k}"
            )
    return list(counts)


@METRICS.register_module()
class LongTailMetric(BaseMetric):
    """Top-1 accuracy of all images, and of classes with many, medium and few training images.

    As the field has it, a group's is the mean over its classes; "all" counts each image once.

    Args:
        many: a class with more training images is in "many".
        few: a class with fewer is in "few"; the rest is "medium".
        counts: training images of each class; None where ``ClassCountsHook`` counts them.
        collect_device: as of ``BaseMetric``.
        prefix: as of ``BaseMetric``.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    default_prefix = "long-tail"
    counted_by = "ClassCountsHook"

    def __init__(
        self,
        many: int = 100,
        few: int = 20,
        counts: Sequence[int] | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        check_thresholds(many, few)
        self.many = many
        self.few = few
        self.counts = None if counts is None else list(counts)

    def set_counts(self, counts: Sequence[int]) -> None:
        """Take the training images of each class, unless the config has them."""
        if self.counts is None:
            self.counts = list(counts)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            self.results.append((int(sample["pred_label"]), int(sample["gt_label"])))

    def compute_metrics(self, results: list) -> dict[str, float]:
        if self.counts is None:
            raise ValueError(f"LongTailMetric: counts: {_NO_COUNTS}")
        predicted, labels = np.array(results).T
        if labels.max() >= len(self.counts):
            raise ValueError(
                f"LongTailMetric: counts: must be of every class, got {len(self.counts)} numbers, "
                f"and an image is of class {labels.max()}"
            )
        return long_tail_accuracy(predicted, labels, self.counts, self.many, self.few)


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Counts the training images of each class, for ``BalancedSoftmaxLoss`` and ``LongTailMetric``.

    A repeated or resampled dataset counts as what it is made of. In a test the training set's
    annotations are read, too.
    """

    def before_train(self, runner: Runner) -> None:
        self._counts = count_classes(runner.train_dataloader.dataset, _num_classes(runner))
        for module in runner.model.modules():
            if isinstance(module, BalancedSoftmaxLoss):
                module.set_counts(self._counts)

    def before_val(self, runner: Runner) -> None:
        self._tell(runner, runner.val_loop.evaluator.metrics)

    def before_test(self, runner: Runner) -> None:
        self._tell(runner, runner.test_loop.evaluator.metrics)

    def _tell(self, runner: Runner, metrics: list[BaseMetric]) -> None:
        waiting = [m for m in metrics if isinstance(m, LongTailMetric) and m.counts is None]
        if waiting and not hasattr(self, "_counts"):
            dataset = DATASETS.build(runner.cfg.train_dataloader.dataset)
            self._counts = count_classes(dataset, _num_classes(runner))
        for metric in waiting:
            metric.set_counts(self._counts)


def _num_classes(runner: Runner) -> int:
    model: Any = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return int(getattr(getattr(model, "head", None), "num_classes", 0))


def count_classes(dataset: Any, num_classes: int = 0) -> list[int]:
    """Count the images of each class in a dataset of MMPretrain, whatever repeats it.

    Args:
        dataset: that has one label for each image, or is made of such.
        num_classes: at least as many are counted.

    Raises:
        ValueError: if a label is no class of the model.
    """
    parts = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if parts[0] is not None:
        counted = [count_classes(part, num_classes) for part in parts]
        return [sum(n) for n in zip(*counted, strict=True)]
    counts = np.bincount(dataset.get_gt_labels(), minlength=num_classes).tolist()
    if num_classes and len(counts) > num_classes:
        raise ValueError(
            f"train_dataloader.dataset: has an image of class {len(counts) - 1}, and "
            f"model.head.num_classes is {num_classes}"
        )
    return [int(n) for n in counts]
