"""Which classes a detector takes for one another, and for background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from plugin_core.evaluation.comparison.detections import Detections
from plugin_core.evaluation.comparison.drawing import new_figure, no_formula, to_png
from plugin_core.evaluation.comparison.sections import Cell, Figure, Section, Table

IOU = 0.5
WORST = 10  # rows of a table
SHOWN = 25  # classes in the picture
BACKGROUND = "background"


def confusion(detectors: Mapping[str, Detections], score_threshold: float = 0.3) -> Section:
    """Compare the confusions of named detectors.

    Args:
        detectors: by name.
        score_threshold: 0…1; detections below are left out.
    """
    matrices = {
        name: confusion_matrix(detections, score_threshold)
        for name, detections in detectors.items()
    }
    truth = next(iter(detectors.values())).truth
    names = [*truth.names, BACKGROUND]
    total = np.sum([*matrices.values()], axis=0)
    last = len(names) - 1
    wrong = total * ~np.eye(len(names), dtype=bool)
    between, with_background = wrong.copy(), wrong
    between[:, last] = between[last] = 0
    with_background[:last, :last] = 0
    headers = ["object", "detected as", "objects", *matrices]

    def worst(numbers: np.ndarray) -> list[list[Cell]]:
        order = np.argsort(-numbers, axis=None, kind="stable")[:WORST]
        rows: list[list[Cell]] = []
        for i, j in zip(*np.unravel_index(order, numbers.shape), strict=True):
            if numbers[i, j]:
                objects = None if i == last else int(next(iter(matrices.values()))[i].sum())
                found = [int(matrix[i, j]) for matrix in matrices.values()]
                rows.append([names[i], names[j], objects, *found])
        return rows

    return Section(
        "Confusion of classes",
        f"Detections with a score of at least {score_threshold:g}, matched with objects at "
        f"{truth.overlap} {IOU:g}: first with those of their class, then the rest with those of "
        "any class.",
        [
            Table(
                "Classes most often taken for another",
                headers,
                worst(between),
                "Number of objects, by detector.",
            ),
            Table(
                "Objects most often missed, and detections most often left over",
                headers,
                worst(with_background),
                f"Number of objects that nothing found (detected as {BACKGROUND}), and of "
                f"detections that found nothing (object: {BACKGROUND}): there is none, or another "
                "detection has found it.",
            ),
        ],
        [Figure("Confusion matrix", _draw(matrices, names, between), _shown(len(names)))],
        {"classes": names, "score_threshold": score_threshold, "matrices": matrices},
    )


def confusion_matrix(detections: Detections, score_threshold: float) -> np.ndarray:
    """Count objects by their class and the class that they are detected as (K + 1, K + 1).

    The last row counts the detections that found nothing, the last column the objects that nothing
    found. A detection that found nothing but a crowd of its class is not counted, nor is the crowd.
    """
    truth, match = detections.truth, detections.match(IOU, score_threshold=score_threshold)
    found = match.found
    free = ~match.ignored & (match.object < 0)
    pairs = (detections.pair_iou >= IOU) & free[detections.pair_detection]
    pairs &= match.counted[detections.pair_object]
    others = detections.assign(pairs, taken=found)
    result = np.where(match.right, match.object, others)
    found[result[result >= 0]] = True
    background = len(truth.names)
    matrix = np.zeros((background + 1, background + 1), int)
    kept = ~match.ignored
    rows = np.full(len(result), background)
    rows[result >= 0] = truth.category[result[result >= 0]]
    np.add.at(matrix, (rows[kept], detections.category[kept]), 1)
    np.add.at(matrix, (truth.category[match.counted & ~found], background), 1)
    return matrix


def _shown(classes: int) -> str:
    note = "In percent of each row; the last one has the detections that found nothing."
    if classes - 1 > SHOWN:
        note += f" The {SHOWN} classes that are confused most."
    return note


def _draw(matrices: Mapping[str, np.ndarray], names: Sequence[str], between: np.ndarray) -> bytes:
    """Draw the matrices side by side, of the classes that are confused most."""
    from matplotlib.colors import PowerNorm

    most = np.argsort(-(between + between.T).sum(0)[:-1], kind="stable")[:SHOWN]
    chosen = [*np.sort(most), len(names) - 1]
    labels = [no_formula(names[i]) for i in chosen]
    norm = PowerNorm(0.5, 0, 100)  # a few percent must be seen
    side, columns = 1.6 + 0.22 * len(chosen), min(2, len(matrices))
    lines = -(-len(matrices) // columns)
    figure = new_figure(side * columns + 0.8, (side + 0.4) * lines)
    places = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in places[len(matrices) :]:
        axes.set_axis_off()
    for axes, (name, matrix) in zip(places, matrices.items(), strict=False):
        shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        image = axes.imshow(shares[np.ix_(chosen, chosen)], cmap="Blues", norm=norm)
        axes.set_xticks(range(len(chosen)), labels, rotation=90, fontsize=7)
        axes.set_yticks(range(len(chosen)), labels, fontsize=7)
        axes.set(title=no_formula(name), xlabel="detected as", ylabel="object")
    figure.colorbar(image, ax=figure.axes, label="%", shrink=0.8)
    return to_png(figure)
