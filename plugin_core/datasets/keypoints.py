"""Checks of keypoints."""

from __future__ import annotations

from collections.abc import Sequence

from plugin_core.datasets.coco_file import UNSET, CocoFile
from plugin_core.datasets.findings import ERROR, NOTE, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import Places, is_crowd, number

_STOP = both("stops with a traceback")


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
