"""Checks of masks: polygons and run-length encodings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_core.datasets.coco_file import Annotation, CocoFile, polygons_of, segmentation_of
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, is_crowd, number

_STOP = both("stops with a traceback")
_NOT_READ = both("reads no masks here")
# Annotations whose polygons are compared with their boxes, spread over the file
_COMPARED = 50_000

# How many annotations have a mask of each kind
MaskCounts = dict[str, int]


def object_area(annotation: Annotation, box: NDArray[np.float64]) -> float:
    """Compute an object's area from its mask, or else from its box, and not more than the box's."""
    mask, polygons = _read(annotation)
    area = _area(polygons) if polygons else float(sum((run_lengths(mask) or [])[1::2]))
    if np.isfinite(box).all():
        of_box = float(max(box[2], 0.0) * max(box[3], 0.0))
        area = min(area, of_box) if area > 0 else of_box
    return area


def check_masks(
    content: CocoFile, image_index: Sequence[int], report: Report, mends: Mends, *, read: bool
) -> tuple[MaskCounts, list[int]]:
    """Check polygons and run-length encodings.

    Args:
        content: of the file.
        image_index: place of each annotation's image.
        report: takes what is found.
        mends: takes what can be mended.
        read: whether masks are trained or evaluated.

    Returns:
        How many objects have which kind of mask, and places of those without a polygon of three
        points.
    """
    place = Places(content, image_index)
    counts: MaskCounts = {"polygons": 0, "rle": 0, "none": 0}
    flat, short, hollow = [], [], []
    other: list[int] = []
    unread: list[int] = []
    sizes, relative, elsewhere, areas = [], [], [], []
    step = 1 + len(content.annotations) // _COMPARED
    compared = 0
    for i, annotation in enumerate(content.annotations):
        # Crowds are encoded in COCO itself, and no mask is learned from them.
        counted = int(not is_crowd(annotation))
        mask, polygons = _read(annotation)
        box = _box(annotation) if i % step == 0 else None
        if mask in (None, [], {}, ""):
            counts["none"] += counted
        elif polygons:
            counts["polygons"] += counted
            is_flat = not isinstance(mask[0], list)
            is_text = mask is not polygons and not is_flat
            is_text = is_text and any(isinstance(v, str) for p in mask for v in p)
            if is_flat or is_text:
                mends.set("annotations", i, "segmentation", polygons)
                mends.texts += [place(i)] if is_text else []
            right = [len(p) >= 6 and len(p) % 2 == 0 for p in polygons]
            if not all(right):
                short.append(i)
                hollow += [] if any(right) else [i]
                continue
            flat += [i] if is_flat else []
            if box:
                compared += 1
                if max(map(max, polygons)) <= 1:
                    relative.append(i)
                elif not is_around(box, polygons):
                    elsewhere.append(i)
                elif not _agree(annotation, _area(polygons), box):
                    areas.append(i)
        elif isinstance(mask, dict) and (runs := run_lengths(mask)) is not None:
            counts["rle"] += counted
            if not _fits(mask["size"], runs, content, image_index[i], mends):
                sizes.append(i)
            elif box and not _agree(annotation, sum(runs[1::2]), box):
                areas.append(i)
        else:
            counts["rle"] += counted and isinstance(mask, dict)
            counts["polygons"] += counted and isinstance(mask, list)
            (other if _is_loaded(mask) else unread).append(i)

    def add(kind: str, level: str, what: str, places: Sequence[int], **rest: Any) -> None:
        if not read:
            level, rest["left"] = NOTE, _NOT_READ
        report.add(kind, level, what, place.of(places), **rest)

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
            **({"mmdetection": "takes these objects for ignored regions"} if read else {}),
        },
        remedy="a polygon is x1, y1, x2, y2, x3, y3, …",
    )
    what = "masks that are neither polygons nor run-length encodings"
    remedy = "a mask is a list of polygons, or an object of size and counts"
    if not read:
        left = {"detectron2": "stops while it loads the file, though it trains no masks"}
        report.add("mask", ERROR, what, place.of(unread), left=left, remedy=remedy)
        unread = []
    add("mask", ERROR, what, sorted(other + unread), left=_STOP, remedy=remedy)
    add(
        "relative-polygons",
        ERROR,
        "polygons in parts of the image (0 to 1) instead of pixels",
        relative,
        left=both("trains on masks smaller than a pixel"),
        remedy="multiply x by the image's width, y by its height",
    )
    add(
        "mask-elsewhere",
        ERROR if len(elsewhere) > 0.5 * compared else WARNING,
        "polygons that do not lie in their box",
        [] if any(f.kind == "corners" for f in report.findings) else elsewhere,
        left=both("trains on masks of other places than the boxes"),
        remedy="write polygons and boxes of the same image, in pixels, x before y",
    )
    add(
        "mask-size",
        ERROR,
        "run-length encodings of another size than their image",
        sizes,
        left=_STOP,
        remedy="size is [height, width] of the image, and the counts sum up to its pixels",
    )
    report.add(
        "area-of-mask",
        WARNING,
        "areas that are not the mask's",
        place.of(areas),
        left=both("takes the objects for smaller or larger ones in AP by size"),
        remedy="leave area out: it is computed then",
    )
    return counts, hollow


def _is_loaded(mask: Any) -> bool:
    """Tell whether Detectron2 loads a mask that is none: it stops at some even to train boxes."""
    if isinstance(mask, dict):
        return "counts" in mask and not isinstance(mask["counts"], list)
    return isinstance(mask, (str, list)) and all(isinstance(p, (str, list, dict)) for p in mask)


def _read(annotation: Annotation) -> tuple[Any, list[list[float]] | None]:
    """Read a mask as it is, and its polygons of numbers, or of texts of numbers, if it has them."""
    if polygons := polygons_of(annotation):
        return polygons, polygons
    mask = segmentation_of(annotation)
    if not isinstance(mask, list) or not mask:
        return mask, None
    parts = mask if isinstance(mask[0], list) else [mask]
    read: list[Any] = [[number(v) for v in p] if isinstance(p, list) else [None] for p in parts]
    return mask, None if any(None in p for p in read) else read


def _area(polygons: Sequence[Sequence[float]]) -> float:
    """Sum up the areas of polygons, by Gauss's formula."""
    area = 0.0
    for polygon in polygons:
        if len(polygon) >= 6 and len(polygon) % 2 == 0:
            x, y = np.array([*polygon, *polygon[:2]], float).reshape(-1, 2).T
            area += abs(float(x[1:] @ y[:-1] - y[1:] @ x[:-1])) / 2
    return area


