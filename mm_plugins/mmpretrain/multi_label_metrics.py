"""The numbers of multi-label papers, which MMPretrain's metrics define otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmpretrain.evaluation.metrics import AveragePrecision
from mmpretrain.evaluation.metrics.voc_multi_label import VOCMetricMixin
from mmpretrain.registry import METRICS
from torch import Tensor

from plugin_core.errors import ArgumentError, check_positive_int


@METRICS.register_module()
class MultiLabelBenchmark(AveragePrecision):
    """mAP, CP, CR, CF1, OP, OR and OF1, of all labels and of the top 3 of an image, in percent.

    With tp, p and t the numbers of an image set's right, predicted and true labels of class k:

        CP = mean_k tp_k / p_k     CR = mean_k tp_k / t_k     CF1 = 2 CP CR / (CP + CR)
        OP = sum tp / sum p        OR = sum tp / sum t        OF1 = 2 OP OR / (OP + OR)

    A quotient with 0 below is 0. Labels with a score of at least ``thr`` are predicted. For
    ``…_top3`` they must also be among the 3 highest of their image, as in ML-GCN (Chen et al.,
    CVPR 2019) and those who compare with it. AP is the area below the precision-recall curve, whose
    precision is made falling, as in PASCAL VOC from 2010 on and in IDA's public reproduction. mAP
    is its mean over the classes with a true label. ML-GCN's code counts a class without a
    predicted label as 1 in OP's sum p.

    MMPretrain's ``MultiLabelMetric`` has CP, CR, OP, OR and OF1 as ``precision``, ``recall`` and
    ``f1-score`` with ``average`` "macro" and "micro". Its macro ``f1-score`` is the mean of the
    classes' F1 and not CF1, its top 3 have no threshold, and ``AveragePrecision`` takes precision
    as it is.

    Args:
        thr: score from which on a label is predicted, 0 … 1.
        topk: number of labels, 3 in papers; of fewer classes all are among them.
        **kwargs: of mmengine's ``BaseMetric``.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    def __init__(self, thr: float = 0.5, topk: int = 3, **kwargs: Any) -> None:
        if type(thr) not in (int, float) or not 0 <= thr <= 1:
            raise ArgumentError("thr", f"must be from 0 to 1, got {thr!r}")
        check_positive_int(topk=topk)
        super().__init__(**kwargs)
        self.thr = thr
        self.topk = topk

    def compute_metrics(self, results: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Compute the numbers from the images' ``pred_score`` and ``gt_score`` (K,).

        A ``gt_score`` of -1 does not count, neither as true nor as predicted.
        """
        scores = torch.stack([result["pred_score"] for result in results]).double()
        truth = torch.stack([result["gt_score"] for result in results])
        counts = truth > -1
        predicted = (scores >= self.thr) & counts
        top = scores.topk(min(self.topk, scores.shape[1]), dim=1).indices
        among_top = torch.zeros_like(predicted).scatter(1, top, True)
        columns = zip(scores.T, truth.T, counts.T, strict=True)
        aps = [_average_precision(s[c], t[c] > 0) for s, t, c in columns if (t > 0).any()]
        found = {"mAP": 100 * sum(aps) / len(aps) if aps else 0.0}
        found |= _precision_and_recall(predicted, truth > 0, "")
        found |= _precision_and_recall(predicted & among_top, truth > 0, f"_top{self.topk}")
        return found


@METRICS.register_module()
class VOCMultiLabelBenchmark(VOCMetricMixin, MultiLabelBenchmark):
    """:class:`MultiLabelBenchmark` that knows PASCAL VOC's difficult objects.

    A class of which an image has difficult objects alone does not count in it. That is VOC's own
    evaluation. IDA's public reproduction takes such a class as absent, as
    :class:`MultiLabelBenchmark` does. The pipeline's ``PackInputs`` needs ``gt_label_difficult``
    among its ``meta_keys``.

    Args:
        difficult_as_positive: None leaves these classes out, True takes them as present, False as
            absent.
        **kwargs: of :class:`MultiLabelBenchmark`.
    """


def _average_precision(scores: Tensor, is_true: Tensor) -> float:
    ranked = is_true[scores.argsort(descending=True, stable=True)]
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1, device=ranked.device)
    highest_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float(highest_from_here[ranked].mean())


def _precision_and_recall(predicted: Tensor, truth: Tensor, suffix: str) -> dict[str, float]:
    right, of_class, true = (
        labels.sum(0).double() for labels in (predicted & truth, predicted, truth)
    )
    found = {}
    for letter, numbers in (
        ("C", [(right / n.clamp(min=1)).mean() for n in (of_class, true)]),
        ("O", [right.sum() / n.sum().clamp(min=1) for n in (of_class, true)]),
    ):
        precision, recall = (100 * float(number) for number in numbers)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        for name, value in (("P", precision), ("R", recall), ("F1", f1)):
            found[f"{letter}{name}{suffix}"] = value
    return found
