"""The numbers of multi-label papers against a count by hand, and where MMPretrain's differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mmpretrain.evaluation import AveragePrecision, MultiLabelMetric
from mmpretrain.registry import METRICS
from mmpretrain.structures import DataSample
from torch import Tensor

from plugin_core.errors import ArgumentError


def evaluate(scores: Tensor, truth: Tensor, **arguments: Any) -> dict[str, float]:
    metric = METRICS.build({"type": "MultiLabelBenchmark", **arguments})
    samples = [
        DataSample().set_pred_score(s).set_gt_score(t) for s, t in zip(scores, truth, strict=True)
    ]
    metric.process(None, [sample.to_dict() for sample in samples])
    found = metric.evaluate(len(samples))
    return {name.removeprefix("multi-label/"): value for name, value in found.items()}


def drawn() -> tuple[Tensor, Tensor]:
    truth = (torch.rand(40, 6) < torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.8])).float()
    truth[:, 2] = 0  # a class that no image has
    scores = (0.35 * torch.randn(40, 6) + 0.35 * truth + 0.3).clamp(0.01, 0.99)
    scores[:, 4] = 0.1  # and one that is never predicted
    return scores + 1e-4 * torch.rand(40, 6), truth


def counted(scores: np.ndarray, truth: np.ndarray, top: int | None) -> dict[str, float]:
    """The definitions, label by label."""
    images, classes = scores.shape
    right, predicted, true = np.zeros(classes), np.zeros(classes), np.zeros(classes)
    for i in range(images):
        rank = sorted(range(classes), key=lambda k: -scores[i, k])
        for k in range(classes):
            says = scores[i, k] >= 0.5 and (top is None or k in rank[:top])
            predicted[k] += says
            true[k] += truth[i, k]
            right[k] += says and truth[i, k] == 1

    def ratio(a: float, b: float) -> float:
        return a / b if b else 0.0

    cp = 100 * np.mean([ratio(right[k], predicted[k]) for k in range(classes)])
    cr = 100 * np.mean([ratio(right[k], true[k]) for k in range(classes)])
    op, or_ = 100 * ratio(right.sum(), predicted.sum()), 100 * ratio(right.sum(), true.sum())
    found = {"CP": cp, "CR": cr, "CF1": ratio(2 * cp * cr, cp + cr)}
    found |= {"OP": op, "OR": or_, "OF1": ratio(2 * op * or_, op + or_)}
    return {f"{name}{f'_top{top}' if top else ''}": value for name, value in found.items()}


def area_below_curve(scores: np.ndarray, truth: np.ndarray) -> float:
    """AP of a class: at each recall the highest precision that is reached from there on."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    points, right = [], 0
    for n, i in enumerate(order, start=1):
        right += truth[i] == 1
        points.append((right / truth.sum(), right / n))
    recalls = [m / truth.sum() for m in range(1, int(truth.sum()) + 1)]
    best = [max(p for r, p in points if r >= recall - 1e-9) for recall in recalls]
    return 100 * float(np.mean(best))


def test_numbers_equal_a_brute_force_count():
    for seed in range(5):
        torch.manual_seed(seed)
        scores, truth = drawn()
        s, t = scores.double().numpy(), truth.double().numpy()
        expected = counted(s, t, None) | counted(s, t, 3)
        expected["mAP"] = np.mean([area_below_curve(s[:, k], t[:, k]) for k in (0, 1, 3, 4, 5)])
        found = evaluate(scores, truth)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-4), name


def test_two_images_worked_out_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.6, 0.2, 0.4, 0.1]])
    truth = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0]])
    found = evaluate(scores, truth)
    # Predicted: 0, 1, 2, 3 and 0; right: 0, 2, 3 and 0.
    assert found["CP"] == 75 and found["CR"] == 75 and found["CF1"] == 75
    assert (found["OP"], found["OR"]) == (80, 80)
    # Of the top 3 the first image loses label 3, and the second has one above the threshold.
    assert found["CP_top3"] == 50 and found["OP_top3"] == 75 and found["OR_top3"] == 60
    # Class 1 is found second of two: its precision is 1/2.
    assert found["mAP"] == pytest.approx((100 + 50 + 100 + 100) / 4)


def test_what_agrees_with_mmpretrains_metrics_and_what_does_not():
    scores, truth = drawn()
    found = evaluate(scores, truth)
    cp, cr, mean_f1, _ = MultiLabelMetric.calculate(scores, truth, thr=0.5)
    op, or_, of1, _ = MultiLabelMetric.calculate(scores, truth, thr=0.5, average="micro")
    for name, value in {"CP": cp, "CR": cr, "OP": op, "OR": or_, "OF1": of1}.items():
        assert found[name] == pytest.approx(value.item(), abs=1e-3)
    assert abs(found["CF1"] - mean_f1.item()) > 0.5  # a mean of F1, not F1 of means
    of_top = MultiLabelMetric.calculate(scores, truth, topk=3, average="micro")
    assert found["OP_top3"] > of_top[0].item() + 0.5  # it has no threshold
    present = truth.sum(0) > 0
    plain = AveragePrecision.calculate(scores[:, present], truth[:, present])
    assert found["mAP"] > plain.item() + 0.1  # it takes precision as it is


def test_unknown_labels_count_neither_as_true_nor_as_predicted():
    scores, truth = drawn()
    with_unknown = torch.cat((scores, torch.ones(1, 6))), torch.cat((truth, -torch.ones(1, 6)))
    assert evaluate(*with_unknown) == evaluate(scores, truth)


@pytest.mark.parametrize(("option", "ap"), [(None, 100.0), (True, 100.0), (False, 50.0)])
def test_difficult_objects_of_voc_are_left_out_or_count_as_told(option, ap):
    metric = METRICS.build({"type": "VOCMultiLabelBenchmark", "difficult_as_positive": option})
    for score, labels, difficult in ((0.9, [], [0]), (0.8, [0], [0]), (0.1, [], [])):
        sample = DataSample().set_pred_score([score]).set_gt_label(labels)
        metric.process(None, [{**sample.to_dict(), "gt_label_difficult": difficult}])
    assert metric.evaluate(3)["multi-label/mAP"] == pytest.approx(ap)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thr": 2}, "thr must be from 0 to 1, got 2"),
        ({"thr": "a"}, "thr must be from 0 to 1, got 'a'"),
        ({"topk": 0}, "topk must be a positive integer, got 0"),
    ],
)
def test_bad_argument_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        METRICS.build({"type": "MultiLabelBenchmark", **arguments})
