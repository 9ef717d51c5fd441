"""Long-tailed recognition in MMPretrain: accuracy of classes with many, medium and few images.

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
from mmpretrain.registry import METRICS

from mm_plugins.mmpretrain.class_counts import NeedsClassCounts, check_counts
from plugin_core.evaluation.long_tail import check_thresholds, long_tail_accuracy


@METRICS.register_module()
class LongTailMetric(NeedsClassCounts, BaseMetric):
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
        self.counts = None if counts is None else check_counts(counts)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            self.results.append((int(sample["pred_label"]), int(sample["gt_label"])))

    def compute_metrics(self, results: list) -> dict[str, float]:
        if self.counts is None:
            raise ValueError(f"LongTailMetric: counts: {self.no_counts}")
        predicted, labels = np.array(results).T
        if labels.max() >= len(self.counts):
            raise ValueError(
                f"LongTailMetric: counts: must be of every class, got {len(self.counts)} numbers, "
                f"and an image is of class {labels.max()}"
            )
        return long_tail_accuracy(predicted, labels, self.counts, self.many, self.few)
