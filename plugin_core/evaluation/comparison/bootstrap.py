"""Resampling a detector's AP and AR: the images are drawn anew, the detections matched once.

A resample draws as many images as there are, with replacement; all detectors get the same ones. It
is a weight for each image: with weights w, precision and recall at a detection are sums of w over
the detections before it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from plugin_core.evaluation.comparison.accuracy import limits_of, precisions_of, recalls_of
from plugin_core.evaluation.comparison.detections import RECALLS, Detections

TRUE, IGNORED = 1, 2  # what a detection was matched to; 0 is nothing
CHUNK = 1 << 20  # numbers in the largest array of a chunk of resamples: it stays in the cache


@dataclass(frozen=True)
class ClassMatches:
    """Detections of one class in all images, in descending order of scores.

    Shape notation: n detections, e of them near an object, g objects, a sizes, t thresholds.

    Attributes:
        images: (n,) index of each detection's image.
        inside: (a, n) whether the detection's own area is in range.
        near: (e,) indices of the detections that may have found an object, ascending.
        matched: (a, t, e) what each of these found: 0, TRUE or IGNORED.
        rank: (e,) their places by score in their image, from 0 on.
        object_images: (g,) index of each object's image.
        counted: (a, g) whether an object is to be found.
    """

    images: np.ndarray
    inside: np.ndarray
    near: np.ndarray
    matched: np.ndarray
    rank: np.ndarray
    object_images: np.ndarray
    counted: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Detections of one training matched to objects.

    Attributes:
        classes: in the order of the classes' ids.
        sizes: names of the sizes of objects.
        iou_type: "bbox", "segm" or "keypoints".
    """

    classes: Sequence[ClassMatches]
    sizes: Sequence[str]
    iou_type: str


def matches_of(detections: Detections) -> Matches:
    """Sort what detections found by their classes."""
    truth, (candidates, objects) = detections.truth, detections.matched
    inside = np.array([truth.inside(detections.area, size) for size in truth.sizes])
    matched = np.zeros(objects.shape, np.uint8)
    for a, wanted in enumerate(truth.wanted):
        found = objects[a] >= 0
        matched[a][found] = np.where(wanted[objects[a][found]], TRUE, IGNORED)
    place = np.full(len(detections.score), -1)  # among the candidates
    place[candidates] = np.arange(len(candidates))
    order = detections.by_class
    limits = np.searchsorted(detections.category[order], np.arange(len(truth.names) + 1))
    classes = []
    for k in range(len(truth.names)):
        of_class = order[limits[k] : limits[k + 1]]
        near = np.flatnonzero(place[of_class] >= 0)
        there = np.flatnonzero(truth.category == k)
        classes.append(
            ClassMatches(
                images=detections.image[of_class],
                inside=inside[:, of_class],
                near=near,
                matched=matched[:, :, place[of_class[near]]],
                rank=detections.rank[of_class[near]],
                object_images=truth.image[there],
                counted=truth.wanted[:, there],
            )
        )
    return Matches(classes, [*truth.sizes], truth.iou_type)


def draw_weights(num_images: int, resamples: int, seed: int = 0) -> np.ndarray:
    """Draw how often each image is in each resample.

    Returns:
        of shape (1 + resamples, num_images); the first row is all ones, the images as they are.
    """
    weights = np.ones((1 + resamples, num_images), np.float32)
    generator = np.random.default_rng(seed)
    for row in weights[1:]:
        drawn = generator.integers(num_images, size=num_images)
        row[:] = np.bincount(drawn, minlength=num_images)
    return weights


def rows_of(iou_type: str) -> list[str]:
    """Names of the metrics that are resampled, for a type of IoU."""
    return [*precisions_of(iou_type), *recalls_of(iou_type)]


def resampled(matches: Matches, weights: np.ndarray, workers: int | None = None) -> np.ndarray:
    """Compute the metrics of one training in each resample.

    Args:
        matches: of its detections.
        weights: of shape (b, images), whole numbers.
        workers: number of threads; None for that of the cores.

    Returns:
        of shape (m + k, b), in percent: the m metrics of :func:`rows_of`, which are means over the
        classes, and the AP of each of the k classes. NaN where a resample has no object.
    """
    metrics = precisions_of(matches.iou_type)
    recalls = recalls_of(matches.iou_type)
    limits = limits_of(matches.iou_type)
    values = np.empty((len(metrics) + len(recalls), len(matches.classes), len(weights)))

    def measure(k: int, some: slice) -> None:
        precision, recall = weighted(matches.classes[k], weights[some], limits)
        of_metrics = [
            *(
                (threshold, precision[matches.sizes.index(size)])
                for threshold, size in metrics.values()
            ),
            *(
                (threshold, recall[matches.sizes.index(size), limit])
                for threshold, size, limit in recalls.values()
            ),
        ]
        for m, (threshold, one) in enumerate(of_metrics):
            values[m, k, some] = one.mean(0) if threshold is None else one[threshold]

    tasks = []
    for k, one in enumerate(matches.classes):
        step = max(16, CHUNK // max(1, len(one.images)))
        tasks += [(k, slice(i, i + step)) for i in range(0, len(weights), step)]
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(measure, *zip(*tasks, strict=True)))
    present = ~np.isnan(values)
    total = np.where(present, values, 0).sum(axis=1)
    number = present.sum(axis=1)
    means = np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
    return 100 * np.concatenate([means, values[rows_of(matches.iou_type).index("AP")]])


def images_with_objects(matches: Matches) -> np.ndarray:
    """Count the images that each row of :func:`resampled` is measured on.

    Returns:
        of shape (m + k,)
    """

    def count(classes: Sequence[ClassMatches], size: str) -> int:
        a = matches.sizes.index(size)
        return len(np.unique(np.concatenate([k.object_images[k.counted[a]] for k in classes])))

    sizes = [size for _, size in precisions_of(matches.iou_type).values()]
    sizes += [size for _, size, _ in recalls_of(matches.iou_type).values()]
    return np.array(
        [count(matches.classes, size) for size in sizes]
        + [count([one], "all") for one in matches.classes]
    )


def weighted(
    matches: ClassMatches, weights: np.ndarray, limits: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute a class's AP and AR of each size and IoU threshold, with images weighted.

    Precision rises only at true positives, so all is computed there. The sums of weights of the
    detections between them are taken once for all thresholds.

    Args:
        matches: of the class.
        weights: of shape (b, images), whole numbers.
        limits: numbers of detections in an image, for the recalls.

    Returns:
        precision of shape (sizes, thresholds, b), and recall of shape (sizes, limits, thresholds,
        b), 0 to 1; NaN where the weighted images have no object.
    """
    num_sizes, num_thresholds, _ = matches.matched.shape
    precisions = np.zeros((num_sizes, num_thresholds, len(weights)))
    recalls = np.zeros((num_sizes, len(limits), num_thresholds, len(weights)))
    of_objects = weights.take(matches.object_images, axis=1)
    for a in range(num_sizes):
        num_objects = of_objects[:, matches.counted[a]].sum(axis=1, dtype=float)
        none = num_objects == 0
        precisions[a, :, none] = recalls[a, :, :, none] = np.nan
        matched = matches.matched[a]
        chosen = np.flatnonzero(matched.any(axis=0))  # matched at a threshold at least
        if not len(chosen):
            continue
        matched, events = matched[:, chosen], matches.near[chosen]
        num_objects = np.maximum(num_objects, 1)[:, None]
        # Weights of the detections up to each event: in range, or an event themselves
        counts = matches.inside[a, : events[-1] + 1].copy()
        counts[events] = True
        rows = np.flatnonzero(counts)
        starts = np.r_[0, np.searchsorted(rows, events[:-1]) + 1]
        between = np.add.reduceat(weights.take(matches.images[rows], axis=1), starts, axis=1)
        total = np.cumsum(between, axis=1, dtype=float)
        of_events = weights.take(matches.images[events], axis=1)
        for m, limit in enumerate(limits):
            true = (matched == TRUE) & (matches.rank[chosen] < limit)
            recall = of_events @ true.T.astype(weights.dtype) / num_objects
            recalls[a, m] = np.where(none, np.nan, recall.T)
        outside = ~matches.inside[a, events]
        for t in range(num_thresholds):
            state = matched[t]
            true = np.flatnonzero(state == TRUE)
            if not len(true):
                continue
            detected = total.take(true, axis=1)
            # What COCO leaves out at this threshold
            left_out = np.flatnonzero((state == IGNORED) | ((state == 0) & outside))
            if len(left_out):
                sums = np.zeros((len(weights), len(left_out) + 1), total.dtype)
                np.cumsum(of_events.take(left_out, axis=1), axis=1, out=sums[:, 1:])
                detected -= sums.take(np.searchsorted(left_out, true), axis=1)
            found = np.cumsum(of_events.take(true, axis=1), axis=1, dtype=float)
            detected += np.spacing(1.0)
            precision = np.divide(found, detected, out=detected)
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            reached = _count_recalls(np.divide(found, num_objects, out=found))
            # Each precision counts as often as its true positive reaches a new one of the recalls
            ap = np.einsum("be,be->b", best, reached)
            ap -= np.einsum("be,be->b", best[:, 1:], reached[:, :-1])
            precisions[a, t] = np.where(none, np.nan, ap / len(RECALLS))
    return precisions, recalls


def _count_recalls(recall: np.ndarray) -> np.ndarray:
    """Count COCO's 101 recalls that are not above ``recall``, as floating point has them."""
    scaled = 100 * recall
    count = np.floor(scaled + 1e-9)
    scaled -= count
    exact = np.flatnonzero(scaled < 1e-7)
    step = count.flat[exact]
    count.flat[exact] = step - (RECALLS[step.astype(int)] > recall.flat[exact])
    return count + 1
