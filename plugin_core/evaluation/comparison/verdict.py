"""The answer in one sentence: better, worse, or not told apart."""

from __future__ import annotations

import math

from plugin_core.evaluation.comparison.bootstrap import NORMAL, Difference, Spread

POWER = 0.841621  # 80% quantile of the normal distribution
MANY = 1000  # seeds that nobody trains


def verdict(
    name: str, baseline: str, means: tuple[float, float], difference: Difference, spread: Spread
) -> str:
    """Say whether a detector is better than the baseline.

    It is better or worse if the 95% interval leaves out 0.

    Args:
        name: of the detector.
        baseline: name of the other one.
        means: their APs, the baseline's last.
        difference: of the two in AP.
        spread: of the difference.
    """
    interval = "no interval"
    if not math.isnan(difference.low):
        interval = f"95% interval {difference.low:+.1f} to {difference.high:+.1f}"
    numbers = f"AP {means[0]:.1f} against {means[1]:.1f}, {difference.difference:+.1f} ({interval})"
    if difference.low > 0 or difference.high < 0:
        word = "better" if difference.low > 0 else "worse"
        single = None in spread.over_seeds
        caution = "; with one seed, this is of these trainings alone" if single else ""
        return f"{name} is {word} than {baseline}: {numbers}{caution}."
    return f"{name} and {baseline} are not told apart: {numbers}{_what_would(difference, spread)}."


def seeds_needed(difference: float, spread: Spread) -> float:
    """How many seeds of each detector would show a difference as large as this one in 80% of cases.

    Args:
        difference: in AP.
        spread: with the standard deviations between seeds of both detectors.

    Returns:
        at least 2; infinite if the images alone leave too much to chance.
    """
    first, second = spread.over_seeds
    if first is None or second is None:
        raise ValueError("spread.over_seeds: both detectors need several seeds")
    # That much may the standard error be
    left = (difference / (NORMAL + POWER)) ** 2 - spread.over_images**2
    return max(2, math.ceil((first**2 + second**2) / left)) if left > 0 else math.inf


def _what_would(difference: Difference, spread: Spread) -> str:
    if None in spread.over_seeds:
        return "; how many seeds would tell is known only with several seeds of both"
    needed = seeds_needed(difference.difference, spread)
    if math.isinf(needed):
        error = f"standard error {spread.over_images:.1f}"
        return f"; no number of seeds would tell so little on these images ({error})"
    count = f"about {needed}" if needed <= MANY else f"more than {MANY}"
    return f"; {count} seeds of each would tell such a difference"
