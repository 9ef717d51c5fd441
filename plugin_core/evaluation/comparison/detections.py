"""Detections beside the objects of their images, as arrays, and COCO's matching between them.

Overlaps are pycocotools'. They are computed once for each detector, between all detections and
objects of an image, whatever their classes. Matching and average precision follow COCOeval to the
last digit, on numpy alone.

Notation: G objects, D detections, P pairs, I images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as masks

from plugin_core.errors import ArgumentError
from plugin_core.evaluation.context_bias import load_ground_truth

LEAST_OVERLAP = 0.1  # pairs below are not kept; TIDE calls them background
MOST_DETECTIONS = 100  # of a class in an image, as in COCO's AP
RECALLS = np.linspace(0, 1, 101)
IOUS = np.linspace(0.5, 0.95, 10)
SIZES = {  # of an object, in pixels; both ends included
    "all": (0, 1e10),
    "small (below 32²)": (0, 32**2),
    "medium (32² to 96²)": (32**2, 96**2),
    "large (above 96²)": (96**2, 1e10),
}


class Truth:
    """The objects of a COCO-format file.

    Args:
        content: of the file, from :func:`plugin_core.evaluation.coco_files.read_annotations`.
        iou_type: "bbox" or "segm".

    Attributes:
        images: I records, in the order of their ids.
        names: of the K classes, in the order of their ids.
        image, category: index of each object's image and class (G,).
        crowd: whether it stands for many (G,).
        area: in pixels (G,).
        shapes: box (4,) in x, y, width and height, or compressed mask of each object.

    Raises:
        ArgumentError: if the IoU type is another.
    """

    def __init__(self, content: Mapping[str, Any], iou_type: str) -> None:
        if iou_type not in ("bbox", "segm"):
            raise ArgumentError("iou_type", f"must be 'bbox' or 'segm', got {iou_type!r}")
        self.iou_type = iou_type
        self.images = sorted(content["images"], key=_id)
        categories = sorted(content["categories"], key=_id)
        self.names = [category["name"] for category in categories]
        self.image_index = {image["id"]: i for i, image in enumerate(self.images)}
        self.category_index = {category["id"]: k for k, category in enumerate(categories)}
        objects = content["annotations"]
        self.image = _integers(self.image_index[x["image_id"]] for x in objects)
        self.category = _integers(self.category_index[x["category_id"]] for x in objects)
        self.crowd = np.array([bool(x["iscrowd"]) for x in objects], bool)
        self.area = np.array([x["area"] for x in objects], float)
        if iou_type == "bbox":
            self.shapes: Any = np.array([x["bbox"] for x in objects], float).reshape(-1, 4)
        else:
            to_mask = load_ground_truth(dict(content)).annToRLE
            self.shapes = [to_mask(x) for x in objects]

    @cached_property
    def objects_of_image(self) -> np.ndarray:
        """Number of objects in each image, without crowds (I,)."""
        return np.bincount(self.image[~self.crowd], minlength=len(self.images))

    def objects_of_class(self, counted: np.ndarray) -> np.ndarray:
        """Number of the objects of each class (K,) among those that are ``counted`` (G,)."""
        return np.bincount(self.category[counted], minlength=len(self.names))


@dataclass(frozen=True)
class Match:
    """Which object each detection found.

    Attributes:
        object: index of the object (D,); -1 for none.
        ignored: detections that count neither for nor against the detector (D,).
        counted: objects that are to be found (G,).
    """

    object: np.ndarray
    ignored: np.ndarray
    counted: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Whether each detection is a true positive (D,)."""
        return (self.object >= 0) & ~self.ignored

    @property
    def found(self) -> np.ndarray:
        """Whether a counted object is found (G,)."""
        found = np.zeros(len(self.counted), bool)
        found[self.object[self.right]] = True
        return found


