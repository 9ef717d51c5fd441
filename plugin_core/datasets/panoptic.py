"""The check of a panoptic dataset in COCO's format: a JSON file, and a PNG for each image.

An annotation is of one image. It names the image's PNG and lists its segments. A segment has the
pixels whose color (R, G, B) is its id, R + 256 G + 256² B. Pixels of 0 have no segment.

MMDetection finds a PNG by the name of its image, Detectron2 an image by the name of its PNG.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from plugin_core.datasets.categories import check_categories
from plugin_core.datasets.findings import ERROR, Report
from plugin_core.datasets.images import check_images as check_image_files
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.panoptic_file import (
    LARGEST_ID,
    PanopticFile,
    is_segment_id,
    numbers,
)
from plugin_core.datasets.panoptic_pngs import check_pngs
from plugin_core.datasets.records import check_images, image_name, is_id, look_up


class PanopticCategory(NamedTuple):
    """A category of a panoptic file, and the number of its segments, crowds included."""

    id: Any
    name: str
    isthing: bool
    segments: int


@dataclass
class PanopticReport(Report):
    """All findings of a panoptic dataset, and its categories in the order of the file."""

    categories: list[PanopticCategory] = field(default_factory=list)


def is_panoptic(path: str) -> bool:
    """Tell whether a file has annotations with ``segments_info``."""
    with (
        suppress(OSError, ValueError),
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return data.find(b'"segments_info"') >= 0
    return False


def check_panoptic(
    annotations: str, segments: str | None, images: str | None, *, decode: bool = False
) -> PanopticReport:
    """Check a panoptic annotation file, its PNGs, and the images that it lists.

    Pixels are compared with the segments in the first 16 PNGs only. Of the others the headers and
    ends are read.

    Args:
        annotations: path of the file in COCO's panoptic format.
        segments: folder of the PNGs; None to check none.
        images: folder of the images; None to check none.
        decode: read every image and PNG whole.

    Raises:
        ValueError: if the file cannot be read at all.
    """
    report, mends = PanopticReport(annotations), Mends()
    content = PanopticFile(annotations, report)
    file = content.file
    index = check_images(file, report, mends)
    _check_sizes(content, images, mends, decode=decode)
    categories = check_categories(file, report, mends)
    things = [_flag(getattr(category, "isthing", None)) for category in file.categories]
    unknown = [i for i, flag in enumerate(things) if flag is None]
    content.add("isthing", unknown, lambda i: f"category {file.categories[i].name!r}")
    content.image = look_up(index, [record.image_id for record in content.records])
    _check_records(content)
    _check_names(content, pngs=segments is not None, images=images is not None)
    _check_segments(content)
    category = look_up(categories, [segment.category_id for segment in file.annotations])
    unlisted = [i for i, at in enumerate(category) if at < 0]
    content.add("category-id-of-segment", unlisted, content.segment_name)
    if segments is not None:
        check_pngs(content, segments, decode=decode)
    for finding in report.findings:  # the trainings read no copy of a panoptic file
        if finding.mended == "read":
            finding.level, finding.remedy = ERROR, "write them as they are on this disk"
        finding.mended = ""
    counts = np.bincount([at for at in category if at >= 0], minlength=len(things))
    report.categories = [
        PanopticCategory(c.id if is_id(c.id) else None, str(c.name), flag == 1, int(count))
        for c, flag, count in zip(file.categories, things, counts, strict=True)
    ]
    report.classes = {c.name: c.segments for c in report.categories}
    report.counts = {
        "images": len(file.images),
        "images without annotation": len(file.images) - len({*content.image} - {-1}),
        "segments": len(category),
        "crowds": sum(_flag(segment.iscrowd) == 1 for segment in file.annotations),
        "classes": len(report.categories),
    }
    return report


def _flag(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def _check_sizes(content: PanopticFile, images: str | None, mends: Mends, *, decode: bool) -> None:
    """Check the images' files, and their sizes, which no copy of the file will say right."""
    file, report = content.file, content.report
    sizes, texts = sorted(mends.sizes), mends.texts
    if images is not None:
        check_image_files(file, images, report, mends, decode=decode)
        report.findings = [f for f in report.findings if not f.kind.startswith("no-size")]
    content.add("no-size", sizes, lambda i: image_name(file, i))
    content.add("number-text", texts, str)


def _check_records(content: PanopticFile) -> None:
    """Check that the annotations are one for each image."""
    records, image, name = content.records, content.image, content.record_name
    content.add("no-annotations", [] if records else [content.file.path], repr)
    content.add("no-segments", [] if content.owner else [content.file.path], repr)
    lost = [i for i, record in enumerate(records) if not is_id(record.image_id)]
    content.add("image-id-of-annotation", lost, name)
    unknown = [i for i, at in enumerate(image) if at < 0 and is_id(records[i].image_id)]
    content.add("unknown-image", unknown, name)
    counts = Counter(image)
    twice = [i for i, at in enumerate(image) if at >= 0 and counts[at] > 1]
    content.add("image-annotated-twice", twice, name)
    without = [i for i in range(len(content.file.images)) if i not in counts]
    content.add("no-annotation", without, lambda i: image_name(content.file, i))


def _check_names(content: PanopticFile, *, pngs: bool, images: bool) -> None:
    """Check that each framework finds the PNG of an image, or the image of a PNG."""
    listed, named, pairs = content.file.images, [], []
    for i, (record, at) in enumerate(zip(content.records, content.image, strict=True)):
        if not isinstance(record.file_name, str) or not record.file_name:
            named.append(i)
        elif at >= 0 and isinstance(listed[at].file_name, str):
            pairs.append((listed[at].file_name, record.file_name))
    content.add("png-name", named, content.record_name)
    if pngs:
        others = [(image, png) for image, png in pairs if image.replace(".jpg", ".png") != png]
        content.add("png-of-image", others, lambda pair: f"{pair[1]!r} of {pair[0]!r}")
    if images:
        others = [
            (image, png) for image, png in pairs if os.path.splitext(png)[0] + ".jpg" != image
        ]
        content.add("image-of-png", others, lambda pair: f"{pair[0]!r} of {pair[1]!r}")


def _check_segments(content: PanopticFile) -> None:
    """Check the segments' own values."""
    segments, name = content.file.annotations, content.segment_name
    right = np.array([is_segment_id(segment.id) for segment in segments], bool)
    content.add("segment-id", np.flatnonzero(~right).tolist(), name)
    places = np.flatnonzero(right)
    ids = np.array([segments[i].id for i in places], np.int64)
    keys = np.array(content.owner, np.int64)[places] * (LARGEST_ID + 1) + ids
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    content.add("segment-id-twice", places[counts[inverse] > 1].tolist(), name)
    crowds = [i for i, segment in enumerate(segments) if _flag(segment.iscrowd) is None]
    content.add("iscrowd", crowds, name)
    areas = numbers([segment.area for segment in segments])
    content.add("area", np.flatnonzero(np.isnan(areas)).tolist(), name)
    boxes = [segment.bbox for segment in segments]
    none = [None] * 4
    sides = [box if isinstance(box, list) and len(box) == 4 else none for box in boxes]
    shape = numbers(list(chain.from_iterable(sides))).reshape(-1, 4)
    content.add("bbox", np.flatnonzero(np.isnan(shape).any(1)).tolist(), name)
    small = (areas <= 0) | (shape[:, 2:] < 1).any(1)
    content.add("small-segment", np.flatnonzero(small).tolist(), name)
