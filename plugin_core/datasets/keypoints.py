"""Checks of keypoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plugin_core.datasets.coco_file import UNSET, CocoFile
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, is_crowd, number

_STOP = {"detectron2": "stops with a traceback"}  # MMDetection reads no keypoints


def check_keypoints(
    content: CocoFile,
    image_index: Sequence[int],
    category_index: Sequence[int],
    report: Report,
    mends: Mends,
    *,
    read: bool,
) -> tuple[set[int], bool, bool]:
    """Check keypoints against their category; ``read`` tells whether they are trained.

    Returns:
        The numbers of keypoints that objects have, whether a category names them, and whether one
        of an object is visible.
    """
    place = Places(content, image_index)
    names = [len(c.keypoints) if isinstance(c.keypoints, list) else 0 for c in content.categories]
    wrong, other, unread, found = [], [], [], set()
    uncounted: list[int] = []
    miscounted: list[int] = []
    visible = False
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
        listed = [number(v) for v in values] if isinstance(values, list) else [None]
        numbers = [v for v in listed if v is not None]
        if len(numbers) < len(listed):
            unread.append(i)
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
        count = sum(v > 0 for v in numbers[2::3])
        visible |= count > 0
        if annotation.num_keypoints != count or not isinstance(annotation.num_keypoints, int):
            is_count = isinstance(annotation.num_keypoints, int)
            (miscounted if is_count else uncounted).append(i)
            mends.set("annotations", i, "num_keypoints", count)

    def add(kind: str, level: str, what: str, places: Sequence[int], **rest: Any) -> None:
        if not read:
            level, rest["left"] = NOTE, {"detectron2": "reads no keypoints here"}
        report.add(kind, level, what, place.of(places), **rest)

    add(
        "keypoint-number",
        ERROR,
        "objects with another number of keypoints than their category names",
        wrong,
        left=_STOP,
        remedy="keypoints is x, y, visibility for each name in the category's keypoints",
    )
    what = "keypoints that are no x, y and visibility of 0, 1 or 2"
    if not read:
        left = {"detectron2": "stops while it loads the file, though it trains no keypoints"}
        report.add("keypoints", ERROR, what, place.of(unread), left=left)
        unread = []
    add("keypoints", ERROR, what, sorted(other + unread), left=_STOP)
    add(
        "num-keypoints",
        NOTE,
        "objects without num_keypoints",
        uncounted,
        left={"detectron2": "stops with a KeyError at the evaluation of keypoints"},
        mended="read",
    )
    add(
        "num-keypoints-other",
        WARNING,
        "objects whose num_keypoints is not the number of visible ones",
        miscounted,
        left={"detectron2": "evaluates no keypoints of objects where it is 0"},
        mended="read",
    )
    return found | {count for count in names if count}, labelled, visible
