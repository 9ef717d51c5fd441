"""Checks of images' and annotations' records: fields, ids, and what refers to them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from plugin_core.datasets.coco_file import UNSET, Annotation, CocoFile
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.mending import Mends

_STOP_OR_LOSE = {
    "detectron2": "stops with a KeyError while it loads the file",
    "mmdetection": "leaves them out without a word",
}
STOP = both("stops with a traceback")


def number(value: Any) -> float | None:
    """Read a finite number, or a text of one; None if it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    with suppress(OverflowError):  # of an integer with more than 308 digits
        if isinstance(value, (int, float)) and math.isfinite(value):
            return value
    return None


def is_id(value: Any) -> bool:
    """Tell whether a record can have this id: a whole number or a text."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def is_crowd(annotation: Annotation) -> bool:
    """Tell whether an annotation is of a region of many objects."""
    value = annotation.iscrowd
    return value == 1 if type(value) is int else value is True or number(value) == 1


def image_name(content: CocoFile, index: int) -> str:
    """Name an image for a message."""
    image = content.images[index]
    name = image.file_name if isinstance(image.file_name, str) else f"images[{index}]"
    return f"image {image.id!r} {name!r}" if is_id(image.id) else repr(name)


class Places:
    """Names annotations for messages, by their ids and images."""

    def __init__(self, content: CocoFile, image_index: Sequence[int]) -> None:
        self.content = content
        self.image_index = image_index  # of each annotation; -1 for an unknown image

    def __call__(self, index: int) -> str:
        annotation = self.content.annotations[index]
        name = f"annotation {annotation.id!r}" if is_id(annotation.id) else f"annotations[{index}]"
        image = self.image_index[index]
        if image < 0:
            return name
        file_name = self.content.images[image].file_name
        return f"{name} of {file_name!r}" if isinstance(file_name, str) else name

    def of(self, indices: Iterable[int]) -> list[str]:
        """Name the first of some annotations; the list is as long as ``indices``."""
        indices = list(indices)
        return [self(i) for i in indices[:3]] + [""] * max(0, len(indices) - 3)


def check_lists(content: CocoFile, report: Report) -> None:
    """Check that the lists are there and hold objects."""
    for name in content.absent:
        if name == "annotations":
            report.add("no-list", WARNING, "no list of annotations", [], count=1)
        else:
            report.add("no-list", ERROR, f"no list of {name}", [], count=1, left=STOP)
    for name, places in content.not_objects.items():
        report.add(
            "no-object",
            ERROR,
            f"{name} that are no objects",
            [f"{name}[{i}]" for i in places],
            left=STOP,
            remedy="each record is an object in braces",
        )
    if not content.images and "images" not in content.absent:
        report.add(
            "no-images",
            ERROR,
            "an empty list of images",
            [],
            count=1,
            remedy="expected at least one",
        )


def check_images(content: CocoFile, report: Report, mends: Mends) -> dict[Any, int]:
    """Check the records of images; returns the place of each id."""
    images = content.images
    index = check_ids(
        "image", [image.id for image in images], lambda i: image_name(content, i), report
    )
    bad = [i for i, image in enumerate(images) if not isinstance(image.file_name, str)]
    urls = [images[i].coco_url for i in bad]
    if bad and all(isinstance(url, str) and url for url in urls):
        report.add(
            "lvis",
            ERROR,
            "images of LVIS's format, with coco_url and without file_name",
            [image_name(content, i) for i in bad],
            left=STOP,
            remedy="the frameworks' LVIS datasets read it (LVISV1Dataset, lvis_v1_train)",
        )
        bad = []
    report.add(
        "file-name",
        ERROR,
        "file_name missing or no text",
        [image_name(content, i) for i in bad],
        left=STOP,
        remedy="name each image's file, relative to the image folder",
    )
    for key in ("width", "height"):
        values = [getattr(image, key) for image in images]
        if set(map(type, values)) <= {int} and min(values, default=1) > 0:
            continue
        for i, value in enumerate(values):
            size = number(value)
            if size is None or size <= 0 or size != int(size):
                mends.sizes.add(i)
            elif not isinstance(value, int):
                mends.set("images", i, key, int(size))
                mends.texts.append(image_name(content, i))
    files = [_same_file(i.file_name) for i in images if isinstance(i.file_name, str)]
    repeated = {name for name, count in Counter(files).items() if count > 1}
    report.add(
        "file-twice",
        WARNING,
        "the same file listed as several images",
        [f"{name!r}" for name in dict.fromkeys(files) if name in repeated],
        remedy="list each file once, or its objects are only partly known in each",
    )
    return index


def _same_file(name: str) -> str:
    """Spell a file's name in one way: without "./" and the like."""
    return os.path.normpath(name) if "./" in name or "//" in name else name


