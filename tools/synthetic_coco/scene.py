"""Contents of an image, chosen before a pixel is drawn.

A scene is measured in units of the image's long side. So the same seed gives the same scene at
every ``--size``. Statistics of the classes can be computed from scenes alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .figure import Pose, figure_outline, sample_pose
from .shapes import Part, bounds, fill, shape_outline
from .vocabulary import (
    CLASS_COLORS,
    OBJECT_COLORS,
    PEBBLE_COLOR,
    PERSON_ID,
    RGB,
    SKY_ID,
    STUFF,
    STUFF_COLORS,
    TEXTURES,
    THINGS,
    companion_groups,
    companions,
)

SPLITS = ("train", "val")
MAX_OBJECTS = 4
MIN_VISIBLE = 0.65  # of an object's area; others may hide the rest, or it lies outside
MIN_SIDE = 0.17
GRID = 128  # cells along the long side when overlap is measured
_ATTEMPTS = 80

# Longer side of an object's box, before occlusion.
SIZES = {"small": (0.2, 0.28), "medium": (0.28, 0.38), "large": (0.38, 0.5)}
# A figure is thin: it needs more height than a shape to be as readable.
PERSON_SIZES = {"small": (0.32, 0.4), "medium": (0.4, 0.48), "large": (0.48, 0.58)}


@dataclass(frozen=True)
class Settings:
    """Options that change the contents of scenes.

    Attributes:
        classes: number of object classes, 2…7, taken from the head of ``THINGS``.
        context_bias: probability P (0.5…1) of a class's companion in a train image that holds the
            class; in val it is 1 - P. None: classes are drawn independently.
        imbalance: ratio (≥ 1) of the first class's frequency to the last's in train.
        class_colors: give all objects of a class one colour.
        ambiguous: probability (0…1) that one object of an image is drawn as a pebble, whatever its
            class.
        classification: one object in each image.
    """

    classes: int = len(THINGS)
    context_bias: float | None = None
    imbalance: float = 1.0
    class_colors: bool = False
    ambiguous: float = 0.0
    classification: bool = False


@dataclass(frozen=True)
class Texture:
    """A two-tone pattern; ``angle`` in radians, ``repeats`` over the object, ``phase`` 0…1."""

    kind: str
    angle: float
    repeats: float
    phase: float
    second: RGB


@dataclass(frozen=True, eq=False)
class Thing:
    """One object: ``outline`` in units of the long side, ``color`` by name, ``size`` by name.

    A person that is drawn as a pebble has no pose.
    """

    category_id: int
    outline: list[Part]
    color: str
    size: str
    texture: Texture
    center: tuple[float, float]
    side: float
    pose: Pose | None = None

    def keypoints(self) -> NDArray[np.float64]:
        """Place COCO's keypoints (17, 2) of a person, in units of the long side."""
        if self.pose is None:
            raise ValueError(f"category_id: {self.category_id} has no keypoints, only person has")
        return np.add(self.pose.keypoints * self.side, self.center)


@dataclass(frozen=True, eq=False)
class Scene:
    """An image's contents.

    Attributes:
        aspect: (width, height) with the longer one 1 and the other 0.75…1.
        stuff: one background category id, or two from top to bottom.
        horizon: heights of the line between two stuffs, at the left and at the right edge.
        things: objects from back to front.
    """

    aspect: tuple[float, float]
    stuff: tuple[int, ...]
    horizon: tuple[float, float]
    things: tuple[Thing, ...]

    def pixels(self, size: int) -> tuple[int, int]:
        """Compute the image's (width, height) for a long side of ``size``."""
        return round(self.aspect[0] * size), round(self.aspect[1] * size)


