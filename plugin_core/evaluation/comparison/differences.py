"""A report's first sections: how accurate detectors are, and which differences are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from plugin_core.evaluation.comparison.accuracy import Accuracy, accuracy
from plugin_core.evaluation.comparison.bootstrap import (
    draw_weights,
    images_with_objects,
    matches_of,
    resampled,
)
from plugin_core.evaluation.comparison.inputs import Detector
from plugin_core.evaluation.comparison.sections import Section, Table
from plugin_core.evaluation.comparison.significance import Difference, Spread, compare, holm
from plugin_core.evaluation.comparison.verdict import overall, verdict

_DESCRIPTIONS = {
    "AP": "COCO's average precision (AP) and recall (AR), in percent.",
    "PQ": "Panoptic quality (PQ), of segmentation (SQ) and of recognition (RQ), in percent; of all "
    "classes, of things (th) and of stuff (st).",
}


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

    @property
    def main(self) -> Difference:
        """The difference in AP, or in PQ, over all classes."""
        return self.differences[0]


@dataclass(frozen=True)
class Measured:
    """What is known of detectors by their results.

    Attributes:
        accuracies: detector → one for each seed; the baseline is first.
        compared: every other detector → its comparison with the baseline.
        beside_control: every detector but the baseline and the control → its difference in AP or PQ
            from the control.
        control: name of the detector that costs as much as the others but has no plugin, if any.
        images: number of images.
        classes: class → number of its objects that are to be found.
        resamples: number of resamples.
        doubt: why the results may be of other images, in sentences.
    """

    accuracies: Mapping[str, Sequence[Accuracy]]
    compared: Mapping[str, Compared]
    images: int
    classes: Mapping[str, int]
    resamples: int
    doubt: str = ""
    control: str | None = None
    beside_control: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether any detector but the control beats the baseline, then a line for each."""
        if not self.compared:
            return ""
        baseline, *_ = self.accuracies
        values = [one.metrics[self.main] for one in self.accuracies[baseline]]
        noise = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        others = sorted(self.compared, key=lambda name: name == self.control)  # the control is last
        tried = {name: self.compared[name].main for name in others if name != self.control}
        first = overall(baseline, len(values), tried, noise) if tried else ""
        return "\n".join([first, *(self.compared[name].verdict for name in others)]).strip()

    @property
    def main(self) -> str:
        """The metric that decides: "AP" or "PQ"."""
        return next(iter(next(iter(self.accuracies.values()))[0].metrics))

    def mean(self, name: str, metric: str = "") -> float:
        """Mean of a detector's metric over its seeds, in percent; AP or PQ by default."""
        return float(np.mean([one.metrics[metric or self.main] for one in self.accuracies[name]]))


def measure(detectors: Sequence[Detector], resamples: int, control: str | None = None) -> Measured:
    """Evaluate detectors and compare each with the first, and with the control.

    Args:
        detectors: the baseline first.
        resamples: number of resamples of the bootstrap.
        control: name of the detector that costs as much as the others but has no plugin, if any.
    """
    truth = detectors[0].seeds[0].truth
    weights = draw_weights(len(truth.images), resamples)
    accuracies, values = {}, {}
    images = np.zeros(0)
    for detector in detectors:
        accuracies[detector.name] = [accuracy(one) for one in detector.seeds]
        if len(detectors) > 1:
            matches = [matches_of(one) for one in detector.seeds]
            values[detector.name] = [
                np.column_stack([_row(known), resampled(one, weights)])
                for known, one in zip(accuracies[detector.name], matches, strict=True)
            ]
            images = images_with_objects(matches[0])
    objects = truth.objects_of_class(truth.wanted[0]).tolist()
    classes = dict(zip(truth.names, objects, strict=True))
    return measured_of(accuracies, values, images, classes, weights, control)


def measured_of(
    accuracies: Mapping[str, Sequence[Accuracy]],
    values: Mapping[str, Sequence[np.ndarray]],
    images: np.ndarray,
    classes: Mapping[str, int],
    weights: np.ndarray,
    control: str | None = None,
) -> Measured:
    """Compare each detector with the first, and with the control.

    Args:
        accuracies: detector → one for each seed.
        values: detector → for each seed the numbers and those of the resamples, in the rows of
            :func:`significance.compare`.
        images: number of images that each row is measured on.
        classes: class → number of its objects that are to be found.
        weights: of the images in the resamples (resamples, images).
        control: its name, if there is one.
    """
    resamples, num_images = weights.shape
    measured = Measured(accuracies, {}, num_images, classes, resamples, control=control)
    baseline, *others = accuracies
    metrics = list(accuracies[baseline][0].metrics)

    def compared_with(
        name: str, names: Sequence[str]
    ) -> dict[str, tuple[list[Difference], Spread]]:
        return {
            other: compare(values[name], values[other], metrics, [*classes], images)
            for other in names
        }

    beside = {}
    if control:
        pairs = compared_with(control, [name for name in others if name != control])
        beside = _corrected({name: differences[0] for name, (differences, _) in pairs.items()})
    compared = judge(measured, compared_with(baseline, others))
    return replace(measured, compared=compared, beside_control=beside)