def check_annotations(
    content: CocoFile,
    images: dict[Any, int],
    categories: dict[Any, int],
    report: Report,
    mends: Mends,
) -> tuple[list[int], list[int]]:
    """Check ids and references of annotations; returns the places of their images and categories.

    An unknown image or category is at -1.
    """
    annotations = content.annotations
    image_index = look_up(images, [a.image_id for a in annotations])
    category_index = look_up(categories, [a.category_id for a in annotations])
    place = Places(content, image_index)
    with_file = [i for i in content.images if isinstance(i.file_name, str)]
    files = Counter(i.file_name for i in with_file)
    by_file = {i.file_name: i.id for i in with_file if files[i.file_name] == 1}
    for i, annotation in enumerate(annotations):
        if image_index[i] < 0 and isinstance(annotation.image_id, str):
            named = by_file.get(annotation.image_id)
            if named in images:
                image_index[i] = images[named]
                mends.set("annotations", i, "image_id", named)
                mends.texts.append(place(i))
    for key, places, index in (
        ("image_id", images, image_index),
        ("category_id", categories, category_index),
    ):
        for i, at in enumerate(index):
            if at < 0 and (other := _other_spelling(getattr(annotations[i], key))) in places:
                index[i] = places[other]
                mends.set("annotations", i, key, other)
                mends.texts.append(place(i))
    for key, title in (("image_id", "image"), ("category_id", "category")):
        missing = [i for i, a in enumerate(annotations) if not is_id(getattr(a, key))]
        report.add(
            f"{title}-id-of-annotation",
            ERROR,
            f"annotations whose {key} is missing or no id",
            place.of(missing),
            left=STOP,
            remedy=f"set {key} to the id of a listed {title}",
        )
    unknown = [i for i, at in enumerate(image_index) if at < 0 and is_id(annotations[i].image_id)]
    report.add(
        "unknown-image",
        WARNING,
        "annotations of images that are not listed",
        [
            f"image_id {annotations[i].image_id!r} in annotation {annotations[i].id!r}"
            for i in unknown[:3]
        ],
        count=len(unknown),
        left=both("leaves them out"),
        remedy="list the images, or take the annotations out",
        mended="fix",
    )
    mends.drop("annotations", *unknown)
    lost = [
        i for i, at in enumerate(category_index) if at < 0 and is_id(annotations[i].category_id)
    ]
    report.add(
        "unknown-category",
        ERROR,
        "annotations of categories that are not listed",
        [f"category_id {annotations[i].category_id!r} in {place(i)}" for i in lost[:3]],
        count=len(lost),
        left=_STOP_OR_LOSE,
        remedy=_shift(annotations, categories)
        or "list the category with this id, or take the annotations out",
    )
    _check_annotation_ids(content, place, report, mends)
    ignored = [i for i, a in enumerate(annotations) if a.ignore is not UNSET and a.ignore]
    for level, left in (
        (ERROR, {"detectron2": "stops at an assertion"}),
        (WARNING, {"mmdetection": "leaves them out"}),
    ):
        report.add(
            "ignore",
            level,
            "annotations with 'ignore'",
            place.of(ignored),
            left=left,
            remedy="use iscrowd 1 for regions that are neither object nor background",
        )
    _check_crowds(annotations, place, report, mends)
    return image_index, category_index


def _shift(annotations: Sequence[Annotation], categories: dict[Any, int]) -> str:
    """Ask whether all category_ids are shifted by one; empty if that would not make them known."""
    used = {a.category_id for a in annotations if type(a.category_id) is int}
    for step, how in ((1, "low"), (-1, "high")):
        if used and all(value + step in categories for value in used):
            return f"are all category_ids one too {how}?"
    return ""


