"""Reporting the contextual bias of a detector: a table, the numbers as JSON, a figure."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from plugin_core.evaluation.context_bias import NUMBERS, ClassBias, means
from plugin_core.files import replacing

GEOMETRY = {"bbox": "box", "segm": "mask"}  # by IoU type


@dataclass(frozen=True)
class Report:
    """Measurements of a detector's contextual bias, and their description.

    Args:
        classes: the measurements.
        iou_type: "bbox" or "segm".
        score_threshold: of a false positive, 0…1.
        companions: origin of the companions, in words.
        title: results and annotations, in words.
        note: text for below the table, if any.
    """

    classes: Sequence[ClassBias]
    iou_type: str
    score_threshold: float
    companions: str
    title: str
    note: str = ""

    def text(self) -> str:
        """Return the title, the table, and an explanation of its numbers."""
        notes = [
            f"AP ({GEOMETRY[self.iou_type]}) and FP rates in percent, gap in percentage points; "
            "-: nothing to measure.",
            "FP rate: of the images without the class, those in which it is detected with a score "
            f"of at least {self.score_threshold:g}.",
            "Gap at equal counts: between images that hold equally many objects, of whatever "
            "class.",
            f"Companions: {self.companions}.",
            *([self.note] if self.note else []),
        ]
        return "\n\n".join([self.title, table(self.classes), "\n".join(notes)])

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write context_bias.json, .md and .png, each whole or not at all.

        Args:
            folder: that exists.
            settings: of the measurement, for the JSON file.
        """
        averages = means(self.classes)
        content = {
            "settings": settings,
            "companions": self.companions,
            "units": "AP and FP rates in percent, gap in percentage points",
            "classes": [asdict(c) for c in self.classes],
            "mean": {number: {"value": v, "classes": n} for number, (v, n) in averages.items()},
        }
        files = {
            "context_bias.json": json.dumps(content, indent=2).encode() + b"\n",
            "context_bias.md": f"{self.text()}\n".encode(),
            "context_bias.png": draw(self.classes, self.iou_type, self.score_threshold),
        }
        for name, data in files.items():
            with replacing(folder / name) as file:
                file.write(data)


def table(classes: Sequence[ClassBias]) -> str:
    """Lay out the numbers, with the means and the number of classes in each of them."""
    headers = ["class", "companion", "objects in company", "objects alone", *NUMBERS.values()]
    cells = []
    for c in classes:
        counts = (c.objects_in_company, c.objects_alone)
        row = [c.name, c.companion or "none"]
        row += ["-" if count is None else f"{count:,}" for count in counts]
        cells.append(row + [cell(number, getattr(c, number)) for number in NUMBERS])
    averages = means(classes)
    row = [cell(number, mean) for number, (mean, _) in averages.items()]
    cells.append(["mean", "", "", "", *row])
    cells.append(["classes in the mean", "", "", "", *(str(n) for _, n in averages.values())])
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=align)


def cell(number: str, value: float | None) -> str:
    """Write a number of ``NUMBERS`` for the table."""
    if value is None:
        return "-"
    rounded = round(value, 1) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.1f}" if number.startswith("gap") else f"{rounded:.1f}"


def draw(classes: Sequence[ClassBias], iou_type: str, score_threshold: float) -> bytes:
    """Draw bars as PNG: APs on the left, false positives on the right, a row for each class."""
    from matplotlib.figure import Figure

    labels = [*(f"{c.name} ({c.companion or 'none'})" for c in classes), "mean"]
    averages = means(classes)
    figure = Figure(figsize=(11, 1.8 + 0.3 * len(labels)), layout="constrained")
    ap = {"ap_in_company": "in company", "ap_alone": "alone"}
    fp = {"fp_rate_companion_only": "companion only", "fp_rate_neither": "neither"}
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, numbers in ((left, ap), (right, fp)):
        largest = 1.0  # end of the axis if all values are 0
        for number, shift, color in zip(numbers, (-0.2, 0.2), ("C0", "C1"), strict=True):
            values = [*(getattr(c, number) for c in classes), averages[number][0]]
            rows = [row + shift for row in range(len(values))]
            widths = [value or 0 for value in values]
            axes.barh(rows, widths, 0.4, color=color, label=numbers[number])
            for row, value in zip(rows, values, strict=True):
                if value is None:  # not the same as 0
                    axes.text(0, row, " n/a", color=color, va="center", fontsize=7)
            largest = max(largest, *widths)
        axes.axhline(len(classes) - 0.5, color="black", linewidth=0.8)
        axes.set(xlim=(0, 1.05 * largest), ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels, parse_math=False)  # names may have a $
        axes.tick_params(labeltop=True)
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
        place: dict[str, Any] = {
            "loc": "lower center",
            "bbox_to_anchor": (0.5, 1),
            "borderaxespad": 2,
        }
        axes.legend(**place, ncols=2, frameon=False)
    left.set(xlabel=f"{GEOMETRY[iou_type]} AP (%)", ylabel="class (companion)")
    right.set_xlabel(f"images with a false positive of score ≥ {score_threshold:g} (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
