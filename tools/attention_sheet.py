"""Pictures of attention over an image, and the sheet that they are panels of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from plugin_core.files import replacing
from plugin_core.inspection.attention_maps import Run

COLORMAP = matplotlib.colormaps["turbo"]
PANEL_INCHES = 3.2


@dataclass
class Panel:
    """A picture of the sheet.

    Args:
        title: above it.
        picture: (H, W, 3), RGB; or a map (rows, columns) that is no image.
        axes: what the rows and the columns of a map are.
        file: by which name it is written as a file of its own too.
    """

    title: str
    picture: np.ndarray
    axes: tuple[str, str] | None = None
    file: str | None = None


@dataclass
class Row:
    title: str
    panels: list[Panel] = field(default_factory=list)


def overlay(done: Run, heat: Tensor, index: int) -> np.ndarray:
    """A map (H, W) in colours over the image, where it is not NaN, and the detection's box."""
    return with_box(with_colours(done.picture.image, heat), done.detections.boxes[index])


def with_colours(image: np.ndarray, heat: Tensor) -> np.ndarray:
    """A map (H, W) in colours over an image, where it is not NaN."""
    values = heat.numpy()
    known = ~np.isnan(values)
    image = image.copy()
    if known.any():
        low, high = values[known].min(), values[known].max()
        colours = 255 * COLORMAP((values[known] - low) / max(high - low, 1e-12))[:, :3]
        grey = image[known].mean(1, keepdims=True)  # whose own colours do not mix with the map's
        image[known] = (grey / 2 + colours / 2).round()
    return image


def with_box(image: np.ndarray, box: Tensor) -> np.ndarray:
    picture = Image.fromarray(image)
    width = max(1, round(max(picture.size) / 300))
    ImageDraw.Draw(picture).rectangle(box.round().int().tolist(), outline="white", width=width)
    return np.asarray(picture)


def with_cross(image: np.ndarray, row: int, column: int) -> np.ndarray:
    """A small white cross, with a black rim, at a pixel."""
    picture = Image.fromarray(image)
    draw, width = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 300))
    arm, half = 4 * width, width // 2
    for colour, rim in (("black", width), ("white", 0)):
        for x, y in ((arm + rim, half + rim), (half + rim, arm + rim)):
            draw.rectangle((column - x, row - y, column + x, row + y), fill=colour)
    return np.asarray(picture)


def write(rows: Sequence[Row], path: str, out: Path) -> None:
    stem = Path(path).stem
    for row in rows:
        for panel in row.panels:
            if panel.file:
                with replacing(out / f"{stem}_{panel.file}.png") as file:
                    Image.fromarray(panel.picture).save(file, "PNG")
    with replacing(out / f"{stem}_attention.png") as file:
        sheet(rows, path).savefig(file, format="png", dpi=120)


def sheet(rows: Sequence[Row], title: str) -> Figure:
    columns = max(len(row.panels) for row in rows)
    height, width = rows[0].panels[0].picture.shape[:2]
    # Panels as high as the image wants them, within reason
    panel_height = PANEL_INCHES * min(max(height / width, 0.5), 1.5) + 0.6
    size = (columns * PANEL_INCHES + 0.8, len(rows) * panel_height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(_no_formula(title))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        for panel, ax in zip(row.panels, axes, strict=False):
            if panel.axes is None:
                ax.imshow(panel.picture)
            else:
                ax.imshow(panel.picture, cmap=COLORMAP, aspect="auto", interpolation="nearest")
                ax.set_ylabel(panel.axes[0])
                ax.set_xlabel(panel.axes[1])
            ax.set_title(_no_formula(panel.title), fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0].set_ylabel(_no_formula(row.title), fontsize=9)
        for ax in axes[len(row.panels) :]:
            ax.set_axis_off()
    return figure


def _no_formula(text: str) -> str:
    """As Matplotlib shows it as it is; it takes what is between two dollars for TeX."""
    return text.replace("$", r"\$")