def _check_annotation_ids(content: CocoFile, place: Places, report: Report, mends: Mends) -> None:
    """Check ids of annotations. Nothing refers to them, so new ones can be given."""
    ids = [a.id for a in content.annotations]
    usable = set(map(type, ids)) <= {int} and min(ids, default=1) > 0
    if usable and len(set(ids)) == len(ids):
        return
    missing = [i for i, value in enumerate(ids) if not is_id(value)]
    report.add(
        "annotation-id",
        WARNING,
        "annotations without an id",
        place.of(missing),
        left=STOP,
        mended="read",
    )
    known = [value for value in ids if is_id(value)]
    repeated = {value for value, count in Counter(known).items() if count > 1}
    twice = [i for i, value in enumerate(ids) if is_id(value) and value in repeated]
    report.add(
        "annotation-id-twice",
        WARNING,
        "annotations that share an id",
        place.of(twice),
        left=both("stops at an assertion in training"),
        mended="read",
    )
    zeros = [i for i, value in enumerate(ids) if is_id(value) and not isinstance(value, str)]
    zeros = [i for i in zeros if ids[i] <= 0]
    report.add(
        "annotation-id-zero",
        NOTE,
        "annotation ids that are 0 or negative",
        place.of(zeros),
        left=both("counts these objects as never found"),
        mended="read",
    )
    texts = [i for i, value in enumerate(ids) if isinstance(value, (str, float))]
    report.add(
        "annotation-id-text",
        NOTE,
        "annotation ids that are texts, or written with a point",
        place.of(texts),
        left=STOP,
        mended="read",
    )
    for i in range(len(ids)):
        mends.set("annotations", i, "id", i + 1)


def _check_crowds(annotations: Sequence[Any], place: Places, report: Report, mends: Mends) -> None:
    values = [a.iscrowd for a in annotations]
    if set(map(type, values)) <= {int} and set(values) <= {0, 1}:
        return
    missing = [i for i, value in enumerate(values) if value is UNSET or value is None]
    report.add(
        "no-iscrowd",
        NOTE,
        "annotations without iscrowd",
        place.of(missing),
        left=both("trains, and stops with a KeyError at the evaluation"),
        mended="read",
    )
    for i in missing:
        mends.set("annotations", i, "iscrowd", 0)
    wrong = []
    for i, value in enumerate(values):
        if value is UNSET or value is None or (type(value) is int and value in (0, 1)):
            continue
        flag = value if isinstance(value, bool) else number(value)
        if flag in (0, 1):
            mends.set("annotations", i, "iscrowd", int(flag))
            mends.texts.append(place(i))
        else:
            wrong.append(i)
    report.add(
        "iscrowd",
        ERROR,
        "annotations whose iscrowd is neither 0 nor 1",
        place.of(wrong),
        left=both("takes them for crowds"),
        remedy="set iscrowd to 0 for an object and to 1 for a region of many",
    )


def check_ids(
    title: str, ids: Sequence[Any], place: Callable[[int], str], report: Report
) -> dict[Any, int]:
    """Check the ids of a list's records; returns the place of each.

    Args:
        title: of a record, such as "image".
        ids: of the records.
        place: names a record by its place.
        report: takes what is found.
    """
    if not set(map(type, ids)) <= {int, str}:
        bad = [i for i, value in enumerate(ids) if not is_id(value)]
        report.add(
            f"{title}-id",
            ERROR,
            f"{title} ids that are missing or neither number nor text",
            [place(i) for i in bad],
            left=STOP,
            remedy="give each record a whole number of its own",
        )
    texts = [i for i, value in enumerate(ids) if isinstance(value, str)]
    if len(texts) < sum(map(is_id, ids)):
        report.add(
            f"{title}-id-kinds",
            ERROR,
            f"{title} ids that are texts, beside others that are numbers",
            [place(i) for i in texts],
            left=both("stops with a TypeError when it sorts them"),
            remedy="give all of them whole numbers",
        )
    index = {value: i for i, value in enumerate(ids) if is_id(value)}
    if len(index) < len(ids):
        counts = Counter(value for value in ids if is_id(value))
        twice = [i for i, value in enumerate(ids) if is_id(value) and counts[value] > 1]
        report.add(
            f"{title}-id-twice",
            ERROR,
            f"{title} ids that occur twice",
            [place(i) for i in twice],
            left=both(
                "takes the last record of an id for all of them"
                if title == "category"
                else "gives one image the objects of all",
            ),
            remedy="give each record an id of its own",
        )
    return index


def _other_spelling(value: Any) -> Any:
    """Give an id as a number if it is a text, and the other way round; None if there is none."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    return str(value) if type(value) is int else None


def look_up(index: dict[Any, int], ids: Sequence[Any]) -> list[int]:
    """Find the place of each id; -1 for an unknown one."""
    if set(map(type, ids)) <= {int, str, float}:
        return [index.get(value, -1) for value in ids]
    return [index.get(value, -1) if is_id(value) else -1 for value in ids]