def image_generator(seed: int, split: str, index: int) -> np.random.Generator:
    """Make an image's own generator, so that the image depends on no other."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def sample_scene(rng: np.random.Generator, split: str, settings: Settings) -> Scene:
    """Draw a scene of 1…4 objects, each at least ``MIN_VISIBLE`` visible."""
    short = float(rng.uniform(0.75, 1))
    aspect = (1.0, short) if rng.random() < 0.5 else (short, 1.0)
    stuff, horizon = _sample_background(rng, aspect)
    # Without the option no number is drawn, so that scenes stay what they were.
    is_ambiguous = settings.ambiguous > 0 and rng.random() < settings.ambiguous
    categories = sample_categories(rng, split, settings, is_ambiguous)
    pebble = None
    if is_ambiguous:
        pebble = 0 if settings.context_bias is not None else int(rng.integers(len(categories)))
    colors = _sample_colors(rng, stuff, len(categories))
    if settings.class_colors:
        colors = [CLASS_COLORS[category_id] for category_id in categories]
    things: list[Thing] = []
    visible = np.zeros((round(aspect[1] * GRID), round(aspect[0] * GRID)), np.uint8)
    full: list[int] = []
    for i, (category_id, color) in enumerate(zip(categories, colors, strict=True)):
        name = "pebble" if i == pebble else THINGS[category_id - 1].name
        if name == "pebble" and settings.class_colors:
            color = PEBBLE_COLOR
        placed = _place(rng, category_id, name, color, aspect, visible, full)
        # A very crowded image may have no room left. Then the object is left out.
        if placed is not None:
            thing, visible, area = placed
            things.append(thing)
            full.append(area)
    return Scene(aspect, stuff, horizon, tuple(things))


def sample_categories(
    rng: np.random.Generator, split: str, settings: Settings, is_ambiguous: bool = False
) -> list[int]:
    """Draw the category ids of an image's objects, in drawing order."""
    if settings.context_bias is not None:
        probability = settings.context_bias if split == "train" else 1 - settings.context_bias
        draw = _two_categories if is_ambiguous else _biased_categories
        return draw(rng, settings.classes, probability)
    ratio = settings.imbalance if split == "train" else 1.0
    frequencies = class_frequencies(settings.classes, ratio)
    count = 1 if settings.classification else int(rng.integers(1, MAX_OBJECTS + 1))
    return [int(index) + 1 for index in rng.choice(settings.classes, count, p=frequencies)]


def class_frequencies(classes: int, imbalance: float) -> NDArray[np.float64]:
    """Compute shares (classes,) of sum 1. They fall geometrically, by ``imbalance`` in all."""
    weights: NDArray[np.float64] = np.power(imbalance, -np.linspace(0, 1, classes))
    return weights / weights.sum()


def _biased_categories(rng: np.random.Generator, classes: int, probability: float) -> list[int]:
    """Draw classes with P(companion in the image | class in the image) = ``probability`` exactly.

    An image shows one or two groups of companions (``companion_groups``). A group of k appears
    whole with probability t. Otherwise one of its classes appears alone. So
    P(companion | class) = t / (t + (1 - t)/k), solved for t.
    """
    groups = companion_groups(classes)
    order = rng.permutation(len(groups))[: int(rng.integers(1, 3))]
    present: list[int] = []
    for group in (groups[position] for position in order):
        # Decided by the group's full size. Otherwise the room left by the first group would change
        # the conditional probability in the second.
        if len(present) + len(group) > MAX_OBJECTS:
            continue
        size = len(group)
        whole = probability / (size * (1 - probability) + probability)
        present += group if rng.random() < whole else [group[rng.integers(size)]]
    extra = int(rng.integers(0, 2)) if len(present) < MAX_OBJECTS else 0
    present += [int(rng.choice(present)) for _ in range(extra)]
    return [present[position] for position in rng.permutation(len(present))]


def _two_categories(rng: np.random.Generator, classes: int, probability: float) -> list[int]:
    """Draw a pebble's class and, with ``probability``, its companion; else a third class, if any.

    So the other object's class tells the pebble's. Among three or four objects the companion that
    is missing would tell it, which detectors are slow to learn.
    """
    pairs = companions(classes)
    category_id = int(rng.integers(1, classes + 1))
    others = [c for c in pairs if c not in (category_id, pairs[category_id])]
    if others and rng.random() >= probability:
        return [category_id, int(rng.choice(others))]
    return [category_id, pairs[category_id]]


def _sample_background(
    rng: np.random.Generator, aspect: tuple[float, float]
) -> tuple[tuple[int, ...], tuple[float, float]]:
    ids = [category.id for category in STUFF]
    grounds = [category_id for category_id in ids if category_id != SKY_ID]
    level = aspect[1] * rng.uniform(0.3, 0.65)
    tilt = aspect[1] * rng.uniform(-0.06, 0.06)
    bottom = int(rng.choice(grounds))
    if rng.random() < 0.45:
        return (bottom,), (level, level)
    top = int(rng.choice([category_id for category_id in ids if category_id != bottom]))
    return (top, bottom), (level - tilt, level + tilt)