class Detections:
    """A detector's detections, by image and falling score; the best 100 of a class in an image.

    Args:
        truth: objects of the same images.
        results: from :func:`plugin_core.evaluation.coco_files.read_results`.

    Attributes:
        image, category, score, area: of each detection (D,).
        shapes: as of the objects.
        pair_detection, pair_object, pair_iou: pairs of a detection and an object of its image whose
            overlap is at least 0.1, by detection and then by object (P,). With a crowd the overlap
            is the share of the detection that lies in it.
    """

    def __init__(self, truth: Truth, results: Sequence[Mapping[str, Any]]) -> None:
        self.truth = truth
        image = _integers(truth.image_index[x["image_id"]] for x in results)
        category = _integers(truth.category_index[x["category_id"]] for x in results)
        score = np.array([x["score"] for x in results], float)
        order = np.lexsort((-score, category, image))
        group = image[order] * len(truth.names) + category[order]
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        order = np.sort(order[rank < MOST_DETECTIONS])
        order = order[np.lexsort((-score[order], image[order]))]
        self.image, self.category, self.score = image[order], category[order], score[order]
        if truth.iou_type == "bbox":
            boxes = np.array([x["bbox"] for x in results], float).reshape(-1, 4)
            self.shapes: Any = boxes[order]
            self.area = self.shapes[:, 2] * self.shapes[:, 3]
        else:
            self.shapes = [results[i]["segmentation"] for i in order]
            self.area = np.asarray(masks.area(self.shapes), float) if self.shapes else np.zeros(0)
        self.pair_detection, self.pair_object, self.pair_iou = self._pairs()

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth = self.truth
        by_image = np.argsort(truth.image, kind="stable")
        limits = np.arange(len(truth.images) + 1)
        starts = np.searchsorted(truth.image[by_image], limits)
        own = np.searchsorted(self.image, limits)
        none = (np.zeros(0, int), np.zeros(0, int), np.zeros(0))
        pairs = [none]
        for image in np.flatnonzero((np.diff(own) > 0) & (np.diff(starts) > 0)):
            first, objects = own[image], by_image[starts[image] : starts[image + 1]]
            found = self.shapes[first : own[image + 1]]
            if truth.iou_type == "bbox":
                shapes = truth.shapes[objects]
            else:
                shapes = [truth.shapes[g] for g in objects]
            overlaps = masks.iou(found, shapes, truth.crowd[objects].astype(np.uint8))
            rows, columns = np.nonzero(overlaps >= LEAST_OVERLAP)
            pairs.append((first + rows, objects[columns], overlaps[rows, columns]))
        detections, others, overlaps = map(np.concatenate, zip(*pairs, strict=True))
        return detections, others, overlaps

    @cached_property
    def pair_same_class(self) -> np.ndarray:
        """Whether detection and object of a pair are of one class (P,)."""
        return self.category[self.pair_detection] == self.truth.category[self.pair_object]

    @cached_property
    def by_class(self) -> np.ndarray:
        """Detections by class and falling score (D,)."""
        return np.lexsort((-self.score, self.category))

    def match(
        self,
        iou: float,
        size: tuple[float, float] = SIZES["all"],
        score_threshold: float = -np.inf,
    ) -> Match:
        """Match each detection with an object of its class, as COCOeval does.

        Detections of an image choose in the order of their scores; each takes the free object that
        it overlaps most. Crowds, and objects of another size, are taken only if nothing else is
        left; their detections are ignored. So is what found nothing and is of another size.

        Args:
            iou: least overlap, from 0.1 to 1.
            size: smallest and largest area of the objects that count, in pixels.
            score_threshold: detections below find nothing, and are ignored.
        """
        truth, (low, high) = self.truth, size
        counted = ~truth.crowd & (truth.area >= low) & (truth.area <= high)
        pairs = self.pair_same_class & (self.pair_iou >= min(iou, 1 - 1e-10))
        if score_threshold > -np.inf:
            pairs &= self.score[self.pair_detection] >= score_threshold
        object_ = self.assign(pairs, counted)
        lost = (self.area < low) | (self.area > high) | (self.score < score_threshold)
        ignored = np.where(object_ >= 0, ~counted[object_], lost) if len(counted) else lost
        return Match(object_, ignored, counted)

    def assign(
        self, pairs: np.ndarray, counted: np.ndarray, taken: np.ndarray | None = None
    ) -> np.ndarray:
        """Let detections choose among objects, in the order of their scores.

        Args:
            pairs: those to choose from (P,).
            counted: objects to prefer (G,).
            taken: objects that are taken from the start (G,).

        Returns:
            Index of the object of each detection (D,); -1 for none.
        """
        result = np.full(len(self.score), -1)
        chosen = np.flatnonzero(pairs)
        detections, objects = self.pair_detection[chosen], self.pair_object[chosen]
        # Of equal overlaps COCOeval takes the last
        preference = (-objects, -self.pair_iou[chosen], ~counted[objects], detections)
        order = np.lexsort(preference)
        crowd = self.truth.crowd.tolist()
        free = [True] * len(crowd) if taken is None else (~taken).tolist()
        done = -1
        for detection, g in zip(detections[order].tolist(), objects[order].tolist(), strict=True):
            if detection != done and (free[g] or crowd[g]):
                result[detection] = g
                free[g] = False
                done = detection
        return result

    def precision(self, match: Match, images: np.ndarray | None = None) -> np.ndarray:
        """Return the precision of each class at recall 0, 0.01 … 1 (K, 101).

        Args:
            match: of the detections.
            images: whether to take each image (I,); all by default.

        Returns:
            0…1; NaN for a class without counted objects.
        """
        kept, counted = ~match.ignored, match.counted
        if images is not None:
            kept, counted = kept & images[self.image], counted & images[self.truth.image]
        order = self.by_class[kept[self.by_class]]
        objects = self.truth.objects_of_class(counted)
        return precision(self.category[order], match.right[order], objects)

    def ap(
        self,
        size: tuple[float, float] = SIZES["all"],
        images: Sequence[np.ndarray | None] = (None,),
    ) -> list[float | None]:
        """Return COCO's AP in percent over each of some groups of images; None without objects."""
        matches = [self.match(iou, size) for iou in IOUS]
        return [mean_ap(*(self.precision(match, group) for match in matches)) for group in images]


