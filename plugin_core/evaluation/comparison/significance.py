"""Is a difference in AP real? Standard error, interval and p-value, over images and seeds.

The resampled images (:mod:`bootstrap`) give the variance V of the difference between the detectors'
means over their seeds. With n images it comes out (n-1)/n too small, which is corrected. Seeds add

    max(0, s² - w) / S

for each detector with S of them: s² is the variance between its seeds on these images, and w what
of it the images explain, the seeds' variance in the same resamples, which V holds already. So few
images or seeds tell their own spread badly: the interval is the difference ± t standard errors, and
p is Student's, with the degrees of freedom of Welch and Satterthwaite (Satterthwaite, Biometrics
1946):

    (whole variance)² / (V² / (n-1) + sum of (s² / S)² / (S-1))

The sum is over the detectors whose seeds add something. As the w that is taken away makes the whole
variance small, this may fall below each of the n-1 and S-1 in it; the least of them takes its place
then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05  # p below is a difference


@dataclass(frozen=True)
class Difference:
    """A detector's number less another one's, in percentage points; NaN where not measured.

    Attributes:
        metric: such as "AP50".
        class_name: None for the mean over all classes.
        difference: of the means over seeds.
        low: lower end of the 95% interval.
        high: its upper end.
        p: two-sided, of no difference; below 0.05 where the interval leaves out 0.
        p_holm: p with Holm's correction: of a class over the classes, of AP or PQ over the
            detectors that are compared; None for the other metrics.
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
    """What the resamples say of a difference in AP or PQ, in percentage points.

    Attributes:
        over_images: standard error from the images alone.
        over_seeds: standard deviations between the baseline's seeds and between the other
            detector's; None where there is one seed.
        images: number of images with objects.
    """

    over_images: float
    over_seeds: tuple[float | None, float | None]
    images: float = math.inf


def compare(
    baseline: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    metrics: Sequence[str],
    class_names: Sequence[str],
    images: np.ndarray,
) -> tuple[list[Difference], Spread]:
    """Compare two detectors by their numbers in the same resamples.

    Args:
        baseline: an array for each seed: the numbers on the images as they are in the first column,
            in each resample in the others (rows, 1 + resamples).
        other: those of the detector that is compared with it.
        metrics: names of the first rows; the first one, AP or PQ, is that of the classes, too.
        class_names: of the other rows.
        images: number of images that each row is measured on.

    Returns:
        a difference for each metric, then one in the first metric for each class; and its spread.
    """
    both = [np.stack(one) for one in (baseline, other)]  # (seeds, rows, 1 + resamples)
    means = both[1].mean(axis=0) - both[0].mean(axis=0)
    difference, over_images = means[:, 0], means[:, 1:]
    low, high, p = np.full((3, len(means)), np.nan)
    drawn = np.count_nonzero(~np.isnan(over_images), axis=1)
    known = np.flatnonzero((drawn > 1) & (images > 1))
    by_images, error, freedom = _errors(both, over_images, known, images[known])
    distance = np.abs(difference[known])
    margin = stdtrit(freedom, 0.975) * error
    low[known] = (difference[known] - margin).clip(-100, 100)
    high[known] = (difference[known] + margin).clip(-100, 100)
    p[known] = 2 * stdtr(freedom, -distance / np.maximum(error, 1e-9))
    # Where all resamples say the same, as with all objects in one image, they say nothing
    unsaid = known[(error < 1e-9) & (distance > 1e-9)]
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
        Difference(metrics[0], name, by, lowest, highest, of_class, of_all)
        for name, (by, lowest, highest, of_class), of_all in rows
    ]
    spreads = [float(values[:, 0, 0].std(ddof=1)) if len(values) > 1 else None for values in both]
    of_main = float(by_images[0]) if 0 in known else math.nan
    return differences, Spread(of_main, (spreads[0], spreads[1]), int(images[0]))


def _errors(
    both: Sequence[np.ndarray], over_images: np.ndarray, known: np.ndarray, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return standard errors by images alone and in all, and degrees of freedom, of known rows."""
    by_images = np.nanvar(over_images[known], axis=1, ddof=1) * images / (images - 1)
    whole = by_images
    uncertain = by_images**2 / (images - 1)
    least = images - 1
    for values in both:
        seeds = len(values)
        if seeds > 1:
            apart = values[:, known] - values[:, known].mean(axis=0)
            between = apart[:, :, 0].var(axis=0, ddof=1)
            explained = np.nanvar(apart[:, :, 1:], axis=2).sum(axis=0) / (seeds - 1)
            explained *= images / (images - 1)
            added = np.maximum(0, between - explained) / seeds
            whole = whole + added
            uncertain = uncertain + (added > 0) * (between / seeds) ** 2 / (seeds - 1)
            least = np.where(added > 0, np.minimum(least, seeds - 1), least)
    freedom = np.divide(whole**2, uncertain, out=np.ones_like(whole), where=uncertain > 0)
    return np.sqrt(by_images), np.sqrt(whole), np.maximum(freedom, least)


def holm(p: np.ndarray) -> np.ndarray:
    """Correct p-values for their number (Holm 1979); NaN stays and does not count."""
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN is last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return corrected
