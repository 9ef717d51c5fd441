"""Resampling a detector's AP and AR: the images are drawn anew, the detections matched once.

A resample draws as many images as there are, with replacement; all detectors get the same ones. It
is a weight for each image: with weights w, precision and recall at a detection are sums of w over
the detections before it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from plugin_core.evaluation.comparison.accuracy import limits_of, precisions_of, recalls_of
from plugin_core.evaluation.comparison.detections import RECALLS, Detections

TRUE, IGNORED = 1, 2  # what a detection was matched to; 0 is nothing
CHUNK = 1 << 21  # numbers in the largest array of a chunk of resamples


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
    """Draw how often each image is in each resample (resamples, num_images)."""
    weights = np.empty((resamples, num_images), np.float32)
    generator = np.random.default_rng(seed)
    for row in weights:
        drawn = generator.integers(num_images, size=num_images)
        row[:] = np.bincount(drawn, minlength=num_images)
    return weights


def rows_of(iou_type: str) -> list[str]:
    """Names of the metrics that are resampled, for a type of IoU."""
    return [*precisions_of(iou_type), *recalls_of(iou_type)]


def resampled(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Compute the metrics of one training in each resample.

    Args:
        matches: of its detections.
        weights: of shape (b, images), whole numbers. Their type is that of the computation: 32 bits
            are enough for a spread and twice as fast; with 64 bits, weights of 1 give the accuracy.

    Returns:
        of shape (m + k, b), in percent: the m metrics of :func:`rows_of`, which are means over the
        classes, and the AP of each of the k classes. NaN where a resample has no object.
    """
    limits = limits_of(matches.iou_type)
    sizes = {size: a for a, size in enumerate(matches.sizes)}
    precisions, recalls = precisions_of(matches.iou_type), recalls_of(matches.iou_type)
    values = np.empty((len(precisions) + len(recalls), len(matches.classes), len(weights)))
    by_image = np.ascontiguousarray(weights.T)
    for k, one in enumerate(matches.classes):
        step = max(64, CHUNK // max(1, len(one.near)))
        for some in (slice(i, i + step) for i in range(0, len(weights), step)):
            precision, recall = weighted(one, by_image[:, some], limits)
            of_metrics = [(t, precision[sizes[size]]) for t, size in precisions.values()]
            of_metrics += [(t, recall[sizes[size], limit]) for t, size, limit in recalls.values()]
            for m, (t, values_of_it) in enumerate(of_metrics):
                values[m, k, some] = values_of_it.mean(0) if t is None else values_of_it[t]
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
        weights: of shape (images, b), whole numbers.
        limits: numbers of detections in an image, for the recalls.

    Returns:
        precision of shape (sizes, thresholds, b), and recall of shape (sizes, limits, thresholds,
        b), 0 to 1; NaN where the weighted images have no object.
    """
    num_sizes, num_thresholds, _ = matches.matched.shape
    num_resamples = weights.shape[1]
    precisions = np.zeros((num_sizes, num_thresholds, num_resamples))
    recalls = np.zeros((num_sizes, len(limits), num_thresholds, num_resamples))
    for a in range(num_sizes):
        num_objects = weights[matches.object_images[matches.counted[a]]].sum(axis=0)
        none = num_objects == 0
        precisions[a][:, none] = recalls[a][..., none] = np.nan
        num_objects[none] = 1
        chosen = np.flatnonzero(matches.matched[a].any(axis=0))  # matched at a threshold at least
        if not len(chosen):
            continue
        matched, events = matches.matched[a][:, chosen], matches.near[chosen]
        of_events = weights[matches.images[events]]
        for m, limit in enumerate(limits):
            true = (matched == TRUE) & (matches.rank[chosen] < limit)
            recalls[a, m] += true.astype(weights.dtype) @ of_events / num_objects
        # Detections that count: in range, or an event themselves
        counts = matches.inside[a, : events[-1] + 1].copy()
        counts[events] = True
        total = _sums(weights, matches.images[: len(counts)], counts, events)
        outside = ~matches.inside[a, events]
        for t in range(num_thresholds):
            true = np.flatnonzero(matched[t] == TRUE)
            if not len(true):
                continue
            detected = total[true]
            # What COCO leaves out at this threshold
            left_out = np.flatnonzero((matched[t] == IGNORED) | ((matched[t] == 0) & outside))
            if len(left_out):
                sums = np.zeros((len(left_out) + 1, num_resamples), weights.dtype)
                sums[1:] = of_events[left_out]
                detected -= _accumulate(np.add, sums)[np.searchsorted(left_out, true)]
            found = _accumulate(np.add, of_events[true])
            detected += np.spacing(detected.dtype.type(1))
            best = np.divide(found, detected, out=detected)
            _accumulate(np.maximum, best[::-1])
            reached = _count_recalls(np.divide(found, num_objects, out=found))
            # Each precision counts as often as its true positive reaches a new one of the recalls
            ap = np.einsum("eb,eb->b", best, reached)
            ap -= np.einsum("eb,eb->b", best[1:], reached[:-1])
            precisions[a, t] += ap / len(RECALLS)
    return precisions, recalls


def _sums(
    weights: np.ndarray, images: np.ndarray, counts: np.ndarray, events: np.ndarray
) -> np.ndarray:
    """Sum the weights of the detections that count up to each event (events, b)."""
    rows = images[counts]
    ends = np.cumsum(counts)[events].tolist()
    sums = np.empty((len(events), weights.shape[1]), weights.dtype)
    for line, start, end in zip(sums, [0, *ends], ends, strict=False):
        weights[rows[start:end]].sum(axis=0, out=line)
    return _accumulate(np.add, sums)


def _accumulate(operation: np.ufunc, values: np.ndarray) -> np.ndarray:
    """Accumulate along the first axis, in place; several times as fast as numpy's own."""
    lines = [*values]
    for before, line in pairwise(lines):
        operation(before, line, out=line)
    return values


def _count_recalls(recall: np.ndarray) -> np.ndarray:
    """Count COCO's 101 recalls that are not above ``recall``; of 64 bits, to the last rounding."""
    scaled = 100 * recall
    if recall.dtype == np.float32:
        return np.floor(scaled + 2e-5) + 1
    count = np.floor(scaled + 1e-9)
    scaled -= count
    exact = np.flatnonzero(scaled < 1e-7)
    step = count.flat[exact]
    count.flat[exact] = step - (RECALLS[step.astype(int)] > recall.flat[exact])
    return count + 1
