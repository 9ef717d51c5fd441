"""Reporting the contextual bias of a detector: a table, the numbers as JSON, a figure."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from plugin_core.evaluation.biased_pairs import PAIR_NUMBERS, PairBias
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
        content = {
            "settings": settings,
            "companions": self.companions,
            "units": "AP and FP rates in percent, gap in percentage points",
            **numbers(self.classes, NUMBERS),
        }
        figure = draw(self.classes, self.iou_type, self.score_threshold)
        write(folder, content, self.text(), figure)


@dataclass(frozen=True)
class PairReport:
    """Measurements by the protocol of :mod:`plugin_core.evaluation.biased_pairs`.

    Args:
        pairs: the measurements.
        companions: origin of the pairs, in words.
        title: results and annotations, in words.
        note: text for below the table, if any.
    """

    pairs: Sequence[PairBias]
    companions: str
    title: str
    note: str = ""

    def text(self) -> str:
        """Return the title, the table, and an explanation of its numbers."""
        headers = ["class", "context", "bias", "images co-occurring", "images exclusive"]
        cells = [
            [
                *(pair.name, pair.companion, "-" if pair.bias is None else f"{pair.bias:.2f}"),
                *(f"{pair.images_co_occurring:,}", f"{pair.images_exclusive:,}"),
            ]
            for pair in self.pairs
        ]
        notes = [
            "Protocol of Singh et al., CVPR 2020: AP (in percent) of an image's best score of the "
            "class, co-occurring or exclusive images against all without the class; gap in "
            "percentage points; -: nothing to measure.",
            f"Pairs: {self.companions}.",
            *([self.note] if self.note else []),
        ]
        table = lay_out(headers, cells, self.pairs, PAIR_NUMBERS)
        return "\n\n".join([self.title, table, "\n".join(notes)])

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write the files of :meth:`Report.write`."""
        content = {
            "settings": settings,
            "companions": self.companions,
            "units": "AP in percent, gap in percentage points",
            **numbers(self.pairs, PAIR_NUMBERS),
        }
        bars = {"ap_co_occurring": "co-occurring", "ap_exclusive": "exclusive"}
        figure = draw_bars(self.pairs, {"AP of images (%)": bars}, "class (context)")
        write(folder, content, self.text(), figure)


def numbers(classes: Sequence[Any], names: Iterable[str]) -> dict[str, Any]:
    """Return measurements and the means of their numbers for JSON."""
    averages = means(classes, names)
    return {
        "classes": [asdict(c) for c in classes],
        "mean": {name: {"value": value, "classes": n} for name, (value, n) in averages.items()},
    }


def write(folder: Path, content: Mapping[str, Any], text: str, figure: bytes) -> None:
    """Write a report's files into a folder that exists, each whole or not at all."""
    files = {
        "context_bias.json": json.dumps(content, indent=2).encode() + b"\n",
        "context_bias.md": f"{text}\n".encode(),
        "context_bias.png": figure,
    }
    for name, data in files.items():
        with replacing(folder / name) as file:
            file.write(data)


def table(classes: Sequence[ClassBias]) -> str:
    """Lay out the numbers, with the means and the number of classes in each of them."""
    headers = ["class", "companion", "objects in company", "objects alone"]
    cells = []
    for c in classes:
        counts = (c.objects_in_company, c.objects_alone)
        row = [c.name, c.companion or "none"]
        cells.append(row + ["-" if count is None else f"{count:,}" for count in counts])
    return lay_out(headers, cells, classes, NUMBERS)


def lay_out(
    headers: list[str],
    cells: list[list[str]],
    classes: Sequence[Any],
    names: Mapping[str, str],
) -> str:
    """Lay out a table.

    Args:
        headers: of the first columns, two of texts and the rest of counts.
        cells: of these columns, for each class.
        classes: measurements.
        names: headers of the last columns, by attribute.
    """
    rows = [
        row + [cell(name, getattr(c, name)) for name in names]
        for row, c in zip(cells, classes, strict=True)
    ]
    averages, empty = means(classes, names), [""] * (len(headers) - 1)
    rows.append(["mean", *empty, *(cell(name, mean) for name, (mean, _) in averages.items())])
    rows.append(["classes in the mean", *empty, *(str(n) for _, n in averages.values())])
    headers = [*headers, *names.values()]
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=align)


def cell(number: str, value: float | None) -> str:
    """Write a number of ``NUMBERS`` for the table."""
    if value is None:
        return "-"
    rounded = round(value, 1) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.1f}" if number.startswith("gap") else f"{rounded:.1f}"


def draw(classes: Sequence[ClassBias], iou_type: str, score_threshold: float) -> bytes:
    """Draw bars as PNG: APs on the left, false positives on the right, a row for each class."""
    ap = {"ap_in_company": "in company", "ap_alone": "alone"}
    fp = {"fp_rate_companion_only": "companion only", "fp_rate_neither": "neither"}
    panels = {
        f"{GEOMETRY[iou_type]} AP (%)": ap,
        f"images with a false positive of score ≥ {score_threshold:g} (%)": fp,
    }
    return draw_bars(classes, panels, "class (companion)")


def draw_bars(
    classes: Sequence[Any], panels: Mapping[str, Mapping[str, str]], rows_are: str
) -> bytes:
    """Draw bars as PNG, a row for each class and one for the mean.

    Args:
        classes: measurements.
        panels: two attributes of a measurement with their labels, by the label of the panel.
        rows_are: label of the rows.
    """
    from matplotlib.figure import Figure

    labels = [*(f"{c.name} ({c.companion or 'none'})" for c in classes), "mean"]
    figure = Figure(figsize=(11, 1.8 + 0.3 * len(labels)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, names) in zip(all_axes, panels.items(), strict=True):
        averages = means(classes, names)
        largest = 1.0  # end of the axis if all values are 0
        for number, shift, color in zip(names, (-0.2, 0.2), ("C0", "C1"), strict=True):
            values = [*(getattr(c, number) for c in classes), averages[number][0]]
            rows = [row + shift for row in range(len(values))]
            widths = [value or 0 for value in values]
            axes.barh(rows, widths, 0.4, color=color, label=names[number])
            for row, value in zip(rows, values, strict=True):
                if value is None:  # not the same as 0
                    axes.text(0, row, " n/a", color=color, va="center", fontsize=7)
            largest = max(largest, *widths)
        axes.axhline(len(classes) - 0.5, color="black", linewidth=0.8)
        axes.set(xlim=(0, 1.05 * largest), ylim=(len(labels) - 0.5, -0.5), xlabel=title)
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
    all_axes[0].set_ylabel(rows_are)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
