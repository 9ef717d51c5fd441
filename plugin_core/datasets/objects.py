"""Checks of objects: boxes, areas, masks and keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from plugin_core.datasets.coco_file import UNSET, Annotation, CocoFile, polygons_of, segmentation_of
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, is_crowd, number

_DROP = both("leaves them out of the training")
_STOP = both("stops with a traceback")
_FIRST = 5000  # annotations whose polygons are compared with their boxes
_EDGE = 2.0  # pixels by which boxes of COCO itself may stick out of their image

# How many annotations have a mask of each kind
MaskCounts = dict[str, int]


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
        mends.set("annotations", i, "area", _area(annotations[i], boxes[i]))
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
        mends.fix("annotations", i, "area", _area(annotations[i], boxes[i]))


def _area(annotation: Annotation, box: NDArray[np.float64]) -> float:
    """Compute an object's area from its mask, or else from its box."""
    mask = segmentation_of(annotation)
    area = 0.0
    if isinstance(mask, dict) and _is_rle(mask):
        counts = mask["counts"]
        if isinstance(counts, list):
            area = float(sum(counts[1::2]))
        else:
            area = float(rle.area({"size": mask["size"], "counts": counts.encode()}))
    if isinstance(mask, list):
        for polygon in mask if mask and isinstance(mask[0], list) else [mask]:
            numbers = [number(v) for v in polygon] if isinstance(polygon, list) else []
            if len(numbers) >= 6 and len(numbers) % 2 == 0 and None not in numbers:
                px, py = np.asarray(numbers, float).reshape(-1, 2).T
                area += abs(float(px @ np.roll(py, 1) - py @ np.roll(px, 1))) / 2
    if area <= 0 and np.isfinite(box).all():
        area = float(max(box[2], 0.0) * max(box[3], 0.0))
    return area


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


def check_masks(
    content: CocoFile, image_index: Sequence[int], report: Report, mends: Mends
) -> MaskCounts:
    """Check polygons and run-length encodings; returns how many objects have which."""
    place = Places(content, image_index)
    counts: MaskCounts = {"polygons": 0, "rle": 0, "none": 0}
    flat, short, other, sizes, relative = [], [], [], [], []
    for i, annotation in enumerate(content.annotations):
        # Crowds are encoded in COCO itself, and no mask is learned from them.
        counted = int(not is_crowd(annotation))
        if annotation.segmentation is UNSET:
            counts["none"] += counted
            continue
        polygons = polygons_of(annotation)
        if polygons:
            counts["polygons"] += counted
            if any(len(p) < 6 or len(p) % 2 for p in polygons):
                short.append(i)
            elif i < _FIRST and max(map(max, polygons)) <= 1 and _is_larger(annotation.bbox):
                relative.append(i)
            continue
        mask = segmentation_of(annotation)
        if isinstance(mask, list) and mask and isinstance(mask[0], list):
            counts["polygons"] += counted
            if not all(isinstance(p, list) and all(number(v) is not None for v in p) for p in mask):
                other.append(i)
            elif any(len(p) < 6 or len(p) % 2 for p in mask):
                short.append(i)
        elif isinstance(mask, list) and mask and all(number(v) is not None for v in mask):
            counts["polygons"] += counted
            flat.append(i)
            mends.set("annotations", i, "segmentation", [mask])
        elif isinstance(mask, dict):
            counts["rle"] += counted
            if not _is_rle(mask):
                other.append(i)
            elif not _fits(mask, content, image_index[i], mends):
                sizes.append(i)
        elif mask in (None, [], {}, ""):
            counts["none"] += counted
        else:
            other.append(i)
    report.add(
        "flat-polygon",
        WARNING,
        "polygons that are not in a list of polygons",
        place.of(flat),
        left=_STOP,
        mended="read",
    )
    report.add(
        "short-polygon",
        WARNING,
        "masks with polygons of fewer than 3 points, or of an odd number of coordinates",
        place.of(short),
        left={
            "detectron2": "leaves out these polygons, and objects that have no other",
            "mmdetection": "takes these objects for ignored regions",
        },
        remedy="a polygon is x1, y1, x2, y2, x3, y3, …",
    )
    report.add(
        "mask",
        ERROR,
        "masks that are neither polygons nor run-length encodings",
        place.of(other),
        left=_STOP,
        remedy="a mask is a list of polygons, or an object of size and counts",
    )
    report.add(
        "relative-polygons",
        ERROR,
        "polygons in parts of the image (0 to 1) instead of pixels",
        place.of(relative),
        left=both("trains on masks smaller than a pixel"),
        remedy="multiply x by the image's width, y by its height",
    )
    report.add(
        "mask-size",
        ERROR,
        "run-length encodings of another size than their image",
        place.of(sizes),
        left=_STOP,
        remedy="size is [height, width] of the image, and the counts sum up to its pixels",
    )
    return counts


