"""Drawing maps over an image, and the sheet of panels that an image gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from plugin_core.files import replacing

if TYPE_CHECKING:  # drawing alone needs matplotlib
    from matplotlib.figure import Figure

PANEL_INCHES = 3.2


@dataclass
class Panel:
    """A picture of the sheet.

    Args:
        title: text above the picture.
        picture: (H, W, 3), RGB.
        file: name of a file for this picture alone.
    """

    title: str
    picture: np.ndarray
    file: str | None = None


@dataclass
class Row:
    """A row of the sheet, with its title at the left."""

    title: str
    panels: list[Panel] = field(default_factory=list)


def overlay(image: np.ndarray, heat: Tensor, box: Tensor) -> np.ndarray:
    """Lay a map (H, W) in colours over an image, where it is not NaN, and a box on top."""
    return with_box(with_colours(image, heat), box)


def with_colours(image: np.ndarray, heat: Tensor) -> np.ndarray:
    """Lay a map (H, W) in colours over an image, where it is not NaN."""
    from matplotlib import colormaps

    values = heat.numpy()
    known = ~np.isnan(values)
    image = image.copy()
    if known.any():
        low, high = values[known].min(), values[known].max()
        colours = 255 * colormaps["turbo"]((values[known] - low) / max(high - low, 1e-12))[:, :3]
        grey = image[known].mean(1, keepdims=True)  # the image's colours would mix with the map's
        image[known] = (grey / 2 + colours / 2).round()
    return image


def with_box(image: np.ndarray, box: Tensor) -> np.ndarray:
    """Draw a box, in pixels of the image, with a white line."""
    picture = Image.fromarray(image)
    width = max(1, round(max(picture.size) / 300))
    ImageDraw.Draw(picture).rectangle(box.round().int().tolist(), outline="white", width=width)
    return np.asarray(picture)


def with_cross(image: np.ndarray, row: int, column: int) -> np.ndarray:
    """Draw a small white cross with a black rim at a pixel."""
    picture = Image.fromarray(image)
    draw, width = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 300))
    arm, half = 4 * width, width // 2
    for colour, rim in (("black", width), ("white", 0)):
        for x, y in ((arm + rim, half + rim), (half + rim, arm + rim)):
            draw.rectangle((column - x, row - y, column + x, row + y), fill=colour)
    return np.asarray(picture)


def write(rows: Sequence[Row], path: str, out: Path) -> None:
    """Write an image's sheet, ``<image>_attention.png``, and the panels with files of their own.

    Args:
        rows: of the sheet.
        path: of the image.
        out: folder that exists.
    """
    stem = Path(path).stem
    for row in rows:
        for panel in row.panels:
            if panel.file:
                with replacing(out / f"{stem}_{panel.file}.png") as file:
                    Image.fromarray(panel.picture).save(file, "PNG")
    with replacing(out / f"{stem}_attention.png") as file:
        sheet(rows, path).savefig(file, format="png", dpi=120)


def sheet(rows: Sequence[Row], title: str) -> Figure:
    """Arrange rows of panels on one figure."""
    from matplotlib.figure import Figure

    columns = max(len(row.panels) for row in rows)
    height, width = rows[0].panels[0].picture.shape[:2]
    # Panels in the image's shape, within limits
    panel_height = PANEL_INCHES * min(max(height / width, 0.5), 1.5) + 0.6
    size = (columns * PANEL_INCHES + 0.8, len(rows) * panel_height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(no_formula(title))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        for panel, ax in zip(row.panels, axes, strict=False):
            ax.imshow(panel.picture)
            ax.set_title(no_formula(panel.title), fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0].set_ylabel(no_formula(row.title), fontsize=9)
        for ax in axes[len(row.panels) :]:
            ax.set_axis_off()
    return figure


def no_formula(text: str) -> str:
    """Escape dollars: Matplotlib takes text between two of them for TeX."""
    return text.replace("$", r"\$")
