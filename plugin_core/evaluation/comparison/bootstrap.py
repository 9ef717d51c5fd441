"""Is a difference in AP real? Paired bootstrap over the images and the seeds.

A resample draws as many images as there are, with replacement; all detectors get the same ones. It
is a weight for each image, so that detections are matched once: with weights w, precision and
recall at a detection are sums of w over the detections before it (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 6, 10 and 13).

Where a detector was trained with several seeds, the resample draws S of its S seeds as well, in
place of their mean. Three corrections keep the interval honest with few seeds. The variance of a
resampled mean is (S-1)/S of what it should be: deviations from the mean of the seeds are multiplied
by √(S/(S-1)). The spread itself is known from few values: they are multiplied by t/1.96. t is the
97.5% quantile of Student's t with as many degrees of freedom as the seeds of both detectors have.
And seeds also differ by chance on these images, which the resampled images count already: the
deviations are reduced to the variance that is left.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import Params

from plugin_core.evaluation.comparison.accuracy import areas_of, precisions_of
from plugin_core.evaluation.comparison.matching import IGNORED, TRUE, ClassMatches, Matches

RECALLS = Params("bbox").recThrs  # at which COCO reads precision
NORMAL = 1.959964  # 97.5% quantile
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
CHUNK = 1 << 20  # numbers in the largest array of a chunk of resamples: it stays in the cache


@dataclass(frozen=True)
class Difference:
    """A detector's number less the baseline's, in percentage points; NaN where not measured.

    Attributes:
        metric: such as "AP50".
        class_name: None for the mean over all classes.
        difference: of the means over seeds.
        low: lower end of the 95% interval, from the resamples' percentiles.
        high: its upper end.
        p: two-sided, of no difference: normal, by the standard deviation of the resamples.
            Counting resamples could not go below 1/1000, too coarse for Holm over 80 classes.
        p_holm: p with Holm's correction over the classes; None for the mean.
    """

    metric: str
    class_name: str | None
    difference: float
    low: float
    high: float
    p: float
    p_holm: float | None


@dataclass(frozen=True)
class Spread:
    """What the resamples say of a difference in AP, in percentage points.

    Attributes:
        over_images: standard error from the images alone.
        over_seeds: standard deviations between the baseline's seeds and between the other
            detector's; None where there is one seed.
    """

    over_images: float
    over_seeds: tuple[float | None, float | None]


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


def compare(
    baseline: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    metrics: Sequence[str],
    class_names: Sequence[str],
    seed: int = 0,
) -> tuple[list[Difference], Spread]:
    """Compare two detectors by their numbers in the same resamples.

    Args:
        baseline: of one array of :func:`resampled` for each seed.
        other: those of the detector that is compared with it.
        metrics: names of the first rows.
        class_names: of the other rows.
        seed: of the draws of seeds.

    Returns:
        a difference for each metric, then one in AP for each class; and the spread of AP.
    """
    generator = np.random.default_rng(seed)
    freedom = len(baseline) + len(other) - 2
    both = [np.stack(one) for one in (baseline, other)]  # (seeds, rows, 1 + resamples)
    means = both[1].mean(axis=0) - both[0].mean(axis=0)
    difference, over_images = means[:, 0], means[:, 1:]
    known = np.count_nonzero(~np.isnan(over_images), axis=1) > 1
    drawn = over_images[known]
    for values, sign in zip(both, (-1, 1), strict=True):
        if len(values) > 1:
            deviations = _seed_deviations(values[:, known], generator)
            drawn = drawn + sign * student(freedom) / NORMAL * deviations
    low, high, p = np.full((3, len(means)), np.nan)
    low[known], high[known] = np.nanpercentile(drawn, [2.5, 97.5], axis=1).clip(-100, 100)
    error = np.nanstd(drawn, axis=1, ddof=1)
    p[known] = [
        math.erfc(abs(d) / max(e, 1e-9) / math.sqrt(2))
        for d, e in zip(difference[known], error, strict=True)
    ]
    # Where all resamples say the same, as with all objects in one image, they say nothing
    unsaid = np.flatnonzero(known)[(error < 1e-9) & (np.abs(difference[known]) > 1e-9)]
    low[unsaid] = high[unsaid] = p[unsaid] = np.nan
    first = len(metrics)
    numbers = np.stack([difference, low, high, p], axis=1).tolist()
    corrected = map(float, holm(p[first:]))
    differences = [
        Difference(metric, None, by, lowest, highest, of_mean, None)
        for metric, (by, lowest, highest, of_mean) in zip(metrics, numbers[:first], strict=True)
    ]
    rows = zip(class_names, numbers[first:], corrected, strict=True)
    differences += [
        Difference("AP", name, by, lowest, highest, of_class, of_all)
        for name, (by, lowest, highest, of_class), of_all in rows
    ]
    of_ap = list(metrics).index("AP")
    spreads = [
        float(values[:, of_ap, 0].std(ddof=1)) if len(values) > 1 else None for values in both
    ]
    return differences, Spread(
        float(np.nanstd(over_images[of_ap], ddof=1)), (spreads[0], spreads[1])
    )


def _seed_deviations(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw seeds in each resample: their mean less that of all seeds, with the variance corrected.

    Args:
        values: of shape (seeds, rows, 1 + resamples), each row with numbers in two resamples.
        generator: of the draws.

    Returns:
        of shape (rows, resamples).
    """
    num_seeds, _, resamples = values[:, :, 1:].shape
    apart = values - values.mean(axis=0)
    between = apart[:, :, 0].var(axis=0) * num_seeds / (num_seeds - 1)
    by_images = np.nanvar(apart[:, :, 1:], axis=2).mean(axis=0) * num_seeds / (num_seeds - 1)
    left = np.clip(1 - by_images / np.maximum(between, 1e-12), 0, 1)  # not by chance on the images
    drawn = generator.integers(num_seeds, size=(num_seeds, resamples))
    share = np.array([(drawn == s).mean(axis=0) for s in range(num_seeds)]) - 1 / num_seeds
    scale = np.sqrt(left * num_seeds / (num_seeds - 1))
    return scale[:, None] * np.einsum("sr,sb->rb", apart[:, :, 0], share)


def student(freedom: int) -> float:
    """97.5% quantile of Student's t distribution."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return NORMAL + 2.372 / freedom + 2.823 / freedom**2  # to 0.003


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values for their number (Holm 1979); NaN stays and does not count."""
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected
