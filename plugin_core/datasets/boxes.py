"""Checks of boxes and areas."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_core.datasets.coco_file import UNSET, Annotation, CocoFile, polygons_of
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.masks import is_around, object_area
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, number

_DROP = both("leaves them out of the training")
_STOP = both("stops with a traceback")
_EDGE = 2.0  # pixels by which boxes of COCO itself may stick out of their image
_RELATIVE = 0.05  # share of boxes in 0 to 1 from which on it is no chance
_WITNESSES = 500  # polygons that tell what the boxes are


def check_boxes(
    content: CocoFile, image_index: Sequence[int], report: Report, mends: Mends
) -> NDArray[np.float64]:
    """Check boxes against their images.

    Returns:
        Boxes (annotations, 4) as x, y, width, height in pixels; NaN where there is none, or
        where it is in parts of the image.
    """
    annotations = content.annotations
    place = Places(content, image_index)
    boxes = _read_boxes(annotations, place, report, mends)
    if not len(boxes):
        return boxes
    sizes = image_sizes(content, mends)[np.asarray(image_index)]
    sizes[np.asarray(image_index) < 0] = np.nan
    x, y, w, h = boxes.T
    width, height = sizes.T
    known = np.asarray(np.isfinite(boxes).all(1))
    inside = np.asarray(known & np.isfinite(sizes).all(1))
    with np.errstate(invalid="ignore"):
        relative = inside & (boxes >= -0.01).all(1) & (boxes <= 1.01).all(1)
        relative &= (boxes[:, 2:] > 0).all(1) & (sizes > 2).all(1)
    report.add(
        "relative-boxes",
        ERROR if relative.sum() >= _RELATIVE * inside.sum() else WARNING,
        "boxes in parts of the image (0 to 1) instead of pixels",
        place.of(np.flatnonzero(relative)),
        left={
            "detectron2": "trains on boxes smaller than a pixel",
            "mmdetection": "leaves these boxes out",
        },
        remedy="multiply x and width by the image's width, y and height by its height",
    )
    boxes[relative] = np.nan  # nothing else is said of them
    inside, known = inside & ~relative, known & ~relative
    areas = as_array([a.area for a in annotations])
    if _are_corners(annotations, boxes, sizes, areas, np.flatnonzero(inside)):
        report.add(
            "corners",
            ERROR,
            "boxes that look like corners x1, y1, x2, y2, where COCO's are x, y, width, height",
            place.of(np.flatnonzero(inside)),
            left=both("trains on boxes that reach too far"),
            remedy="write [x1, y1, x2 - x1, y2 - y1]",
        )
        return boxes
    _check_copies(annotations, boxes, image_index, known, place, report)
    clipped = _check_extents(boxes, sizes, inside, known, place, report, mends)
    _check_areas(annotations, boxes, clipped, areas, known, place, report, mends)
    return boxes


def _check_copies(
    annotations: Sequence[Annotation],
    boxes: NDArray[np.float64],
    image_index: Sequence[int],
    known: NDArray[np.bool_],
    place: Places,
    report: Report,
) -> None:
    """Check for objects that are listed twice: of the same image, class and box."""
    rows = np.column_stack([image_index, boxes])
    # A number for a row, as sorting rows takes many times longer
    keys = (rows * [1.0, 0.5772, 0.3183, 0.2718, 0.1414]).sum(1)
    order = np.argsort(keys, kind="stable")
    order = order[known[order]]
    near = np.flatnonzero(np.diff(keys[order]) == 0)
    copies = [
        int(second)
        for first, second in zip(order[near], order[near + 1], strict=True)
        if (rows[first] == rows[second]).all()
        and annotations[first].category_id == annotations[second].category_id
    ]
    report.add(
        "object-twice",
        WARNING,
        "objects that are listed twice, with the same image, class and box",
        place.of(sorted(copies)),
        left=both("trains on them twice, and counts one of them as never found"),
        remedy="take the copies out; was a file merged twice?",
    )


def _check_extents(
    boxes: NDArray[np.float64],
    sizes: NDArray[np.float64],
    inside: NDArray[np.bool_],
    known: NDArray[np.bool_],
    place: Places,
    report: Report,
    mends: Mends,
) -> NDArray[np.float64]:
    """Check where boxes are; returns them within their images."""
    x, y, w, h = boxes.T
    width, height = sizes.T
    with np.errstate(invalid="ignore"):
        reversed_ = known & ((w < 0) | (h < 0))
        empty = known & ~reversed_ & ((w == 0) | (h == 0))
        outside = inside & ~reversed_ & ~empty
        outside &= (x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0)
        tiny = known & ~reversed_ & ~empty & ~outside & ((w < 1) | (h < 1))
        over = np.maximum.reduce([-x, -y, x + w - width, y + h - height])
        sticks = inside & ~reversed_ & ~empty & ~outside & (over > 0.01)
    for kind, what, mask in (
        ("reversed-box", "boxes of negative width or height", reversed_),
        ("empty-box", "boxes of no width or height", empty),
        ("outside-box", "boxes outside of their image", outside),
    ):
        places = np.flatnonzero(mask)
        report.add(kind, WARNING, what, place.of(places), left=_DROP, mended="fix")
        mends.drop("annotations", *places.tolist())
    report.add(
        "tiny-box",
        WARNING,
        "boxes smaller than a pixel",
        place.of(np.flatnonzero(tiny)),
        left={"mmdetection": "leaves them out of the training"},
        remedy="are they in pixels?",
    )
    report.add(
        "box-over-edge",
        NOTE,
        f"boxes that reach up to {_EDGE:.0f} pixels over the edge of their image",
        place.of(np.flatnonzero(sticks & (over <= _EDGE))),
        mended="fix",
        left=both("clips them"),
    )
    far = np.flatnonzero(sticks & (over > _EDGE))
    are_many = len(far) >= 8 and len(far) > 0.1 * len(boxes)
    report.add(
        "box-over-image",
        WARNING,
        "boxes that reach out of their image",
        place.of(far),
        mended="" if are_many else "fix",  # clipping would hide a mistake in all of them
        left=both("clips them in training, not in the evaluation"),
        remedy="are they x, y, width, height, and not corners or a center? Is the image another "
        "one, or of another size, than the labels'?"
        if are_many
        else "is the image another one or of another size than the labels'?",
    )
    clipped = boxes.copy()
    for i in [] if are_many else np.flatnonzero(sticks).tolist():
        left, top = max(x[i], 0.0), max(y[i], 0.0)
        right, bottom = min(x[i] + w[i], width[i]), min(y[i] + h[i], height[i])
        clipped[i] = np.round([left, top, right - left, bottom - top], 6)
        mends.fix("annotations", i, "bbox", clipped[i].tolist())
    return clipped


def _check_areas(
    annotations: Sequence[Annotation],
    boxes: NDArray[np.float64],
    clipped: NDArray[np.float64],
    areas: NDArray[np.float64],
    known: NDArray[np.bool_],
    place: Places,
    report: Report,
    mends: Mends,
) -> None:
    values = [a.area for a in annotations]
    missing: list[int] = []
    if not set(map(type, values)) <= {int, float} or not np.isfinite(areas).all():
        wrong = []
        for i, value in enumerate(values):
            if value is UNSET or value is None:
                missing.append(i)
            elif (read := number(value)) is None:
                wrong.append(i)
            elif isinstance(value, str):
                mends.set("annotations", i, "area", read)
                mends.texts.append(place(i))
        report.add("area", ERROR, "areas that are no number", place.of(wrong), left=_STOP)
    report.add(
        "no-area",
        NOTE,
        "annotations without area",
        place.of(missing),
        left={
            "detectron2": "trains, and stops with a KeyError at the evaluation",
            "mmdetection": "stops with a KeyError while it loads the file",
        },
        mended="read",
    )
    for i in missing:
        mends.set("annotations", i, "area", object_area(annotations[i], clipped[i]))
    box_areas, clipped_areas = (b[:, 2] * b[:, 3] for b in (boxes, clipped))
    with np.errstate(invalid="ignore"):
        stale = (areas > 1.05 * clipped_areas + 2) | (abs(areas - box_areas) < 0.01 * box_areas)
        stale &= (clipped != boxes).any(1) & known
        none = known & (areas <= 0) & (box_areas > 0)
        large = known & (box_areas > 0) & (areas > 1.05 * box_areas + 2)
    report.add(
        "area-zero",
        WARNING,
        "areas of 0 or less on boxes that are not empty",
        place.of(np.flatnonzero(none)),
        left={"mmdetection": "leaves these objects out of training and evaluation"},
        remedy="leave area out: it is computed then",
        mended="fix",
    )
    report.add(
        "area-large",
        WARNING,
        "areas larger than their box",
        place.of(np.flatnonzero(large)),
        left=both("takes the objects for larger ones in AP by size"),
        remedy="leave area out: it is computed then",
        mended="fix",
    )
    for i in np.flatnonzero(none | large | stale).tolist():
        mends.fix("annotations", i, "area", object_area(annotations[i], clipped[i]))


def _read_boxes(
    annotations: Sequence[Annotation], place: Places, report: Report, mends: Mends
) -> NDArray[np.float64]:
    values = [a.bbox for a in annotations]
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        numbers = list(chain.from_iterable(values))
        if set(map(type, numbers)) <= {int, float}:
            with suppress(OverflowError):  # of an integer with more than 308 digits
                boxes = np.array(numbers, float).reshape(-1, 4)
                if np.isfinite(boxes).all():
                    return boxes
    boxes = np.full((len(values), 4), np.nan)
    missing, shapes, infinite = [], [], []
    for i, value in enumerate(values):
        if value is UNSET or value is None or value == []:
            missing.append(i)
        elif not isinstance(value, list) or len(value) != 4:
            shapes.append(i)
        elif None in (read := [number(v) for v in value]):
            infinite.append(i)
        else:
            boxes[i] = read
            if any(isinstance(v, str) for v in value):
                mends.set("annotations", i, "bbox", read)
                mends.texts.append(place(i))
    for kind, what, places in (
        ("no-box", "annotations without a box", missing),
        ("box", "boxes that are no list of four numbers", shapes),
        ("box-number", "boxes with something else than finite numbers", infinite),
    ):
        report.add(
            kind,
            ERROR,
            what,
            place.of(places),
            left=_STOP,
            remedy="write bbox as [x, y, width, height] in pixels, or take the annotation out",
        )
    return boxes


def image_sizes(content: CocoFile, mends: Mends) -> NDArray[np.float64]:
    """Give the images' (width, height) in pixels, NaN where they are unknown."""
    columns = [as_array([getattr(i, key) for i in content.images]) for key in ("width", "height")]
    for key, column in zip(("width", "height"), columns, strict=True):
        for place, value in mends.read["images", key].items():
            column[place] = value  # read from the image
    return np.stack(columns, 1) if content.images else np.full((1, 2), np.nan)


