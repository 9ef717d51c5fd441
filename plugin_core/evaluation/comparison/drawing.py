"""Small PNGs of the report's figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from plugin_core.inspection.sheets import no_formula

if TYPE_CHECKING:  # drawing alone needs matplotlib
    from matplotlib.figure import Figure

LARGEST = 110_000  # bytes of a PNG, so that a whole report has about 1 MB


def new_figure(width: float, height: float) -> Figure:
    """Start a figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """Write a figure as PNG, in 256 colours where it would be large."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    if buffer.tell() <= LARGEST:
        return buffer.getvalue()
    return palette_png(Image.open(buffer).convert("RGB"))


def palette_png(picture: Image.Image) -> bytes:
    """Write a picture as PNG in 256 colours."""
    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_bars(
    groups: Sequence[str], series: Mapping[str, Sequence[float | None]], label: str
) -> bytes:
    """Draw groups of bars, one bar of each series in each, as PNG.

    Args:
        groups: labels of the groups.
        series: a value for each group, by name; "n/a" is written where there is none.
        label: of the values.
    """
    figure = new_figure(max(5.0, 1.5 + 0.32 * len(groups) * (len(series) + 1)), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [group + (i + 0.5) * width - 0.4 for group in range(len(groups))]
        heights = [value or 0 for value in values]
        axes.bar(places, heights, width, color=f"C{i}", label=no_formula(name))
        for place, value in zip(places, values, strict=True):
            if value is None:  # not the same as 0
                axes.text(place, 0, "n/a", color=f"C{i}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups), parse_math=False)
    axes.set_ylabel(label)
    grid_and_legend(axes, "y", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)  # off the bars
    return to_png(figure)


def grid_and_legend(axes: Any, which: Any = "both", **place: Any) -> None:
    """Put a light grid behind what is drawn, and name it."""
    axes.grid(axis=which, alpha=0.4)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, **place)