def _sample_colors(rng: np.random.Generator, stuff: tuple[int, ...], count: int) -> list[str]:
    """Draw ``count`` different colours that stand out from every background of the image."""
    clear = [
        name
        for name, color in OBJECT_COLORS.items()
        if all(np.linalg.norm(np.subtract(color, STUFF_COLORS[ground])) > 95 for ground in stuff)
    ]
    return [str(name) for name in rng.permutation(clear)[:count]]


def _place(
    rng: np.random.Generator,
    category_id: int,
    name: str,
    color: str,
    aspect: tuple[float, float],
    visible: NDArray[np.uint8],
    full: list[int],
) -> tuple[Thing, NDArray[np.uint8], int] | None:
    """Find room for one more object in front of the others.

    ``visible`` (rows, columns) is the grid with the number of the object seen, from 1. ``full`` has
    the whole area of each object. ``name`` tells the outline. Returns the object, the new grid and
    the object's whole area.
    """
    is_figure = name == THINGS[PERSON_ID - 1].name
    sizes = PERSON_SIZES if is_figure else SIZES
    size = str(rng.choice(list(sizes)))
    side = float(rng.uniform(*sizes[size]))
    texture = _sample_texture(rng, color)
    pose = sample_pose(rng) if is_figure else None
    angle, variation = rng.uniform(0, 2 * np.pi), rng.uniform()
    unit = figure_outline(pose) if pose else shape_outline(name, angle, variation)
    for attempt in range(_ATTEMPTS):
        if attempt % 8 == 7:
            side = max(side * 0.92, MIN_SIDE)
        center = _sample_center(rng, unit, side, aspect)
        outline = [part.moved(side, center) for part in unit]
        area, grid = _paste(outline, visible, len(full) + 1)
        areas = np.bincount(grid.ravel(), minlength=len(full) + 2)[1:]
        if (areas >= MIN_VISIBLE * np.array([*full, area])).all():
            size = next((key for key, (_, high) in sizes.items() if side <= high), "large")
            thing = Thing(category_id, outline, color, size, texture, center, side, pose)
            return thing, grid, area
    return None


def _sample_center(
    rng: np.random.Generator, unit: list[Part], side: float, aspect: tuple[float, float]
) -> tuple[float, float]:
    """Draw a centre that keeps the box in the image; one object in eight may cross an edge."""
    x0, y0, x1, y1 = (side * value for value in bounds(unit))
    overhang = 0.25 * side if rng.random() < 0.125 else -0.01
    low = np.array([-x0, -y0]) - overhang
    high = np.array([aspect[0] - x1, aspect[1] - y1]) + overhang
    x, y = rng.uniform(np.minimum(low, high), high)
    return float(x), float(y)


def _paste(
    outline: list[Part], visible: NDArray[np.uint8], number: int
) -> tuple[int, NDArray[np.uint8]]:
    """Find an outline's whole area in grid cells, and the grid with the outline in front."""
    rows, columns = visible.shape
    margin = GRID // 4
    mask = np.zeros((rows + 2 * margin, columns + 2 * margin), np.uint8)
    for part in outline:
        fill(mask, part.moved(GRID, (margin, margin)), 1, (0, 0))
    inside = mask[margin : margin + rows, margin : margin + columns]
    return int(mask.sum()), np.where(inside, np.uint8(number), visible)


def _sample_texture(rng: np.random.Generator, color: str) -> Texture:
    kind = str(rng.choice(TEXTURES))
    base = np.array(OBJECT_COLORS[color], float)
    # Light colours get a darker second tone, and dark colours a lighter one. The hue stays, so that
    # the shape looks like one surface.
    target = 0.0 if base.mean() > 110 else 255.0
    second = base + rng.uniform(0.28, 0.45) * (target - base)
    return Texture(
        kind,
        float(rng.uniform(0, np.pi)),
        float(rng.uniform(3, 5)),
        float(rng.uniform()),
        (int(second[0]), int(second[1]), int(second[2])),
    )
