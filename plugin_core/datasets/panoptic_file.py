"""Reading COCO-format panoptic annotation files, and the texts of what can be wrong in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from plugin_core.datasets.coco_file import (
    UNSET,
    Annotation,
    Category,
    CocoFile,
    Image,
    read_list,
    read_text,
    split_lists,
)
from plugin_core.datasets.findings import ERROR, PLACES, WARNING, Report, both
from plugin_core.datasets.records import check_lists, is_id, number

LARGEST_ID = 256**3 - 1


class PanopticRecord(msgspec.Struct, gc=False):
    """A record of ``annotations``: of one image, with its segments unparsed."""

    image_id: Any = UNSET
    file_name: Any = UNSET
    segments_info: msgspec.Raw | msgspec.UnsetType = UNSET


class _Category(Category):
    isthing: Any = UNSET


_KINDS: dict[str, type] = {
    "images": Image,
    "annotations": PanopticRecord,
    "categories": _Category,
}


class _Text(NamedTuple):
    what: str
    left: dict[str, str]
    remedy: str = ""
    level: str = ERROR


def _mmdet(text: str) -> dict[str, str]:
    return {"mmdetection": text}


def _detectron2(text: str) -> dict[str, str]:
    return {"detectron2": text}


_KEY_ERROR = "stops with a KeyError while it loads the file"
_AT_EVALUATION = _detectron2("stops at the evaluation")
_PNG = both("stops when it loads the PNG, or learns other pixels")
_TEXTS = {
    "encoding": _Text(
        "a byte-order mark at the beginning of the file",
        both("cannot read the file"),
        "write it as plain UTF-8",
    ),
    "no-size": _Text("images without width and height", _mmdet(_KEY_ERROR), "set them in pixels"),
    "number-text": _Text(
        "widths and heights written as texts, or with a point",
        _mmdet("stops with a traceback"),
        "write whole numbers",
    ),
    "isthing": _Text(
        "categories whose isthing is missing or neither 0 nor 1",
        _AT_EVALUATION | _mmdet(_KEY_ERROR),
        "set isthing to 1 for countable objects and to 0 for stuff",
    ),
    "no-annotations": _Text(
        "no annotations", _detectron2("stops, as it finds no images"), "list one for each image"
    ),
    "no-segments": _Text(
        "no segments", _mmdet("has nothing to train or to evaluate on"), level=WARNING
    ),
    "image-id-of-annotation": _Text(
        "annotations whose image_id is missing or no id",
        both("stops with a traceback"),
        "set image_id to the id of a listed image",
    ),
    "unknown-image": _Text(
        "annotations of images that are not listed",
        _mmdet("leaves them out"),
        "list the images",
        WARNING,
    ),
    "image-annotated-twice": _Text(
        "annotations that share an image",
        _detectron2("takes them for several images")
        | _mmdet("looks for the segments of all in one PNG"),
        "make them one annotation and one PNG",
    ),
    "no-annotation": _Text(
        "images without annotation",
        _detectron2("leaves them out")
        | _mmdet("stops if there is no PNG of theirs, unless filter_empty_gt leaves them out"),
        level=WARNING,
    ),
    "png-name": _Text(
        "annotations whose file_name is missing or no text",
        _detectron2("stops with a traceback"),
        "name the image's PNG",
    ),
    "png-of-image": _Text(
        "PNGs of another name than their image's, with .png for .jpg",
        _mmdet("looks for a PNG of the image's name"),
        "name each PNG as its image, and images .jpg or .png",
    ),
    "image-of-png": _Text(
        "images of another name than their PNG's, with .jpg for .png",
        _detectron2("looks for a .jpg of the PNG's name"),
        "name each PNG as its image, and images .jpg",
    ),
    "segments-info": _Text(
        "annotations whose segments_info is missing or no list",
        both(_KEY_ERROR),
        "list the segments of each annotation's PNG",
    ),
    "segment-no-object": _Text(
        "segments that are no objects",
        both("stops with a traceback"),
        "each segment is an object in braces",
    ),
    "segment-id": _Text(
        f"segments whose id is no whole number from 1 to {LARGEST_ID:,}",
        _detectron2("stops, or never finds their pixels") | _mmdet("stops, or learns empty masks"),
        "give each the number of its color in the PNG, R + 256 G + 256² B",
    ),
    "segment-id-twice": _Text(
        "segments of an image that share an id",
        both("learns the same pixels as several segments"),
        "give each a color of its own",
    ),
    "category-id-of-segment": _Text(
        "segments whose category_id is missing or not listed",
        both(_KEY_ERROR),
        "list the category with this id, or take the segments out",
    ),
    "iscrowd": _Text(
        "segments whose iscrowd is missing or neither 0 nor 1",
        both("stops at the evaluation, or takes them for crowds"),
        "set iscrowd to 0 for a segment and to 1 for a region of many",
    ),
    "area": _Text(
        "segments whose area is missing or no number",
        _AT_EVALUATION | _mmdet("stops with a traceback"),
        "set area to the number of pixels",
    ),
    "bbox": _Text(
        "segments whose bbox is missing or not four numbers",
        _mmdet("stops with a traceback"),
        "set bbox to x, y, width and height in pixels",
    ),
    "small-segment": _Text(
        "segments of no area, or with a bbox under a pixel",
        _mmdet("leaves them out"),
        level=WARNING,
    ),
    "png-folder": _Text("no folder of PNGs", both("stops at the first PNG"), "name the folder"),
    "png-missing": _Text(
        "PNGs that are not in the folder", _PNG, "file names are relative to this folder"
    ),
    "png-unreadable": _Text("PNGs that cannot be read", _PNG, "restore the files"),
    "png-mode": _Text(
        "PNGs of other pixels than RGB with 8 bits",
        _PNG,
        "write colors with R + 256 G + 256² B = the segment's id",
    ),
    "png-size": _Text(
        "PNGs of another size than the file says", _PNG, "write them in the image's size"
    ),
    "unlisted-pixels": _Text(
        "ids in PNGs that segments_info does not have",
        both("learns and evaluates no class for these pixels"),
        "list these segments; if all ids differ, R and B may be exchanged",
    ),
    "empty-segment": _Text(
        "segments without a pixel in their PNG",
        _detectron2("counts them as never found") | _mmdet("learns empty masks"),
        "take them out, or write their pixels",
    ),
    "area-of-pixels": _Text(
        "areas that are not the number of pixels",
        both("weighs these segments wrongly in the evaluation"),
        "set area to the number of pixels",
        WARNING,
    ),
}


class PanopticFile:
    """The content of a panoptic annotation file.

    Args:
        path: of the file.
        report: takes what is found.

    Attributes:
        file: its images and categories; ``file.annotations`` are the segments of all images.
        records: its annotations, one for each image.
        owner: place of each segment's record.
        image: place of each record's image, -1 for an unknown one; empty until it is looked up.

    Raises:
        ValueError: if the file cannot be read at all.
    """

    def __init__(self, path: str, report: Report) -> None:
        text, rewritten = read_text(path)
        self.file, self.report = CocoFile(path, rewritten=rewritten), report
        self.owner: list[int] = []
        self.image: list[int] = []
        lists: dict[str, list[Any]] = {}
        whole = split_lists(path, text)
        for key, kind in _KINDS.items():
            if key in whole:
                lists[key], others = read_list(path, key, whole[key], kind)
                self.file.not_objects |= {key: others} if others else {}
            elif key != "annotations":
                self.file.absent.append(key)
        self.file.images = lists.get("images", [])
        self.file.categories = lists.get("categories", [])
        self.records: list[PanopticRecord] = lists.get("annotations", [])
        no_list, no_object = [], []
        for i, record in enumerate(self.records):
            try:
                segments, others = read_list(
                    path, "segments_info", record.segments_info, Annotation
                )
            except ValueError:
                no_list.append(i)
                continue
            no_object += [i] * len(others)
            self.file.annotations += segments
            self.owner += [i] * len(segments)
        check_lists(self.file, report)
        self.add("encoding", [0] if rewritten else [], str)
        self.add("segments-info", no_list, self.record_name)
        self.add("segment-no-object", no_object, self.record_name)

    def record_name(self, place: int) -> str:
        """Name an annotation for a message."""
        name = self.records[place].file_name
        return repr(name) if isinstance(name, str) else f"annotations[{place}]"

    def segment_name(self, place: int) -> str:
        """Name a segment for a message."""
        value = self.file.annotations[place].id
        named = f"segment {value!r}" if is_id(value) else "a segment"
        return f"{named} of {self.record_name(self.owner[place])}"

    def add(self, kind: str, places: Iterable[Any], name: Callable[[Any], str]) -> None:
        """Report the places with a mistake, if there are any; ``name`` says where they are."""
        places, text = list(places), _TEXTS[kind]
        self.report.add(
            kind,
            text.level,
            text.what,
            map(name, places[:PLACES]),
            count=len(places),
            left=text.left,
            remedy=text.remedy,
        )


def finite(value: Any) -> float | None:
    """Read a finite number; None if it is none, or a text of one."""
    return None if isinstance(value, str) else number(value)


def numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """Read numbers as :func:`finite` does, of shape (N,), with NaN for what is none."""
    if set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):
            found = np.array(values, np.float64)
            return np.where(np.isfinite(found), found, np.nan)
    return np.array([finite(value) for value in values], np.float64)


def is_segment_id(value: Any) -> bool:
    """Tell whether pixels of a PNG can have this number."""
    return is_id(value) and not isinstance(value, str) and 0 < value <= LARGEST_ID