def _is_larger(box: Any) -> bool:
    """Tell whether a box has more than two pixels a side."""
    sides = [number(v) for v in box[2:]] if isinstance(box, list) and len(box) == 4 else []
    return len(sides) == 2 and all(side is not None and side > 2 for side in sides)


def _is_rle(mask: dict[str, Any]) -> bool:
    size, counts = mask.get("size"), mask.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(v, int) for v in size)):
        return False
    if isinstance(counts, str):
        return bool(counts)
    return isinstance(counts, list) and all(isinstance(c, int) and c >= 0 for c in counts)


def _fits(mask: dict[str, Any], content: CocoFile, image: int, mends: Mends) -> bool:
    height, width = mask["size"]
    if isinstance(mask["counts"], list) and sum(mask["counts"]) != height * width:
        return False
    if image < 0:
        return True
    read = {key: mends.read["images", key].get(image) for key in ("height", "width")}
    wanted = tuple(
        number(getattr(content.images[image], key)) if value is None else value
        for key, value in read.items()
    )
    return None in wanted or (height, width) == wanted


def check_keypoints(
    content: CocoFile,
    image_index: Sequence[int],
    category_index: Sequence[int],
    report: Report,
    mends: Mends,
) -> tuple[set[int], bool]:
    """Check keypoints against their category.

    Returns:
        The numbers of keypoints that objects have, and whether a category names them.
    """
    place = Places(content, image_index)
    names = [len(c.keypoints) if isinstance(c.keypoints, list) else 0 for c in content.categories]
    wrong, other, uncounted, found = [], [], [], set()
    labelled = any(names)
    for i, annotation in enumerate(content.annotations):
        values = annotation.keypoints
        of_category = names[category_index[i]] if category_index[i] >= 0 else 0
        if values is UNSET or values is None or values == []:
            if labelled and of_category and not is_crowd(annotation):
                # COCO's way to say that none is labelled
                mends.set("annotations", i, "keypoints", [0] * (3 * of_category))
                mends.set("annotations", i, "num_keypoints", 0)
            continue
        read = [number(v) for v in values] if isinstance(values, list) else [None]
        numbers = [v for v in read if v is not None]
        if len(numbers) < len(read):
            other.append(i)
            continue
        if len(numbers) % 3 or (of_category and len(numbers) != 3 * of_category):
            wrong.append(i)
            continue
        found.add(len(numbers) // 3)
        if any(v not in (0, 1, 2) for v in numbers[2::3]):
            other.append(i)
        if any(isinstance(v, str) for v in values):
            mends.set("annotations", i, "keypoints", numbers)
            mends.texts.append(place(i))
        if not isinstance(annotation.num_keypoints, int):
            uncounted.append(i)
            mends.set("annotations", i, "num_keypoints", sum(v > 0 for v in numbers[2::3]))
    report.add(
        "keypoint-number",
        ERROR,
        "objects with another number of keypoints than their category names",
        place.of(wrong),
        left=_STOP,
        remedy="keypoints is x, y, visibility for each name in the category's keypoints",
    )
    report.add(
        "keypoints",
        ERROR,
        "keypoints that are no x, y and visibility of 0, 1 or 2",
        place.of(other),
        left=_STOP,
    )
    report.add(
        "num-keypoints",
        NOTE,
        "objects without num_keypoints",
        place.of(uncounted),
        left=both("stops with a KeyError at the evaluation of keypoints"),
        mended="read",
    )
    return found | {count for count in names if count}, labelled