def precision(category: np.ndarray, right: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Return the precision of each class at recall 0, 0.01 … 1 (K, 101).

    Args:
        category: of each detection, ascending; the detections of a class by falling score.
        right: whether each is a true positive.
        objects: number of each class (K,).

    Returns:
        0…1; NaN for a class without objects.
    """
    result = np.full((len(objects), len(RECALLS)), np.nan)
    starts = np.searchsorted(category, np.arange(len(objects) + 1))
    for k in np.flatnonzero(objects):
        hits = np.cumsum(right[starts[k] : starts[k + 1]])
        values = hits / (np.arange(1, len(hits) + 1) + np.spacing(1))
        values = np.maximum.accumulate(values[::-1])[::-1]
        reached = np.searchsorted(hits / objects[k], RECALLS, side="left")
        result[k] = np.append(values, 0)[reached]
    return result


def mean_ap(*precisions: np.ndarray) -> float | None:
    """Average precisions (K, 101) over recalls, classes with objects and thresholds, in percent."""
    values = np.stack([values.T for values in precisions])  # summed in the order of COCOeval
    values = values[~np.isnan(values)]
    return 100 * float(values.mean()) if values.size else None


def detections_of(
    content: Mapping[str, Any],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    iou_type: str,
) -> dict[str, Detections]:
    """Lay the results of named detectors beside one ground truth.

    Raises:
        ArgumentError: if the IoU type is neither "bbox" nor "segm", or there is no detector.
    """
    if not results:
        raise ArgumentError("results", "must name at least one detector, got none")
    truth = Truth(content, iou_type)
    return {name: Detections(truth, detections) for name, detections in results.items()}


def _id(record: Mapping[str, Any]) -> tuple[bool, Any]:
    """Return a key that sorts by id, numbers before texts."""
    return isinstance(record["id"], str), record["id"]


def _integers(values: Any) -> np.ndarray:
    return np.fromiter(values, np.int64)
