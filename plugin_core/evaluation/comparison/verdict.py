"""The answer in sentences: does any detector beat the baseline, and what of each?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.special import stdtrit

from plugin_core.evaluation.comparison.significance import LEVEL, Difference, Spread

POWER = 0.8  # share of cases in which so many seeds tell the difference
MANY = 1000  # seeds that nobody trains


def overall(baseline: str, seeds: int, differences: Mapping[str, Difference], noise: float) -> str:
    """Say whether any detector is better than the baseline, however many were tried.

    It is empty for one detector and one seed, where :func:`verdict` says it all.

    Args:
        baseline: its name.
        seeds: number of the baseline's.
        differences: of each other detector in AP or PQ, corrected for the number of detectors.
        noise: standard deviation between the baseline's seeds.
    """
    better = [name for name, d in differences.items() if d.difference > 0 and _holds(d)]
    count, end = len(differences), "."
    metric = next(iter(differences.values())).metric
    if seeds > 1:
        verbs = ("beats", "beat", "does not beat")
        what = f"the noise of {baseline}, whose {metric} varies by {noise:.1f} "
        what += f"(standard deviation over {seeds} seeds)"
    elif count == 1:
        return ""
    else:
        verbs = ("is", "are", "is not")
        what = f"better than {baseline} on these images by more than chance"
        end = f". {baseline} has one seed, so its noise between seeds is not known."
    if count == 1:
        return f"{next(iter(differences))} {verbs[0 if better else 2]} {what}{end}"
    if not better:
        return f"None of the {count} detectors {verbs[0]} {what}{end}"
    verb = verbs[min(len(better), 2) - 1]
    return f"{len(better)} of {count} detectors {verb} {what}: {', '.join(better)}{end}"


def verdict(
    name: str,
    baseline: str,
    means: tuple[float, float],
    difference: Difference,
    spread: Spread,
    comparisons: int = 1,
) -> str:
    """Say whether a detector is better than the baseline.

    It is better or worse if p, corrected for the number of detectors, is below 0.05.

    Args:
        name: of the detector.
        baseline: name of the other one.
        means: their APs or PQs, the baseline's last.
        difference: of the two.
        spread: of the difference.
        comparisons: number of detectors that are compared with the baseline.
    """
    interval = "no interval"
    if not math.isnan(difference.low):
        interval = f"95% interval {difference.low:+.1f} to {difference.high:+.1f}"
    numbers = f"{difference.metric} {means[0]:.1f} against {means[1]:.1f}"
    numbers += f", {difference.difference:+.1f} ({interval})"
    if difference.p < LEVEL:
        word = "better" if difference.difference > 0 else "worse"
        if not _holds(difference):
            word += f" than {baseline} taken alone, but not after correction for {comparisons}"
            return f"{name} is {word} comparisons (Holm, p = {difference.p_holm:.3f}): {numbers}."
        sentence = f"{name} is {word} than {baseline}: {numbers}"
        if None in spread.over_seeds:
            return f"In these trainings {sentence}; with one seed, another one may turn the sign."
        return f"{sentence}."
    return f"{name} and {baseline} are not told apart: {numbers}{_what_would(difference, spread)}."


def _holds(difference: Difference) -> bool:
    """Tell whether a difference stands after correction."""
    p = difference.p if difference.p_holm is None else difference.p_holm
    return p < LEVEL


def seeds_needed(difference: float, spread: Spread) -> float:
    """How many seeds of each detector would show a difference as large as this one in 80% of cases.

    Args:
        difference: in AP.
        spread: with the standard deviations between seeds of both detectors.

    Returns:
        at least 2, or ``MANY + 1`` for more than ``MANY``; infinite if the images alone leave too
        much to chance.
    """
    first, second = spread.over_seeds
    if first is None or second is None:
        raise ValueError("spread.over_seeds: both detectors need several seeds")
    of_images, seeds = spread.over_images**2, np.arange(2, MANY + 1)
    free = max(1.0, spread.images - 1)
    of_seeds = (first**2 + second**2) / seeds
    uncertain = of_images**2 / free + (first**4 + second**4) / seeds**2 / (seeds - 1)
    # What the difference must be, by Student's distribution as in significance.compare
    needed = _quantiles((of_images + of_seeds) ** 2 / np.maximum(uncertain, 1e-30))
    enough = np.flatnonzero(abs(difference) >= needed * np.sqrt(of_images + of_seeds))
    if len(enough):
        return int(seeds[enough[0]])
    limit = _quantiles(np.array(free)) * spread.over_images
    return MANY + 1 if abs(difference) > limit else math.inf


def _quantiles(freedom: np.ndarray) -> np.ndarray:
    """How many standard errors leave out 0 in ``POWER`` of the cases."""
    freedom = np.minimum(freedom, 1e9)  # stdtrit has none for infinity
    return stdtrit(freedom, 0.975) + stdtrit(freedom, POWER)


def _what_would(difference: Difference, spread: Spread) -> str:
    if math.isnan(spread.over_images):
        return ""
    if None in spread.over_seeds:
        return "; how many seeds would tell is known only with several seeds of both"
    needed = seeds_needed(difference.difference, spread)
    if math.isinf(needed):
        error = f"standard error {spread.over_images:.1f}"
        return f"; no number of seeds would tell so little on these images ({error})"
    count = f"about {needed}" if needed <= MANY else f"more than {MANY}"
    return f"; {count} seeds of each would tell such a difference"
