"""Checks of boxes and areas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_core.datasets.coco_file import UNSET, Annotation, CocoFile
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.masks import object_area
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, number

_DROP = both("leaves them out of the training")
_STOP = both("stops with a traceback")
_EDGE = 2.0  # pixels by which boxes of COCO itself may stick out of their image


def check_boxes(
    content: CocoFile, image_index: Sequence[int], report: Report, mends: Mends
) -> NDArray[np.float64]:
    """Check boxes against their images.

    Returns:
        Boxes (annotations, 4) as x, y, width, height in pixels; NaN where there is none.
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
    if _are_relative(boxes[inside], sizes[inside]):
        report.add(
            "relative-boxes",
            ERROR,
            "boxes in parts of the image (0 to 1) instead of pixels",
            place.of(np.flatnonzero(inside)),
            left={
                "detectron2": "trains on boxes smaller than a pixel",
                "mmdetection": "drops every box and trains on nothing",
            },
            remedy="multiply x and width by the image's width, y and height by its height",
        )
        return boxes
    areas = _column([a.area for a in annotations])
    if _are_corners(boxes[inside], sizes[inside], areas[inside]):
        report.add(
            "corners",
            ERROR,
            "boxes that look like corners x1, y1, x2, y2, where COCO's are x, y, width, height",
            place.of(np.flatnonzero(inside)),
            left=both("trains on boxes that reach too far"),
            remedy="write [x1, y1, x2 - x1, y2 - y1]",
        )
        return boxes
    _check_extents(content, boxes, sizes, inside, known, place, report, mends)
    _check_areas(annotations, boxes, areas, known, place, report, mends)
    return boxes


def _check_extents(
    content: CocoFile,
    boxes: NDArray[np.float64],
    sizes: NDArray[np.float64],
    inside: NDArray[np.bool_],
    known: NDArray[np.bool_],
    place: Places,
    report: Report,
    mends: Mends,
) -> None:
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
    report.add(
        "box-over-image",
        WARNING,
        "boxes that reach out of their image",
        place.of(np.flatnonzero(sticks & (over > _EDGE))),
        mended="fix",
        left=both("clips them in training, not in the evaluation"),
        remedy="is the image another one or of another size than the labels'?",
    )
    for i in np.flatnonzero(sticks).tolist():
        left, top = max(x[i], 0.0), max(y[i], 0.0)
        right, bottom = min(x[i] + w[i], width[i]), min(y[i] + h[i], height[i])
        clipped = [left, top, right - left, bottom - top]
        mends.fix("annotations", i, "bbox", [round(float(v), 6) for v in clipped])


def _check_areas(
    annotations: Sequence[Annotation],
    boxes: NDArray[np.float64],
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
        mends.set("annotations", i, "area", object_area(annotations[i], boxes[i]))
    box_areas = boxes[:, 2] * boxes[:, 3]
    with np.errstate(invalid="ignore"):
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
    for i in np.flatnonzero(none | large).tolist():
        mends.fix("annotations", i, "area", object_area(annotations[i], boxes[i]))


def _read_boxes(
    annotations: Sequence[Annotation], place: Places, report: Report, mends: Mends
) -> NDArray[np.float64]:
    values = [a.bbox for a in annotations]
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        numbers = list(chain.from_iterable(values))
        if set(map(type, numbers)) <= {int, float}:
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
    columns = [_column([getattr(i, key) for i in content.images]) for key in ("width", "height")]
    for key, column in zip(("width", "height"), columns, strict=True):
        for place, value in mends.read["images", key].items():
            column[place] = value  # read from the image
    return np.stack(columns, 1) if content.images else np.full((1, 2), np.nan)


def _column(values: Sequence[Any]) -> NDArray[np.float64]:
    """Make an array of numbers, NaN for whatever is none."""
    if not set(map(type, values)) <= {int, float}:
        values = [np.nan if (read := number(value)) is None else read for value in values]
    return np.array(values, float)


def _are_relative(boxes: NDArray[np.float64], sizes: NDArray[np.float64]) -> bool:
    """Tell whether boxes are in parts of their image: all numbers in 0 to 1."""
    positive = (boxes[:, 2:] > 0).any(1)
    if not positive.any() or (sizes <= 2).any():
        return False
    return bool((boxes >= -0.01).all() and (boxes <= 1.01).all())


def _are_corners(
    boxes: NDArray[np.float64], sizes: NDArray[np.float64], areas: NDArray[np.float64]
) -> bool:
    """Tell whether boxes are corners: read so, all lie in their image; read as COCO's, some don't.

    Few boxes may be so by chance. Then only areas that agree with corners count.
    """
    x1, y1, x2, y2 = boxes.T
    if not len(boxes) or ((x2 > x1) & (y2 > y1)).mean() < 0.9:
        return False
    within = ((x2 <= sizes[:, 0] + _EDGE) & (y2 <= sizes[:, 1] + _EDGE)).mean() >= 0.9
    outside = (x1 + x2 > sizes[:, 0] + _EDGE) | (y1 + y2 > sizes[:, 1] + _EDGE)
    if not within or not outside.any():
        return False
    with np.errstate(invalid="ignore"):
        by_corners = np.abs(areas - (x2 - x1) * (y2 - y1)) <= 0.01 * np.abs(areas) + 1
        by_size = np.abs(areas - x2 * y2) <= 0.01 * np.abs(areas) + 1
    if by_corners.any() or by_size.any():
        return bool(by_corners.mean() > 0.5 and by_size.mean() < 0.5)
    return len(boxes) >= 8
