"""Matching detections to objects once, by COCO's rules, so that images can be weighted afterwards.

For each image and class the detections, best score first, take the free object of highest IoU above
the threshold; objects inside the area in question go before ignored ones (crowds and those outside
it), and a crowd may be taken often. This is what pycocotools' ``COCOeval.evaluateImg`` computes.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from plugin_core.evaluation.comparison.numbering import class_names, number

TRUE, IGNORED = 1, 2  # what a detection was matched to; 0 is nothing


@dataclass(frozen=True)
class ClassMatches:
    """Detections of one class in all images, in descending order of scores.

    Shape notation: n detections, g objects, a areas, t IoU thresholds.

    Attributes:
        images: (n,) index of each detection's image.
        matched: (a, t, n) 0, TRUE or IGNORED.
        inside: (a, n) whether the detection's own area is in range.
        object_images: (g,) index of each object's image.
        counted: (a, g) whether an object is to be found: neither a crowd nor out of range.
    """

    images: np.ndarray
    matched: np.ndarray
    inside: np.ndarray
    object_images: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Detections of one detector matched to objects.

    Attributes:
        classes: in the order of the classes' ids.
        class_names: their names.
        num_images: number of images; an image's index is its place in the order of ids.
        iou_type: "bbox", "segm" or "keypoints".
    """

    classes: Sequence[ClassMatches]
    class_names: Sequence[str]
    num_images: int
    iou_type: str


def match(
    content: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: str
) -> Matches:
    """Match detections to the objects of an annotation file.

    Args:
        content: of the annotation file.
        results: the detections, which may be none.
        iou_type: "bbox", "segm" or "keypoints".
    """
    truth, detections = number(content, results, iou_type)
    params = Params(iou_type)
    ranges = np.array(params.areaRng)  # (a, 2)
    thresholds = np.minimum(params.iouThrs, 1 - 1e-10)
    overlaps = _overlaps(truth, iou_type)
    objects = defaultdict(list)
    for record in truth["annotations"]:
        objects[record["category_id"], record["image_id"]].append(record)
    # Best first within each image and class, and in the file's order where scores are equal
    place = np.array([(d["category_id"], d["image_id"]) for d in detections], int).reshape(-1, 2)
    scores = np.array([d["score"] for d in detections], float)
    order = np.lexsort((-scores, place[:, 1], place[:, 0]))
    keys, starts, counts = np.unique(place[order], axis=0, return_index=True, return_counts=True)
    sizes = np.minimum(counts, params.maxDets[-1])
    order = order[np.arange(len(order)) - np.repeat(starts, counts) < params.maxDets[-1]]
    place, scores = place[order], scores[order]
    sorted_detections = [detections[i] for i in order]
    areas = _areas(sorted_detections, iou_type)
    inside = (areas >= ranges[:, :1]) & (areas <= ranges[:, 1:])
    matched = np.zeros((len(ranges), len(thresholds), len(order)), np.uint8)
    for key, end, size in zip(map(tuple, keys.tolist()), sizes.cumsum(), sizes, strict=True):
        if there := objects.get(key):
            some = slice(end - size, end)
            ious = overlaps(sorted_detections[some], there)
            ignored = ~_counted(there, ranges, iou_type)
            crowds = np.array([o["iscrowd"] for o in there], bool)
            _match_image(ious, ignored, crowds, thresholds, matched[:, :, some])
    classes = []
    for k in range(1, len(truth["categories"]) + 1):
        there = [record for record in truth["annotations"] if record["category_id"] == k]
        first, last = np.searchsorted(place[:, 0], [k, k + 1])
        by_score = first + np.argsort(-scores[first:last], kind="stable")
        classes.append(
            ClassMatches(
                images=place[by_score, 1] - 1,
                matched=matched[:, :, by_score],
                inside=inside[:, by_score],
                object_images=np.array([record["image_id"] - 1 for record in there], int),
                counted=_counted(there, ranges, iou_type),
            )
        )
    return Matches(classes, class_names(content), len(truth["images"]), iou_type)


def _match_image(
    ious: np.ndarray,
    ignored: np.ndarray,
    crowds: np.ndarray,
    thresholds: np.ndarray,
    matched: np.ndarray,
) -> None:
    """Match the detections of one class in one image.

    Args:
        ious: (d, g) of detections, best score first, and objects.
        ignored: (a, g) objects that are not to be found.
        crowds: (g,)
        thresholds: (t,)
        matched: (a, t, d) takes the outcome.
    """
    num_objects = ious.shape[1]
    preferred = np.where(ignored, 0, num_objects)[:, None]  # (a, 1, g)
    free = np.ones((*matched.shape[:2], num_objects), bool)
    for d in np.flatnonzero(ious.max(axis=1) >= thresholds[0]):
        # By rank, as the last one is taken of objects with equal IoU
        rank = np.empty(num_objects, int)
        rank[np.argsort(ious[d], kind="stable")] = np.arange(num_objects)
        possible = free & (ious[d] >= thresholds[:, None])
        choice = np.where(possible, rank + preferred, -1)
        best = choice.argmax(axis=-1)  # (a, t)
        a, t = np.nonzero(choice.max(axis=-1) >= 0)
        g = best[a, t]
        matched[a, t, d] = np.where(ignored[a, g], IGNORED, TRUE)
        free[a, t, g] = crowds[g]


def _counted(objects: Sequence[Mapping[str, Any]], ranges: np.ndarray, iou_type: str) -> np.ndarray:
    areas = np.array([record["area"] for record in objects], float)
    counted = (areas >= ranges[:, :1]) & (areas <= ranges[:, 1:])
    counted &= ~np.array([record["iscrowd"] for record in objects], bool)
    if iou_type == "keypoints":
        counted &= np.array([record["num_keypoints"] for record in objects], float) != 0
    return counted


def _areas(detections: Sequence[Mapping[str, Any]], iou_type: str) -> np.ndarray:
    """Areas of detections in pixels, as pycocotools' ``loadRes`` takes them."""
    if not detections:
        return np.zeros(0)
    if iou_type == "segm":
        return np.array([coco_mask.area(d["segmentation"]) for d in detections], float)
    if iou_type == "bbox":
        boxes = np.array([d["bbox"] for d in detections], float)
        return boxes[:, 2] * boxes[:, 3]
    points = np.array([d["keypoints"] for d in detections], float)
    return np.ptp(points[:, 0::3], axis=1) * np.ptp(points[:, 1::3], axis=1)


def _overlaps(truth: dict[str, Any], iou_type: str) -> Any:
    """Return a function from detections and objects of one image and class to their IoUs."""
    if iou_type == "keypoints":
        evaluation = COCOeval(iouType="keypoints")

        def similarities(detections: Sequence[Any], objects: Sequence[Any]) -> np.ndarray:
            evaluation._gts, evaluation._dts = {(0, 0): objects}, {(0, 0): detections}
            return evaluation.computeOks(0, 0)

        return similarities
    field = "bbox" if iou_type == "bbox" else "segmentation"
    if iou_type == "segm":
        with redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
        for record in truth["annotations"]:
            record["segmentation"] = coco.annToRLE(record)

    def ious(detections: Sequence[Any], objects: Sequence[Any]) -> np.ndarray:
        crowds = [record["iscrowd"] for record in objects]
        return coco_mask.iou([d[field] for d in detections], [o[field] for o in objects], crowds)

    return ious