def _agree(annotation: Annotation, area: float, box: Sequence[float]) -> bool:
    """Tell whether the area of an annotation is roughly its mask's, or wrong for its box, too."""
    value = number(annotation.area)
    if value is None or not 0 < value <= 1.05 * box[2] * box[3] + 2:
        return True
    return area / 2 - 8 <= value <= 2 * area + 8


def _box(annotation: Annotation) -> list[float] | None:
    """Read the box of an annotation; None if it is none, or has a side of up to two pixels."""
    value = annotation.bbox
    numbers = [number(v) for v in value] if isinstance(value, list) and len(value) == 4 else [None]
    box = [v for v in numbers if v is not None]
    return box if len(box) == 4 and min(box[2:]) > 2 else None


def is_around(box: Sequence[float], polygons: Sequence[Sequence[float]]) -> bool:
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


def run_lengths(mask: Any) -> list[int] | None:
    """Read the counts of a run-length encoding; None if it is none."""
    size, counts = (mask.get("size"), mask.get("counts")) if isinstance(mask, dict) else (0, 0)
    if not (isinstance(size, list) and len(size) == 2 and all(type(v) is int for v in size)):
        return None
    if isinstance(counts, str):
        counts = _decode(counts.encode())
    elif not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return None
    return counts if counts and min(size) > 0 and min(counts) >= 0 else None


def _decode(text: bytes) -> list[int] | None:
    """Decode COCO's compressed counts; None if they are none.

    A letter holds five bits, lowest first, and a sixth that says that more of this number follow.
    The last letter's fifth bit is the sign. From the fourth on, numbers are differences to those
    two before (``rleFrString`` in pycocotools).
    """
    bits = (np.frombuffer(text, np.uint8) - 48).astype(np.int64)
    last = np.flatnonzero(bits < 32)
    if not len(bits) or bits[-1] >= 32 or bits.max() > 63:
        return None
    first = np.append(0, last[:-1] + 1)
    shift = 5 * (np.arange(len(bits)) - first.repeat(last - first + 1))
    if shift.max() > 30:  # no number of 32 bits
        return None
    counts = np.add.reduceat((bits & 31) << shift, first) - (bits[last] >> 4 << shift[last] + 5)
    for start in (1, 2):
        counts[start::2] = counts[start::2].cumsum()
    return counts.tolist()


def _fits(
    size: Sequence[int], runs: Sequence[int], content: CocoFile, image: int, mends: Mends
) -> bool:
    height, width = size
    if sum(runs) != height * width:
        return False
    if image < 0:
        return True
    read = {key: mends.read["images", key].get(image) for key in ("height", "width")}
    wanted = tuple(
        number(getattr(content.images[image], key)) if value is None else value
        for key, value in read.items()
    )
    return None in wanted or (height, width) == wanted
