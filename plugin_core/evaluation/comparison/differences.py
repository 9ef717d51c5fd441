"""A report's first sections: how accurate detectors are, and which differences are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plugin_core.evaluation.comparison.accuracy import Accuracy, accuracy, precisions_of
from plugin_core.evaluation.comparison.bootstrap import (
    Difference,
    Spread,
    compare,
    draw_weights,
    resampled,
)
from plugin_core.evaluation.comparison.inputs import Detector
from plugin_core.evaluation.comparison.matching import match
from plugin_core.evaluation.comparison.numbering import class_names
from plugin_core.evaluation.comparison.sections import Section, Table
from plugin_core.evaluation.comparison.verdict import verdict


@dataclass(frozen=True)
class Compared:
    """A detector beside the baseline.

    Attributes:
        differences: one for each metric, then one in AP for each class.
        spread: of the difference in AP.
        verdict: the sentence.
    """

    differences: Sequence[Difference]
    spread: Spread
    verdict: str


@dataclass(frozen=True)
class Measured:
    """What is known of detectors by their results.

    Attributes:
        accuracies: detector → one for each seed; the baseline is first.
        compared: every other detector → its comparison with the baseline.
        classes: names of the classes.
        resamples: number of resamples.
    """

    accuracies: Mapping[str, Sequence[Accuracy]]
    compared: Mapping[str, Compared]
    classes: Sequence[str]
    resamples: int

    def mean(self, name: str, metric: str = "AP") -> float:
        """Mean of a detector's metric over its seeds, in percent."""
        return float(np.mean([one.metrics[metric] for one in self.accuracies[name]]))


def measure(
    content: Mapping[str, Any], detectors: Sequence[Detector], iou_type: str, resamples: int
) -> Measured:
    """Evaluate detectors and compare each with the first.

    Args:
        content: of the annotation file.
        detectors: the baseline first.
        iou_type: "bbox", "segm" or "keypoints".
        resamples: number of resamples of the bootstrap.
    """
    metrics, classes = list(precisions_of(iou_type)), class_names(content)
    weights = draw_weights(len(content["images"]), resamples)
    accuracies, values = {}, {}
    for detector in detectors:
        accuracies[detector.name] = [accuracy(content, one, iou_type) for one in detector.seeds]
        if len(detectors) > 1:
            values[detector.name] = [
                resampled(match(content, one, iou_type), weights) for one in detector.seeds
            ]
    measured = Measured(accuracies, {}, classes, resamples)
    baseline, *others = (detector.name for detector in detectors)
    compared = {}
    for name in others:
        differences, spread = compare(values[baseline], values[name], metrics, classes)
        means = measured.mean(name), measured.mean(baseline)
        sentence = verdict(name, baseline, means, differences[metrics.index("AP")], spread)
        compared[name] = Compared(differences, spread, sentence)
    return Measured(accuracies, compared, classes, resamples)


def accuracy_section(measured: Measured) -> Section:
    """Lay out COCO's numbers: over all classes, and each class's AP."""
    names = list(measured.accuracies)
    seeds = max(map(len, measured.accuracies.values()))
    metrics = list(measured.accuracies[names[0]][0].metrics)
    rows = [
        [
            name,
            *(_over_seeds([one.metrics[m] for one in measured.accuracies[name]]) for m in metrics),
        ]
        for name in names
    ]
    by_class = [
        [k, *(_over_seeds([a.by_class[k]["AP"] for a in measured.accuracies[n]]) for n in names)]
        for k in measured.classes
    ]
    note = "Mean ± standard deviation over the seeds." if seeds > 1 else ""
    return Section(
        "Accuracy",
        "COCO's average precision (AP) and recall (AR), in percent.",
        [
            Table("Accuracy", ["detector", *metrics], rows, note),
            Table("AP of each class", ["class", *names], by_class, note),
        ],
        data={name: [asdict(one) for one in measured.accuracies[name]] for name in names},
    )


def differences_section(measured: Measured) -> Section:
    """Lay out the differences to the baseline with their intervals."""
    baseline = next(iter(measured.accuracies))
    tables = []
    for name, one in measured.compared.items():
        numbers = [(d, [d.difference, d.low, d.high, d.p]) for d in one.differences]
        headers = ["difference", "low", "high", "p"]
        tables += [
            Table(
                f"{name} less {baseline}",
                ["metric", *headers],
                [[d.metric, *row[:3], _p(d.p)] for d, row in numbers if d.class_name is None],
                f"In percentage points. {one.verdict}",
            ),
            Table(
                f"{name} less {baseline}, AP of each class",
                ["class", *headers, "p (Holm)"],
                [
                    [d.class_name, *row[:3], _p(d.p), _p(d.p_holm)]
                    for d, row in numbers
                    if d.class_name
                ],
                "In percentage points. With few objects of a class, its interval is too narrow.",
            ),
        ]
    text = (
        f"low and high are a 95% interval, from {measured.resamples} resamples of the images, the "
        "same ones for all detectors, and of the seeds where there are several. p is the "
        "probability of so large a difference if there were none; p (Holm) is corrected for the "
        "number of classes."
    )
    data = {
        name: {
            "verdict": one.verdict,
            "spread": asdict(one.spread),
            "differences": [asdict(d) for d in one.differences],
        }
        for name, one in measured.compared.items()
    }
    return Section("Is the difference real?", text, tables, data=data)


def _over_seeds(values: Sequence[float]) -> str | float:
    if len(values) == 1:
        return values[0]
    mean = float(np.mean(values))
    return f"{mean:.1f} ± {np.std(values, ddof=1):.1f}" if mean == mean else mean


def _p(p: float | None) -> str | None:
    if p is None or p != p:
        return None
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
