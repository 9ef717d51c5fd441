"""COCO's numbers of a detector: AP and AR over all classes and of each class.

The numbers are pycocotools' to the last digit. hotcoco computes the same ones, about a hundred
times as fast, and is taken where it is installed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from plugin_core.evaluation.comparison.numbering import class_names, number

# Metric → index of its IoU threshold (None: mean over 0.50:0.95) and area ("" is all)
PRECISIONS = {
    "AP": (None, ""),
    "AP50": (0, ""),
    "AP75": (5, ""),
    "APs": (None, "small"),
    "APm": (None, "medium"),
    "APl": (None, "large"),
}
# Metric → index of its threshold, area, and index of its number of detections an image
RECALLS = {
    "AR1": (None, "", 0),
    "AR10": (None, "", 1),
    "AR100": (None, "", 2),
    "ARs": (None, "small", 2),
    "ARm": (None, "medium", 2),
    "ARl": (None, "large", 2),
}
KEYPOINT_RECALLS = {
    "AR": (None, "", 0),
    "AR50": (0, "", 0),
    "AR75": (5, "", 0),
    "ARm": (None, "medium", 0),
    "ARl": (None, "large", 0),
}


def areas_of(iou_type: str) -> list[str]:
    """Names of COCO's areas in its order; "" is all. Keypoints of small objects are not rated."""
    return ["", "medium", "large"] if iou_type == "keypoints" else ["", "small", "medium", "large"]


def precisions_of(iou_type: str) -> dict[str, tuple[int | None, str]]:
    """The metrics of precision that COCO has for a type of IoU."""
    return {name: m for name, m in PRECISIONS.items() if m[1] in areas_of(iou_type)}


@dataclass(frozen=True)
class Accuracy:
    """COCO's numbers in percent; NaN where there is no object.

    Attributes:
        metrics: of all classes: metric → number.
        by_class: class → metric → number, in the order of the classes' ids.
    """

    metrics: Mapping[str, float]
    by_class: Mapping[str, Mapping[str, float]]


def accuracy(
    content: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    library: str | None = None,
) -> Accuracy:
    """Evaluate detections as COCO does.

    Args:
        content: of the annotation file.
        results: the detections, which may be none.
        iou_type: "bbox", "segm" or "keypoints".
        library: "hotcoco" or "pycocotools"; None for the faster one of those installed.
    """
    truth, detections = number(content, results, iou_type)
    precision, recall = evaluate(truth, detections, iou_type, library or fastest_library())
    return Accuracy(
        _metrics(precision, recall, iou_type),
        {
            name: _metrics(precision[:, :, k : k + 1], recall[:, k : k + 1], iou_type)
            for k, name in enumerate(class_names(content))
        },
    )


def fastest_library() -> str:
    """Name of the library that evaluates."""
    try:
        import hotcoco  # noqa: F401
    except ImportError:
        return "pycocotools"
    return "hotcoco"


def evaluate(
    truth: dict[str, Any], detections: list[dict[str, Any]], iou_type: str, library: str
) -> tuple[np.ndarray, np.ndarray]:
    """Run a library's evaluation of numbered records.

    Returns:
        precision, of shape (thresholds, 101 recalls, classes, areas, numbers of detections), and
        recall, of shape (thresholds, classes, areas, numbers of detections); -1 where there is no
        object.
    """
    coco_class, evaluation_class = _classes(library)

    def load(dataset: dict[str, Any]) -> Any:
        coco = coco_class()
        coco.dataset = dataset
        coco.createIndex()
        return coco

    with redirect_stdout(io.StringIO()):
        objects = load(truth)
        # pycocotools looks at the first detection
        found = objects.loadRes(detections) if detections else load({**truth, "annotations": []})
        evaluation = evaluation_class(objects, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _classes(library: str) -> tuple[Any, Any]:
    """Import a library's COCO and COCOeval, which both libraries spell alike."""
    if library == "hotcoco":
        import hotcoco

        return hotcoco.COCO, hotcoco.COCOeval
    from pycocotools import coco, cocoeval

    return coco.COCO, cocoeval.COCOeval


def _metrics(precision: np.ndarray, recall: np.ndarray, iou_type: str) -> dict[str, float]:
    """The numbers that pycocotools prints, from the same sums in the same order."""
    areas = areas_of(iou_type)
    metrics = {}
    for name, (threshold, area) in precisions_of(iou_type).items():
        thresholds = slice(None) if threshold is None else [threshold]
        metrics[name] = _mean(precision[thresholds][:, :, :, [areas.index(area)], [-1]])
    recalls = KEYPOINT_RECALLS if iou_type == "keypoints" else RECALLS
    for name, (threshold, area, limit) in recalls.items():
        thresholds = slice(None) if threshold is None else [threshold]
        metrics[name] = _mean(recall[thresholds][:, :, [areas.index(area)], [limit]])
    return metrics


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return 100 * float(np.mean(measured)) if measured.size else float("nan")
