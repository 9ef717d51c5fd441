"""Drawing a scene: the image, and the object seen in each pixel.

Objects are filled at ``SUPERSAMPLE`` times the image's resolution and averaged down. This gives
antialiased edges and, from the same raster, masks to a quarter of a pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .scene import Scene, Texture, Thing
from .shapes import bounds, fill
from .vocabulary import OBJECT_COLORS, STUFF_COLORS

SUPERSAMPLE = 4
_SKINS = ((236, 188, 152), (205, 150, 112), (150, 100, 70), (100, 66, 48))
_HAIRS = ((45, 32, 26), (96, 60, 30), (70, 70, 74))
_TROUSERS = ((48, 58, 92), (70, 62, 56), (34, 36, 40), (96, 104, 112))

Field = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rendering:
    """A drawn scene of H by W pixels.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        things: (H, W) uint8, number of the object seen, counted from 1; 0 is background.
        things_fine: the same at ``SUPERSAMPLE`` times the resolution.
        stuff: (H, W) uint8, background category id, also behind the objects.
    """

    image: NDArray[np.uint8]
    things: NDArray[np.uint8]
    things_fine: NDArray[np.uint8]
    stuff: NDArray[np.uint8]


def render(scene: Scene, size: int, rng: np.random.Generator) -> Rendering:
    """Draw a scene with a long side of ``size`` pixels; ``rng`` gives the backgrounds' noise."""
    width, height = scene.pixels(size)
    stuff = _stuff_map(scene, width, height, size)
    canvas = np.zeros((height, width, 3), np.float32)
    for category_id in scene.stuff:
        ground = _ground(category_id, width, height, size, rng)
        np.copyto(canvas, ground, where=(stuff == category_id)[..., None])
    fine = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    things = np.zeros((height, width), np.uint8)
    for number, thing in enumerate(scene.things, start=1):
        _draw_thing(canvas, things, fine, thing, number, size, rng)
    canvas += 2.5 * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return Rendering(image, things, fine, stuff)


def _draw_thing(
    canvas: Field,
    things: NDArray[np.uint8],
    fine: NDArray[np.uint8],
    thing: Thing,
    number: int,
    size: int,
    rng: np.random.Generator,
) -> None:
    """Paint one object over ``canvas`` and write its number into both label maps."""
    height, width = things.shape
    x0, y0, x1, y1 = (value * size for value in bounds(thing.outline))
    left, top = max(int(x0) - 1, 0), max(int(y0) - 1, 0)
    right, bottom = min(int(x1) + 2, width), min(int(y1) + 2, height)
    paints = _paints(thing, rng)
    names = list(paints)
    raster = np.zeros(((bottom - top) * SUPERSAMPLE, (right - left) * SUPERSAMPLE), np.uint8)
    origin = (left * SUPERSAMPLE, top * SUPERSAMPLE)
    for part in thing.outline:
        scaled = part.moved(size * SUPERSAMPLE, (0, 0))
        fill(raster, scaled, names.index(part.paint) + 1, origin)

    window = (slice(top, bottom), slice(left, right))
    shape = (right - left, bottom - top)
    coverage = _average((raster > 0).astype(np.float32), shape)
    patch = canvas[window]
    patch *= 1 - coverage[..., None]
    for index, name in enumerate(names, start=1):
        share = _average((raster == index).astype(np.float32), shape)
        tone = np.asarray(paints[name], np.float32)
        if name in ("body", "shirt"):
            tone = _textured(tone, thing, left, top, shape, size)
        patch += share[..., None] * tone
    things[window][coverage >= 0.5] = number
    rows = slice(top * SUPERSAMPLE, bottom * SUPERSAMPLE)
    columns = slice(left * SUPERSAMPLE, right * SUPERSAMPLE)
    fine[rows, columns][raster > 0] = number


def _average(fine: Field, shape: tuple[int, int]) -> Field:
    """Average over SUPERSAMPLE² blocks; ``shape`` is (width, height)."""
    return np.asarray(cv2.resize(fine, shape, interpolation=cv2.INTER_AREA), np.float32)


def _paints(thing: Thing, rng: np.random.Generator) -> dict[str, tuple[int, ...]]:
    """Choose the colour of each paint; a person's named colour is the shirt's."""
    color = OBJECT_COLORS[thing.color]
    if thing.pose is None:
        return {"body": color}
    skin = _SKINS[rng.integers(len(_SKINS))]
    return {
        "shirt": color,
        "sleeve": tuple(int(0.82 * value) for value in color),
        "skin": skin,
        "nose": tuple(int(0.75 * value) for value in skin),
        "hair": _HAIRS[rng.integers(len(_HAIRS))],
        "trousers": _TROUSERS[rng.integers(len(_TROUSERS))],
        "shoe": (30, 26, 24),
        "eye": (20, 20, 24),
    }


