"""Outlines of the drawn classes, and their rasters.

Coordinates are (x, y), y down. An outline is a list of parts. A part is a set of closed contours
and the name of a paint. The even-odd rule fills it: a second contour inside the first is a hole.
The bounding box of a unit outline is centred on the origin, and its longer side is 1.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n, 2)
_SUBPIXEL_BITS = 4


@dataclass(frozen=True)
class Part:
    """One painted region: ``contours`` of (n, 2) points, even-odd, filled with ``paint``."""

    contours: tuple[Points, ...]
    paint: str = "body"

    def moved(self, scale: float, shift: tuple[float, float]) -> "Part":
        """Scale the part by ``scale``, then move it by ``shift``."""
        offset = np.asarray(shift)
        return Part(tuple(points * scale + offset for points in self.contours), self.paint)


def circle(center: tuple[float, float], radius: float, count: int = 16) -> Points:
    """Place ``count`` points on a circle, (count, 2)."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.asarray(center) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def bounds(parts: list[Part]) -> tuple[float, float, float, float]:
    """Find the bounding box (x0, y0, x1, y1) of all the parts."""
    points = np.concatenate([contour for part in parts for contour in part.contours])
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def normalisation(parts: list[Part]) -> tuple[float, tuple[float, float]]:
    """Find the scale and shift that make an outline a unit outline."""
    x0, y0, x1, y1 = bounds(parts)
    scale = 1 / max(x1 - x0, y1 - y0)
    return scale, (-scale * (x0 + x1) / 2, -scale * (y0 + y1) / 2)


def shape_outline(name: str, angle: float, variation: float) -> list[Part]:
    """Draw the unit outline of a shape class.

    Args:
        name: a shape of ``vocabulary.THINGS``, or "pebble".
        angle: rotation in radians.
        variation: 0…1, by class: side ratio, thickness or pointedness.
    """
    contours = _contours(name, variation)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = tuple(points @ np.array([[cos, sin], [-sin, cos]]) for points in contours)
    scale, shift = normalisation([Part(turned)])
    return [Part(turned).moved(scale, shift)]


def _contours(name: str, variation: float) -> list[Points]:
    if name == "disk":
        return [circle((0, 0), 1, 64)]
    if name == "pebble":  # an ellipse too flat for a disk
        return [circle((0, 0), 1, 64) * np.array([1, 0.55 + 0.2 * variation])]
    if name == "ring":
        return [circle((0, 0), 1, 64), circle((0, 0), 0.5 + 0.15 * variation, 64)]
    if name == "square":
        side = 0.85 + 0.15 * variation
        return [np.array([[-1, -side], [1, -side], [1, side], [-1, side]])]
    if name == "triangle":
        return [circle((0, 0), 1, 3) * np.array([0.9 + 0.3 * variation, 1])]
    if name == "star":
        points = circle((0, 0), 1, 10)
        points[1::2] *= 0.38 + 0.1 * variation
        return [points]
    if name == "cross":
        arm = 0.26 + 0.12 * variation
        quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
        turn = np.array([[0, 1], [-1, 0]])
        quarters = [quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]
        return [np.concatenate(quarters).astype(np.float64)]
    raise ValueError(f"name: unknown shape {name!r}")


def fill(canvas: NDArray[np.uint8], part: Part, value: int, origin: tuple[float, float]) -> None:
    """Fill a part on ``canvas`` (h, w), in pixels; the canvas's corner is at ``origin`` (x, y)."""
    # cv2's integer coordinates are pixel centres, ours are continuous. Hence the half pixel.
    corner = np.asarray(origin) + 0.5
    fixed = [
        np.round((points - corner) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        for points in part.contours
    ]
    cv2.fillPoly(canvas, fixed, value, lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS)
