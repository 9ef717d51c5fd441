"""Reliability of scores: is a detection of score 0.8 right in 80% of the cases?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plugin_core.evaluation.comparison.detections import Detections
from plugin_core.evaluation.comparison.drawing import (
    grid_and_legend,
    new_figure,
    no_formula,
    to_png,
)
from plugin_core.evaluation.comparison.sections import Cell, Figure, Section, Table

IOU = 0.5
BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Scores of a detector beside the share of right detections, in bins of equal width.

    Attributes:
        counts: number of detections in each bin.
        scores: their mean score, 0…1; NaN in an empty bin.
        right: share of them that is right at IoU 0.5, 0…1; NaN in an empty bin.
    """

    counts: np.ndarray
    scores: np.ndarray
    right: np.ndarray

    @property
    def error(self) -> float | None:
        """Expected calibration error in percentage points: mean distance over detections."""
        return self._mean(np.abs(self.scores - self.right))

    @property
    def overconfidence(self) -> float | None:
        """Mean score less the share of right detections, in percentage points."""
        return self._mean(self.scores - self.right)

    def _mean(self, values: np.ndarray) -> float | None:
        filled = self.counts > 0
        if not filled.any():
            return None
        return 100 * float(np.average(values[filled], weights=self.counts[filled]))


def calibration(detectors: Mapping[str, Detections], score_threshold: float = 0.3) -> Section:
    """Compare the reliability of the scores of named detectors.

    Args:
        detectors: by name.
        score_threshold: 0…1; a second error leaves out the detections below, which are the many
            that nobody shows.
    """
    overlap = next(iter(detectors.values())).truth.overlap
    notes, found = [], {}
    for name, detections in detectors.items():
        if ((detections.score < 0) | (detections.score > 1)).any():
            notes.append(f"{name} has scores outside of 0 to 1; they are no probabilities.")
        else:
            found[name] = (reliability(detections), reliability(detections, score_threshold))
    shown = f"score ≥ {score_threshold:g}"
    rows: list[list[Cell]] = [
        [
            *(name, int(whole.counts.sum()), whole.error),
            *(int(high.counts.sum()), high.error, high.overconfidence),
        ]
        for name, (whole, high) in found.items()
    ]
    edges = np.linspace(0, 1, BINS + 1)
    bins: list[list[Cell]] = [
        [
            f"{edges[i]:.1f} to {edges[i + 1]:.1f}",
            *(x for whole, _ in found.values() for x in (int(whole.counts[i]), _right(whole, i))),
        ]
        for i in range(BINS)
    ]
    return Section(
        "Reliability of scores",
        "A detector is calibrated if, of its detections with score 0.8, 80% are right (at "
        f"{overlap} {IOU:g}). The expected calibration error is the mean distance from that.",
        [
            Table(
                "Expected calibration error",
                ["detector", "detections", "error", f"detections of {shown}", f"error, {shown}"]
                + [f"overconfidence, {shown}"],
                rows,
                " ".join(
                    ["Percentage points; overconfidence below 0: scores are too low.", *notes]
                ),
            ),
            Table(
                "Right detections by score",
                [
                    "score",
                    *(x for name in found for x in (f"{name}: detections", f"{name}: right")),
                ],
                bins,
                "Right in percent.",
            ),
        ],
        [Figure("Share of right detections over score", _draw(found))] if found else [],
        {
            name: {
                "counts": whole.counts,
                "scores": whole.scores,
                "right": whole.right,
                "error": whole.error,
                "error_above_threshold": high.error,
            }
            for name, (whole, high) in found.items()
        },
    )


def reliability(detections: Detections, score_threshold: float = 0.0) -> Reliability:
    """Sort the detections, except for those of crowds, by score into bins of 0.1."""
    match = detections.match(IOU)
    kept = ~match.ignored & (detections.score >= score_threshold)
    scores, right = detections.score[kept], match.right[kept]
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin
        means = [np.bincount(bins, x, minlength=BINS) / counts for x in (scores, right)]
    return Reliability(counts, *means)


def _right(whole: Reliability, i: int) -> float:
    return 100 * float(whole.right[i])


def _draw(found: Mapping[str, tuple[Reliability, Reliability]]) -> bytes:
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1, label="calibrated")
    for name, (whole, _) in found.items():
        axes.plot(whole.scores, whole.right, "o-", label=no_formula(name), markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share right", aspect="equal")
    grid_and_legend(axes)
    return to_png(figure)