def _textured(
    tone: Field, thing: Thing, left: int, top: int, shape: tuple[int, int], size: int
) -> Field:
    """Paint the object's texture (h, w, 3) in the window at (left, top)."""
    ys, xs = np.mgrid[0 : shape[1], 0 : shape[0]].astype(np.float32)
    scale = 1 / (thing.side * size)
    xs = (xs + (left + 0.5 - thing.center[0] * size)) * scale
    ys = (ys + (top + 0.5 - thing.center[1] * size)) * scale
    # A stripe on a shirt must be as fine as the shirt, not as the figure.
    repeats = thing.texture.repeats * (1.0 if thing.pose is None else 2.0)
    weight = _pattern(thing.texture, xs, ys, repeats)[..., None]
    second = np.asarray(thing.texture.second, np.float32)
    return tone * (1 - weight) + second * weight


def _pattern(texture: Texture, xs: Field, ys: Field, repeats: float) -> Field:
    """Compute the weight 0…1 of the second tone at object coordinates of about -0.5…0.5."""
    if texture.kind == "plain":
        return np.zeros_like(xs)
    cos, sin = np.float32(np.cos(texture.angle)), np.float32(np.sin(texture.angle))
    along, across = xs * cos + ys * sin, ys * cos - xs * sin
    if texture.kind == "shaded":
        return np.clip(along + 0.5, 0, 1)
    turn = np.float32(2 * np.pi)
    first = np.sin(turn * (along * repeats + texture.phase))
    if texture.kind == "striped":
        return _step(first)
    second = np.sin(turn * (across * repeats + texture.phase))
    if texture.kind == "checkered":
        return _step(2 * first * second)
    return _step(first * second - 0.35)  # dotted


def _step(wave: NDArray[np.floating]) -> Field:
    """Give 0 or 1 by the sign of a wave, with a soft edge against aliasing."""
    return np.clip(0.5 + 2 * wave, 0, 1).astype(np.float32)


def _stuff_map(scene: Scene, width: int, height: int, size: int) -> NDArray[np.uint8]:
    """Draw (H, W) background category ids; two stuffs meet at a slightly wavy horizon."""
    stuff = np.full((height, width), scene.stuff[-1], np.uint8)
    if len(scene.stuff) == 2:
        position = (np.arange(width) + 0.5) / width
        level = scene.horizon[0] + position * (scene.horizon[1] - scene.horizon[0])
        level = level + 0.012 * np.sin(2 * np.pi * (1.5 * position + 10 * scene.horizon[0]))
        rows = (np.arange(height) + 0.5) / size
        stuff[rows[:, None] < level[None, :]] = scene.stuff[0]
    return stuff


def _noise(rng: np.random.Generator, width: int, height: int, cell: float, ratio: float) -> Field:
    """Draw smooth noise (H, W), deviation 1; cells ``cell`` pixels high, ``ratio`` times wider."""
    rows, columns = int(height / cell) + 3, int(width / (cell * ratio)) + 3
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def _ground(
    category_id: int, width: int, height: int, size: int, rng: np.random.Generator
) -> Field:
    """Draw the texture (H, W, 3) of one stuff class; patterns scale with the image."""
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32) / np.float32(size)
    patches = _noise(rng, width, height, size / 5, 1)
    base = np.asarray(STUFF_COLORS[category_id], np.float32)
    base = base * np.float32(rng.uniform(0.93, 1.07))
    tone = _TONES[category_id](xs, ys, patches, size, rng)
    return base + tone[..., None]


def _grass(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    blades = _noise(rng, xs.shape[1], xs.shape[0], size / 22, 0.3)
    return 9 * blades + 5 * patches


def _sand(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    grain = rng.standard_normal(xs.shape, dtype=np.float32)
    return 7 * grain + 4 * patches


def _water(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    drift = _noise(rng, xs.shape[1], xs.shape[0], size / 8, 2)
    return 11 * np.sin(2 * np.pi * (14 * ys) + 1.3 * drift + np.float32(rng.uniform(0, 6)))


def _brick(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    rows, columns = 12, 6
    row = np.floor(ys * rows)
    shifted = xs * columns + 0.5 * (row % 2)
    joint = ((ys * rows) % 1 < 0.16) | (shifted % 1 < 0.08)
    shades = 7 * rng.standard_normal((rows + 1, columns + 2), dtype=np.float32)
    tone = shades[row.astype(int) % (rows + 1), np.floor(shifted).astype(int) % (columns + 2)]
    return np.where(joint, np.float32(24), tone)


def _stone(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    pebbles = _noise(rng, xs.shape[1], xs.shape[0], size / 14, 1.3)
    return 20 * np.tanh(1.5 * pebbles) * 0.6 + 4 * patches


def _sky(xs: Field, ys: Field, patches: Field, size: int, rng: np.random.Generator) -> Field:
    clouds = _noise(rng, xs.shape[1], xs.shape[0], size / 7, 2)
    return 22 * ys + 9 * np.maximum(clouds, 0) + 2 * patches


_TONES = {8: _grass, 9: _sand, 10: _water, 11: _brick, 12: _stone, 13: _sky}
