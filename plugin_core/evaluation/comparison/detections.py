"""Detections beside the objects of their images, as arrays, and COCO's matching between them.

Overlaps and the matching are computed once for each training: overlaps between all detections and
objects of an image, whatever their classes, and matches at all thresholds and sizes of COCO. Both,
and average precision, follow COCOeval to the last digit.

Notation: G objects, D detections, P pairs, I images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plugin_core.errors import ArgumentError
from plugin_core.evaluation.comparison import overlaps
from plugin_core.evaluation.comparison.matching import choose, rank_in_group
from plugin_core.evaluation.comparison.numbering import class_names, sorted_ids

LEAST_OVERLAP = 0.1  # pairs below are not kept; TIDE calls them background
MOST_DETECTIONS = {
    "bbox": 100,
    "segm": 100,
    "keypoints": 20,
}  # of a class in an image, in COCO's AP
RECALLS = np.linspace(0, 1, 101)
IOUS = np.linspace(0.5, 0.95, 10)
SIZES = {  # of an object, in pixels; both ends included
    "all": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
}
KEYPOINT_SIZES = {name: SIZES[name] for name in ("all", "medium", "large")}


class Truth:
    """The objects of a COCO-format file.

    Args:
        content: of the file, from :func:`plugin_core.evaluation.coco_files.read_annotations`.
        iou_type: "bbox", "segm" or "keypoints".

    Attributes:
        images: I records, in the order of their ids.
        names: of the K classes, in the order of their ids.
        overlap: "IoU" or "OKS".
        sizes: COCO's sizes of objects, "all" first; keypoints of small ones are not rated.
        image, category: index of each object's image and class (G,).
        crowd: whether it stands for many (G,).
        area: in pixels (G,).
        shapes: box (4,) in x, y, width and height, compressed mask, or keypoints (17, 3) of each.
        boxes: of each object (G, 4).
        wanted: whether each object is to be found, by size (sizes, G).

    Raises:
        ArgumentError: if the IoU type is another.
    """

    def __init__(self, content: Mapping[str, Any], iou_type: str) -> None:
        if iou_type not in MOST_DETECTIONS:
            choices = "'bbox', 'segm' or 'keypoints'"
            raise ArgumentError("iou_type", f"must be {choices}, got {iou_type!r}")
        self.iou_type = iou_type
        self.overlap = "OKS" if iou_type == "keypoints" else "IoU"
        self.sizes = KEYPOINT_SIZES if iou_type == "keypoints" else SIZES
        self.image_index = {id: i for i, id in enumerate(sorted_ids(content["images"]))}
        self.images = sorted(content["images"], key=lambda image: self.image_index[image["id"]])
        self.category_index = {id: k for k, id in enumerate(sorted_ids(content["categories"]))}
        self.names = class_names(content)
        objects = content["annotations"]
        self.image = _integers(self.image_index[x["image_id"]] for x in objects)
        self.category = _integers(self.category_index[x["category_id"]] for x in objects)
        self.crowd = np.array([bool(x["iscrowd"]) for x in objects], bool)
        self.area = np.array([x["area"] for x in objects], float)
        self.shapes = overlaps.shapes_of_objects(content, iou_type)
        self.boxes = overlaps.numbers([x["bbox"] for x in objects], 4)
        wanted = ~self.crowd
        if iou_type == "keypoints":
            wanted &= np.array([x["num_keypoints"] for x in objects], float) != 0
        self.wanted = np.array([wanted & self.inside(self.area, name) for name in self.sizes])

    def inside(self, areas: np.ndarray, size: str) -> np.ndarray:
        """Tell whether areas are of a size."""
        low, high = self.sizes[size]
        return (areas >= low) & (areas <= high)

    @cached_property
    def objects_of_image(self) -> np.ndarray:
        """Number of objects in each image that are to be found (I,)."""
        return np.bincount(self.image[self.wanted[0]], minlength=len(self.images))

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
    """A detector's detections, by image and falling score; COCO's best 100 of a class in an image.

    Args:
        truth: objects of the same images.
        results: from :func:`plugin_core.evaluation.coco_files.read_results`.

    Attributes:
        image, category, score, area: of each detection (D,).
        rank: its place by score among those of its class in its image, from 0 on (D,).
        shapes: as of the objects.
        pair_detection, pair_object, pair_iou: pairs of a detection and an object of its image whose
            overlap is at least 0.1, by detection and then by object (P,).
    """

    def __init__(self, truth: Truth, results: Sequence[Mapping[str, Any]]) -> None:
        self.truth = truth
        image = _integers(truth.image_index[x["image_id"]] for x in results)
        category = _integers(truth.category_index[x["category_id"]] for x in results)
        score = np.fromiter((x["score"] for x in results), float, len(results))
        order = np.lexsort((-score, image))
        rank = rank_in_group((image * len(truth.names) + category)[order])
        best = rank < MOST_DETECTIONS[truth.iou_type]
        order, self.rank = order[best], rank[best]
        self.image, self.category, self.score = image[order], category[order], score[order]
        chosen = [results[i] for i in order.tolist()]
        self.shapes = overlaps.shapes_of_detections(chosen, truth.iou_type)
        self.area = overlaps.areas(self.shapes, truth.iou_type)
        self.pair_detection, self.pair_object, self.pair_iou = self._pairs()

    def _pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        truth = self.truth
        by_image = np.argsort(truth.image, kind="stable")
        limits = np.arange(len(truth.images) + 1)
        starts = np.searchsorted(truth.image[by_image], limits)
        own = np.searchsorted(self.image, limits)
        pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
        for image in np.flatnonzero((np.diff(own) > 0) & (np.diff(starts) > 0)).tolist():
            first, objects = own[image], by_image[starts[image] : starts[image + 1]]
            found = self.shapes[first : own[image + 1]]
            if truth.iou_type == "keypoints":
                there = (one[objects] for one in (truth.shapes, truth.boxes, truth.area))
                values = overlaps.similarities(found, *there)
            else:
                shapes = truth.shapes
                shapes = (
                    shapes[objects] if truth.iou_type == "bbox" else [shapes[g] for g in objects]
                )
                values = overlaps.overlaps(found, shapes, truth.crowd[objects])
            rows, columns = np.nonzero(values >= LEAST_OVERLAP)
            pairs.append((first + rows, objects[columns], values[rows, columns]))
        detections, others, values = map(np.concatenate, zip(*pairs, strict=True))
        return detections, others, values

    @cached_property
    def pair_same_class(self) -> np.ndarray:
        """Whether detection and object of a pair are of one class (P,)."""
        return self.category[self.pair_detection] == self.truth.category[self.pair_object]

    @cached_property
    def by_class(self) -> np.ndarray:
        """Detections by class and falling score (D,)."""
        return np.lexsort((-self.score, self.category))

    @cached_property
    def matched(self) -> tuple[np.ndarray, np.ndarray]:
        """COCO's matching of all sizes and thresholds.

        Returns:
            the detections that may have found an object, ascending (c,), and the object of each
            (sizes, ``IOUS``, c), -1 for none. All others found nothing.
        """
        pairs = self.pair_same_class & (self.pair_iou >= IOUS[0])
        group = self.image * len(self.truth.names) + self.category
        return choose(self._pairs_of(pairs), group, IOUS, self.truth.wanted, self.truth.crowd)

    def match(self, iou: float, size: str = "all", score_threshold: float = -np.inf) -> Match:
        """Match each detection with an object of its class, as COCOeval does.

        Crowds, and objects of another size, are taken only if nothing else is left; their
        detections are ignored. So is what found nothing and is of another size.

        Args:
            iou: least overlap, one of ``IOUS``.
            size: name of the size of the objects that count.
            score_threshold: detections below find nothing, and are ignored.
        """
        truth, s = self.truth, [*self.truth.sizes].index(size)
        candidates, objects = self.matched
        # A detection chooses after those of higher scores, so that the lower ones do not matter
        object_ = np.full(len(self.score), -1)
        object_[candidates] = objects[s, int(np.flatnonzero(np.isclose(IOUS, iou))[0])]
        low = self.score < score_threshold
        object_[low] = -1
        ignored = ~truth.inside(self.area, size) | low
        found = object_ >= 0
        ignored[found] = ~truth.wanted[s, object_[found]]
        return Match(object_, ignored, truth.wanted[s])

    def assign(self, pairs: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """Let detections choose among the objects of their image, whatever the classes.

        Args:
            pairs: those to choose from (P,).
            taken: objects that are taken from the start (G,).

        Returns:
            Index of the object of each detection (D,); -1 for none.
        """
        result, truth = np.full(len(self.score), -1), self.truth
        candidates, objects = choose(
            self._pairs_of(pairs), self.image, np.zeros(1), truth.wanted[:1], truth.crowd, taken
        )
        result[candidates] = objects[0, 0]
        return result

    def _pairs_of(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.pair_detection[chosen], self.pair_object[chosen], self.pair_iou[chosen]

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
        self, size: str = "all", images: Sequence[np.ndarray | None] = (None,)
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
    hits = np.flatnonzero(right)
    limits = np.searchsorted(hits, starts)
    for k in np.flatnonzero(objects):
        # Precision rises at true positives alone
        places = hits[limits[k] : limits[k + 1]] - starts[k] + 1
        found = np.arange(1, len(places) + 1)
        values = np.maximum.accumulate((found / (places + np.spacing(1)))[::-1])[::-1]
        reached = np.searchsorted(found / objects[k], RECALLS, side="left")
        result[k] = np.append(values, 0)[reached]
    return result


def mean_ap(*precisions: np.ndarray) -> float | None:
    """Average precisions (K, 101) over recalls, classes with objects and thresholds, in percent."""
    values = np.stack([values.T for values in precisions])  # summed in the order of COCOeval
    values = values[~np.isnan(values)]
    return 100 * float(values.mean()) if values.size else None


def _integers(values: Any) -> np.ndarray:
    return np.fromiter(values, np.int64)