def as_array(values: Sequence[Any]) -> NDArray[np.float64]:
    """Make an array of numbers, NaN for whatever is none."""
    if set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):
            return np.array(values, float)
    return np.array([np.nan if (read := number(v)) is None else read for v in values], float)


def _are_corners(
    annotations: Sequence[Annotation],
    boxes: NDArray[np.float64],
    sizes: NDArray[np.float64],
    areas: NDArray[np.float64],
    places: NDArray[np.int_],
) -> bool:
    """Tell whether the boxes at some places are corners, which lie in their images if read so.

    Polygons tell, or else areas. Without either, a third of the boxes has to reach out of the
    image if read as COCO's, and few boxes may do so by chance.
    """
    boxes, sizes, areas = boxes[places], sizes[places], areas[places]
    x1, y1, x2, y2 = boxes.T
    if not len(boxes) or ((x2 > x1) & (y2 > y1)).mean() < 0.9:
        return False
    if ((x2 <= sizes[:, 0] + _EDGE) & (y2 <= sizes[:, 1] + _EDGE)).mean() < 0.9:
        return False
    by_corners = by_size = 0
    for i in range(0, len(boxes), 1 + len(boxes) // _WITNESSES):
        polygons = polygons_of(annotations[places[i]])
        if polygons and all(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
            as_corners = is_around([x1[i], y1[i], x2[i] - x1[i], y2[i] - y1[i]], polygons)
            as_size = is_around(boxes[i], polygons)
            by_corners += as_corners and not as_size
            by_size += as_size and not as_corners
    if by_corners or by_size:
        return by_corners > by_size
    with np.errstate(invalid="ignore"):
        near_corners = np.abs(areas - (x2 - x1) * (y2 - y1)) <= 0.01 * np.abs(areas) + 1
        near_size = np.abs(areas - x2 * y2) <= 0.01 * np.abs(areas) + 1
    if (near_corners | near_size).mean() > 0.5 and near_corners.sum() != near_size.sum():
        return bool(near_corners.sum() > near_size.sum())
    outside = (x1 + x2 > sizes[:, 0] + _EDGE) | (y1 + y2 > sizes[:, 1] + _EDGE)
    return bool(len(boxes) >= 8 and outside.mean() >= 1 / 3)
