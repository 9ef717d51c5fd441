"""Resampling a detector's AP: the images are drawn anew, the detections matched once.

A resample draws as many images as there are, with replacement; all detectors get the same ones. It
is a weight for each image: with weights w, precision and recall at a detection are sums of w over
the detections before it (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pycocotools.cocoeval import Params

from plugin_core.evaluation.comparison.accuracy import areas_of, precisions_of
from plugin_core.evaluation.comparison.matching import IGNORED, TRUE, ClassMatches, Matches

RECALLS = Params("bbox").recThrs  # at which COCO reads precision
CHUNK = 1 << 20  # numbers in the largest array of a chunk of resamples: it stays in the cache


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


def resampled(matches: Matches, weights: np.ndarray, workers: int | None = None) -> np.ndarray:
    """Compute the metrics of one training in each resample.

    Args:
        matches: of its detections.
        weights: of shape (b, images), whole numbers.
        workers: number of threads; None for that of the cores.

    Returns:
        of shape (m + k, b), in percent: the m metrics of :func:`precisions_of`, which are means
        over the classes, and the AP of each of the k classes. NaN where a resample has no object.
    """
    metrics = precisions_of(matches.iou_type)
    areas = areas_of(matches.iou_type)
    values = np.empty((len(metrics), len(matches.classes), len(weights)))

    def measure(k: int, some: slice) -> None:
        precisions = average_precisions(matches.classes[k], weights[some])
        for m, (threshold, area) in enumerate(metrics.values()):
            of_area = precisions[areas.index(area)]
            values[m, k, some] = of_area.mean(0) if threshold is None else of_area[threshold]

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
    return 100 * np.concatenate([means, values[list(metrics).index("AP")]])


def images_with_objects(matches: Matches) -> np.ndarray:
    """Count the images that each row of :func:`resampled` is measured on.

    Returns:
        of shape (m + k,)
    """
    areas = areas_of(matches.iou_type)

    def count(classes: Sequence[ClassMatches], area: str) -> int:
        there = [one.object_images[one.counted[areas.index(area)]] for one in classes]
        return len(np.unique(np.concatenate(there)))

    metrics = [area for _, area in precisions_of(matches.iou_type).values()]
    return np.array(
        [count(matches.classes, area) for area in metrics]
        + [count([one], "") for one in matches.classes]
    )


def average_precisions(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """Compute a class's AP of each area and IoU threshold, with images weighted.

    Precision rises only at true positives, so all is computed there. The sums of weights of the
    detections between them are taken once for all thresholds.

    Args:
        matches: of the class.
        weights: of shape (b, images), whole numbers.

    Returns:
        of shape (areas, thresholds, b), 0 to 1; NaN where the weighted images have no object.
    """
    num_areas, num_thresholds, _ = matches.matched.shape
    precisions = np.zeros((num_areas, num_thresholds, len(weights)))
    of_objects = weights.take(matches.object_images, axis=1)
    for a in range(num_areas):
        num_objects = of_objects[:, matches.counted[a]].sum(axis=1, dtype=float)
        precisions[a, :, num_objects == 0] = np.nan
        matched = matches.matched[a]
        events = np.flatnonzero(matched.any(axis=0))  # matched at a threshold at least
        if not len(events):
            continue
        # Weights of the detections up to each event: in range, or an event themselves
        counts = matches.inside[a, : events[-1] + 1].copy()
        counts[events] = True
        rows = np.flatnonzero(counts)
        starts = np.r_[0, np.searchsorted(rows, events[:-1]) + 1]
        between = np.add.reduceat(weights.take(matches.images[rows], axis=1), starts, axis=1)
        total = np.cumsum(between, axis=1, dtype=float)
        of_events = weights.take(matches.images[events], axis=1)
        outside = ~matches.inside[a, events]
        for t in range(num_thresholds):
            state = matched[t, events]
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
            recall = np.divide(found, np.maximum(num_objects, 1)[:, None], out=found)
            reached = _count_recalls(recall)
            # Each precision counts as often as its true positive reaches a new one of the recalls
            ap = np.einsum("be,be->b", best, reached)
            ap -= np.einsum("be,be->b", best[:, 1:], reached[:, :-1])
            precisions[a, t] = np.where(num_objects > 0, ap / len(RECALLS), np.nan)
    return precisions


def _count_recalls(recall: np.ndarray) -> np.ndarray:
    """Count COCO's 101 recalls that are not above ``recall``, as floating point has them."""
    scaled = 100 * recall
    count = np.floor(scaled + 1e-9)
    scaled -= count
    exact = np.flatnonzero(scaled < 1e-7)
    step = count.flat[exact]
    count.flat[exact] = step - (RECALLS[step.astype(int)] > recall.flat[exact])
    return count + 1