def _corrected(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """Correct the p-values of detectors' differences for their number."""
    p_values = holm(np.array([one.p for one in differences.values()])).tolist()
    return {
        name: replace(one, p_holm=p)
        for (name, one), p in zip(differences.items(), p_values, strict=True)
    }


def _row(known: Accuracy) -> list[float]:
    """The numbers of a training in the order of the resamples'."""
    return [*known.metrics.values(), *(of_class["AP"] for of_class in known.by_class.values())]


def judge(
    measured: Measured, pairs: Mapping[str, tuple[list[Difference], Spread]]
) -> dict[str, Compared]:
    """Correct the p-values of AP for the number of detectors, and say what each difference is.

    The control is none of those that were tried, so that its p-value stays and does not count.
    """
    baseline = next(iter(measured.accuracies))
    tried = {n: differences[0] for n, (differences, _) in pairs.items() if n != measured.control}
    corrected = _corrected(tried)
    compared = {}
    for name, (differences, spread) in pairs.items():
        known = replace(differences[0], p_holm=differences[0].p)
        differences[0] = corrected.get(name, known)
        means = measured.mean(name), measured.mean(baseline)
        sentence = verdict(name, baseline, means, differences[0], spread, len(tried))
        compared[name] = Compared(differences, spread, sentence)
    return compared


def accuracy_section(measured: Measured) -> Section:
    """Lay out COCO's numbers: over all classes, and each class's AP."""
    names, main = list(measured.accuracies), measured.main
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
        [
            *(k, objects),
            *(_over_seeds([a.by_class[k][main] for a in measured.accuracies[n]]) for n in names),
        ]
        for k, objects in measured.classes.items()
    ]
    note = ""
    if seeds > 1:
        numbers = ", ".join(f"{n} {len(of)}" for n, of in measured.accuracies.items())
        note = f"Mean ± standard deviation over the seeds: {numbers}."
    return Section(
        "Accuracy",
        f"{_DESCRIPTIONS[main]} On {measured.images:,} images with "
        f"{sum(measured.classes.values()):,} objects. {measured.doubt}".strip(),
        [
            Table("Accuracy", ["detector", *metrics], rows, note),
            Table(f"{main} of each class", ["class", "objects", *names], by_class, note),
        ],
        data={name: [asdict(one) for one in measured.accuracies[name]] for name in names},
    )


def differences_section(measured: Measured) -> Section:
    """Lay out the noise between the baseline's seeds, and the differences with their intervals."""
    baseline = next(iter(measured.accuracies))
    headers = ["difference", "low", "high", "p"]
    points = "In percentage points; low and high are a 95% interval."
    tables = _seeds_table(baseline, measured.accuracies[baseline])
    apart: dict[str, Mapping[str, Difference]] = {
        baseline: {name: one.main for name, one in measured.compared.items()}
    }
    if measured.control and measured.beside_control:
        apart[measured.control] = measured.beside_control
    for other, differences in apart.items():
        note = points
        if (tried := len(differences.keys() - {measured.control})) > 1:
            note += f" p (Holm) is corrected for {tried} comparisons."
        if other == measured.control:
            note += f" {other} costs as much without a plugin: what it gains is no plugin's merit."
        rows = [[name, *_numbers(one), _p(one.p_holm)] for name, one in differences.items()]
        title = f"{measured.main} less that of {other}"
        tables.append(Table(title, ["detector", *headers, "p (Holm)"], rows, note))
    for name, one in measured.compared.items():
        overall = [d for d in one.differences if d.class_name is None]
        classes = [(d.class_name, d) for d in one.differences if d.class_name is not None]
        tables += [
            Table(
                f"{name} less {baseline}",
                ["metric", *headers],
                [[d.metric, *_numbers(d)] for d in overall],
                f"{points} {one.verdict}",
            ),
            Table(
                f"{name} less {baseline}, {measured.main} of each class",
                ["class", "objects", *headers, "p (Holm)"],
                [[kind, measured.classes[kind], *_numbers(d), _p(d.p_holm)] for kind, d in classes],
                f"{points} A class with few objects has a rough one.",
            ),
        ]
    text = (
        f"low and high are a 95% interval: Student's, by the standard error over "
        f"{measured.resamples} resamples of the images, the same ones for all detectors, and over "
        "the seeds where there are several. p is the probability of so large a difference if there "
        "were none; p (Holm) is corrected for the number of detectors, or of classes."
    )
    data = {
        name: {
            "verdict": one.verdict,
            "spread": asdict(one.spread),
            "differences": [asdict(d) for d in one.differences],
            "difference_from_control": (
                asdict(measured.beside_control[name]) if name in measured.beside_control else None
            ),
        }
        for name, one in measured.compared.items()
    }
    return Section("Is the difference real?", text, tables, data=data)


def _seeds_table(baseline: str, seeds: Sequence[Accuracy]) -> list[Table]:
    """Lay out how far the baseline's seeds are apart; nothing for a single one."""
    if len(seeds) < 2:
        return []
    rows: list[list[Any]] = []
    for metric in seeds[0].metrics:
        values = [one.metrics[metric] for one in seeds]
        rows.append([metric, *values, float(np.std(values, ddof=1)), float(np.ptp(values))])
    return [
        Table(
            f"Seeds of {baseline} among each other",
            ["metric", *(f"seed {n}" for n in range(1, len(seeds) + 1))]
            + ["standard deviation", "largest difference"],
            rows,
            f"This is the noise that a gain must beat. The seeds are in the order of {baseline}'s "
            "files.",
        )
    ]


def _numbers(d: Difference) -> list[Any]:
    return [d.difference, d.low, d.high, _p(d.p)]


def _over_seeds(values: Sequence[float]) -> str | float:
    if len(values) == 1:
        return values[0]
    mean = float(np.mean(values))
    return f"{mean:.1f} ± {np.std(values, ddof=1):.1f}" if mean == mean else mean


def _p(p: float | None) -> str | None:
    if p is None or p != p:
        return None
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
