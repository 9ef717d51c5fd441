"""Checks of categories: their ids and names, and those that are no classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from plugin_core.datasets.coco_file import UNSET, CocoFile
from plugin_core.datasets.findings import ERROR, WARNING, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import STOP, check_ids, is_id


def check_categories(content: CocoFile, report: Report, mends: Mends) -> dict[Any, int]:
    """Check the records of categories; returns the place of each id."""
    categories = content.categories

    def place(i: int) -> str:
        category = categories[i]
        return f"category {category.id!r} {category.name!r}"

    index = check_ids("category", [category.id for category in categories], place, report)
    if not categories and "categories" not in content.absent:
        report.add("no-categories", ERROR, "an empty list of categories", [], count=1)
    bad = [i for i, c in enumerate(categories) if not isinstance(c.name, str) or not c.name.strip()]
    report.add(
        "category-name",
        ERROR,
        "categories without a name",
        [place(i) for i in bad],
        left=STOP,
        remedy="give each category a name: classes are told apart by it",
    )
    names = Counter(c.name for c in categories if isinstance(c.name, str))
    report.add(
        "category-name-twice",
        ERROR,
        "names that several categories have",
        [
            f"{name!r} (ids {', '.join(repr(c.id) for c in categories if c.name == name)})"
            for name, count in names.items()
            if count > 1
        ],
        left={
            "detectron2": "trains them as several classes of one name",
            "mmdetection": "gives labels past the last class",
        },
        remedy="make them one category, or name them apart",
    )
    used = {a.category_id for a in content.annotations if is_id(a.category_id)}
    background = [
        i
        for i, c in enumerate(categories)
        if isinstance(c.name, str)
        and c.name.strip("_ ").lower() == "background"
        and is_id(c.id)
        and c.id not in used
    ]
    mends.drop("categories", *background)
    report.add(
        "background-category",
        WARNING,
        "the background listed as a class, as LabelMe's exports do",
        [place(i) for i in background],
        left=both("counts it as a class without objects"),
        remedy="take it out: both frameworks have a background of their own",
        mended="fix",
    )
    for category in _find_root(categories, used):
        is_roboflows = categories[category].supercategory in (UNSET, None, "", "none")
        if is_roboflows:
            mends.drop("categories", category)
        report.add(
            "root-category",
            WARNING,
            "a group that is listed as a class, as Roboflow's exports do",
            [place(category)],
            left={
                "detectron2": "counts it as a class, so that the last class may be one too many",
                "mmdetection": "counts it as a class where metainfo.classes has it",
            },
            mended="fix" if is_roboflows else "",
        )
    return index


def _find_root(categories: Sequence[Any], used: set[Any]) -> list[int]:
    """Find a category without objects that is the supercategory of all others."""
    if len(categories) < 2:
        return []
    for i, category in enumerate(categories):
        others = [c for c in categories if c is not category]
        if (
            is_id(category.id)
            and category.id not in used
            and isinstance(category.name, str)
            and all(other.supercategory == category.name for other in others)
            and category.supercategory != category.name
        ):
            return [i]
    return []
