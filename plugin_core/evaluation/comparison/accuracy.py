"""COCO's numbers of a detector: AP and AR over all classes and of each class.

They are pycocotools' to the last digit, from the matching that all of a comparison shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plugin_core.evaluation.comparison.detections import IOUS, RECALLS, Detections, Truth

# Metric → index of its IoU threshold (None: mean over 0.50:0.95) and size of the objects
PRECISION_METRICS = {
    "AP": (None, "all"),
    "AP50": (0, "all"),
    "AP75": (5, "all"),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}
LIMITS = (1, 10, 100)  # detections of a class in an image
# Metric → index of its threshold, size, and index of its limit
RECALL_METRICS: dict[str, tuple[int | None, str, int]] = {
    "AR1": (None, "all", 0),
    "AR10": (None, "all", 1),
    "AR100": (None, "all", 2),
    "ARs": (None, "small", 2),
    "ARm": (None, "medium", 2),
    "ARl": (None, "large", 2),
}
KEYPOINT_RECALL_METRICS: dict[str, tuple[int | None, str, int]] = {
    "AR": (None, "all", 0),
    "AR50": (0, "all", 0),
    "AR75": (5, "all", 0),
    "ARm": (None, "medium", 0),
    "ARl": (None, "large", 0),
}


def precisions_of(iou_type: str) -> dict[str, tuple[int | None, str]]:
    """The metrics of precision that COCO has for a type of IoU."""
    keypoints = iou_type == "keypoints"  # of small objects are not rated
    return {n: m for n, m in PRECISION_METRICS.items() if not keypoints or m[1] != "small"}


def recalls_of(iou_type: str) -> dict[str, tuple[int | None, str, int]]:
    """The metrics of recall that COCO has for a type of IoU."""
    return KEYPOINT_RECALL_METRICS if iou_type == "keypoints" else RECALL_METRICS


def limits_of(iou_type: str) -> tuple[int, ...]:
    """COCO's numbers of detections of a class in an image for recall."""
    return (20,) if iou_type == "keypoints" else LIMITS


@dataclass(frozen=True)
class Accuracy:
    """COCO's numbers in percent; NaN where there is no object.

    Attributes:
        metrics: of all classes: metric → number.
        by_class: class → metric → number, in the order of the classes' ids.
    """

    metrics: Mapping[str, float]
    by_class: Mapping[str, Mapping[str, float]]


def accuracy(detections: Detections) -> Accuracy:
    """Evaluate detections as COCO does."""
    precision, recall = evaluate(detections)
    truth = detections.truth
    return Accuracy(
        _metrics(precision, recall, truth),
        {
            name: _metrics(precision[:, :, k : k + 1], recall[:, k : k + 1], truth)
            for k, name in enumerate(truth.names)
        },
    )


def evaluate(detections: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Compute what ``COCOeval.accumulate`` does.

    Returns:
        precision, of shape (thresholds, 101 recalls, classes, sizes), and recall, of shape
        (thresholds, classes, sizes, numbers of detections); NaN where there is no object.
    """
    truth = detections.truth
    limits = limits_of(truth.iou_type)
    shape = (len(IOUS), len(truth.names), len(truth.sizes))
    precision = np.empty((len(IOUS), len(RECALLS), *shape[1:]))
    recall = np.empty((*shape, len(limits)))
    for a, size in enumerate(truth.sizes):
        objects = truth.objects_of_class(truth.wanted[a])
        for t, iou in enumerate(IOUS):
            match = detections.match(iou, size)
            precision[t, :, :, a] = detections.precision(match).T
            for m, limit in enumerate(limits):
                found = detections.category[match.right & (detections.rank < limit)]
                found = np.bincount(found, minlength=len(objects))
                recall[t, :, a, m] = np.where(objects > 0, found / np.maximum(objects, 1), np.nan)
    return precision, recall


def _metrics(precision: np.ndarray, recall: np.ndarray, truth: Truth) -> dict[str, float]:
    """The numbers that pycocotools prints, from the same sums in the same order."""
    sizes = [*truth.sizes]
    metrics = {}
    for name, (threshold, size) in precisions_of(truth.iou_type).items():
        thresholds = slice(None) if threshold is None else [threshold]
        metrics[name] = _mean(precision[thresholds][:, :, :, sizes.index(size)])
    for name, (threshold, size, limit) in recalls_of(truth.iou_type).items():
        thresholds = slice(None) if threshold is None else [threshold]
        metrics[name] = _mean(recall[thresholds][:, :, sizes.index(size), limit])
    return metrics


def _mean(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return 100 * float(np.mean(measured)) if measured.size else float("nan")
