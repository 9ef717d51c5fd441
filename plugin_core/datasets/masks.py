"""Checks of masks: polygons and run-length encodings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle

from plugin_core.datasets.coco_file import UNSET, Annotation, CocoFile, polygons_of, segmentation_of
from plugin_core.datasets.findings import ERROR, WARNING, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, is_crowd, number

_STOP = both("stops with a traceback")
# Annotations whose polygons are compared with their boxes, spread over the file
_COMPARED = 50_000

# How many annotations have a mask of each kind
MaskCounts = dict[str, int]


def object_area(annotation: Annotation, box: NDArray[np.float64]) -> float:
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


def check_masks(
    content: CocoFile, image_index: Sequence[int], report: Report, mends: Mends
) -> MaskCounts:
    """Check polygons and run-length encodings; returns how many objects have which."""
    place = Places(content, image_index)
    counts: MaskCounts = {"polygons": 0, "rle": 0, "none": 0}
    flat, short, other, sizes, relative, elsewhere = [], [], [], [], [], []
    step = 1 + len(content.annotations) // _COMPARED
    compared = 0
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
            elif i % step == 0 and (box := _box(annotation)):
                compared += 1
                if max(map(max, polygons)) <= 1:
                    relative.append(i)
                elif not _is_around(box, polygons):
                    elsewhere.append(i)
            continue
        mask = segmentation_of(annotation)
        if isinstance(mask, list) and mask and isinstance(mask[0], list):
            counts["polygons"] += counted
            if not all(isinstance(p, list) and all(number(v) is not None for v in p) for p in mask):
                other.append(i)
            elif any(len(p) < 6 or len(p) % 2 for p in mask):
                short.append(i)
            elif any(isinstance(v, str) for p in mask for v in p):
                mends.set("annotations", i, "segmentation", [[*map(number, p)] for p in mask])
                mends.texts.append(place(i))
        elif isinstance(mask, list) and mask and all(number(v) is not None for v in mask):
            counts["polygons"] += counted
            flat.append(i)
            mends.set("annotations", i, "segmentation", [[*map(number, mask)]])
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
    boxes_are_right = not {"corners", "relative-boxes"} & {f.kind for f in report.findings}
    report.add(
        "mask-elsewhere",
        ERROR if len(elsewhere) > 0.5 * compared else WARNING,
        "polygons that do not lie in their box",
        place.of(elsewhere if boxes_are_right else ()),
        left=both("trains on masks of other places than the boxes"),
        remedy="write polygons and boxes of the same image, in pixels, x before y",
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


def _box(annotation: Annotation) -> list[float] | None:
    """Read the box of an annotation; None if it is none, or has a side of up to two pixels."""
    value = annotation.bbox
    numbers = [number(v) for v in value] if isinstance(value, list) and len(value) == 4 else [None]
    box = [v for v in numbers if v is not None]
    return box if len(box) == 4 and min(box[2:]) > 2 else None


def _is_around(box: Sequence[float], polygons: Sequence[Sequence[float]]) -> bool:
    """Tell whether a box is, roughly, the one around polygons: their IoU is at least 0.5.

    A pixel on each side is added to both, as small boxes are rounded.
    """
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    xs, ys = [v for p in polygons for v in p[::2]], [v for p in polygons for v in p[1::2]]
    x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    width = min(right, x2) - max(left, x1) + 2
    height = min(bottom, y2) - max(top, y1) + 2
    both_areas = (right - left + 2) * (bottom - top + 2) + (x2 - x1 + 2) * (y2 - y1 + 2)
    shared = max(width, 0.0) * max(height, 0.0)
    return shared >= 0.5 * (both_areas - shared)


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
