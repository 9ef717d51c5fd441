"""Panoptic quality of detectors, and of resamples of the images.

PQ, SQ and RQ (:mod:`plugin_core.evaluation.panoptic_quality`) are sums over images: of matched
segments and their IoU, of false and of missed segments, for each class. They are counted once for
each image; a resample weights the counts. A segment counts as panopticapi says: a match has an IoU
above 0.5, where pixels without a label are left out of the union; a prediction that lies with more
than half of its pixels in no label, or in crowds of its class, is nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plugin_core.evaluation.coco_files import (
    Checks,
    Record,
    Source,
    check_records,
    check_references,
    check_unique,
    is_id,
    is_name,
    is_number,
    read_json,
)
from plugin_core.evaluation.comparison.accuracy import Accuracy
from plugin_core.evaluation.comparison.bootstrap import draw_weights
from plugin_core.evaluation.comparison.differences import Measured, measured_of
from plugin_core.evaluation.comparison.numbering import class_names, sorted_ids
from plugin_core.evaluation.panoptic_quality import id_of_color

GROUPS = ("", "_th", "_st")  # all classes, things, stuff
METRICS = [f"{name}{group}" for group in GROUPS for name in ("PQ", "SQ", "RQ")]


@dataclass(frozen=True)
class Segments:
    """A file of segments in COCO's panoptic format, and the PNGs with their pixels.

    Attributes:
        source: of the file.
        content: of the file.
        records: its annotations by the image's id.
        folder: of the PNGs.
    """

    source: Source
    content: Record
    records: Mapping[Any, Record]
    folder: Path

    def read(self, image: Any) -> tuple[np.ndarray, list[Record]]:
        """Read which segment each pixel of an image is of.

        Returns:
            0 where there is none, or the place of the segment, from 1 on (H, W); and the segments.

        Raises:
            ValueError: if the PNG cannot be used.
        """
        record = self.records[image]
        path, segments = self.folder / record["file_name"], record["segments_info"]
        try:
            with Image.open(path) as png:
                ids = id_of_color(np.asarray(png.convert("RGB")))
        except OSError as error:
            raise ValueError(
                f"{self.source}: {path}: {error.strerror or 'not an image'}"
            ) from error
        order = sorted(range(len(segments)), key=lambda i: segments[i]["id"])
        known = np.array([0, *(segments[i]["id"] for i in order)])
        found = np.searchsorted(known, ids).clip(max=len(known) - 1)
        if (wrong := known[found] != ids).any():
            raise ValueError(
                f"{self.source}: {path} has pixels of id {ids[wrong][0]}, which is no segment of "
                f"image {image!r}"
            )
        return np.array([0, *(i + 1 for i in order)])[found], segments


def read_truth(source: Source, folder: Path | None) -> Segments:
    """Read an annotation file.

    Args:
        source: of the file.
        folder: of its PNGs; None for that of the file's name beside it, as COCO has it.

    Raises:
        ValueError: if the file or one of its records cannot be used.
    """
    content = _read_json(source)
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise ValueError(f"{source}: no list of {key}; expected COCO's panoptic annotations")
    check_records(content["images"], f"{source}: image", {"id": is_id})
    of_category: Checks = {"id": is_id, "name": is_name, "isthing": is_number}
    check_records(content["categories"], f"{source}: category", of_category)
    for key in ("images", "categories"):
        check_unique(content[key], "id", f"{source}: {key}")
    _check(content, source, content, "the file", {"iscrowd": is_number, "area": is_number})
    segments = (s for record in content["annotations"] for s in record["segments_info"])
    if all(segment["iscrowd"] for segment in segments):
        raise ValueError(f"{source}: no segment to be found; all are crowds")
    return _segments(source, content, folder)


def read_predictions(source: Source, truth: Segments) -> Segments:
    """Read a file of predictions; its PNGs are in the folder of the file's name beside it.

    Raises:
        ValueError: if the file or one of its records cannot be used.
    """
    content = _read_json(source)
    hint = "; are both of the same dataset and split?"
    _check(content, source, truth.content, str(truth.source), {}, hint)
    segments = _segments(source, content, None)
    if missing := [image for image in truth.records if image not in segments.records]:
        raise ValueError(
            f"{source}: {len(missing)} of the {len(truth.records)} images of {truth.source} have "
            f"no prediction, the first is of image_id {missing[0]!r}{hint}"
        )
    return segments


def read_detectors(
    files: Mapping[str, Sequence[str]], truth: Segments
) -> dict[str, list[Segments]]:
    """Read the files of named detectors; raises ValueError as :func:`read_predictions` does."""
    return {
        name: [read_predictions(Source(f"--detector {name}", file), truth) for file in listed]
        for name, listed in files.items()
    }


def _read_json(source: Source) -> Record:
    content = read_json(source)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise ValueError(f"{source}: no list of annotations; expected COCO's panoptic format")
    return content


def _check(
    content: Record,
    source: Source,
    truth: Record,
    listed_in: str,
    of_segment: Checks,
    hint: str = "",
) -> None:
    records = content["annotations"]
    checks: Checks = {"image_id": is_id, "file_name": is_name, "segments_info": _is_list}
    check_records(records, f"{source}: annotation", checks)
    check_unique(records, "image_id", f"{source}: annotations")
    checks = {"id": _is_segment_id, "category_id": is_id, **of_segment}
    for n, record in enumerate(records):
        check_records(record["segments_info"], f"{source}: annotation {n}: segment", checks)
        check_unique(record["segments_info"], "id", f"{source}: annotation {n}: segments")
    segments = [
        {"image_id": record["image_id"], "category_id": segment["category_id"]}
        for record in records
        for segment in record["segments_info"]
    ]
    check_references(segments, truth, f"{source}: segments", listed_in, hint)
    images = {image["id"] for image in truth["images"]}
    if unknown := [r["image_id"] for r in records if r["image_id"] not in images]:
        raise ValueError(
            f"{source}: {listed_in} does not list image_id {unknown[0]!r} of an annotation{hint}"
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_segment_id(value: Any) -> bool:
    return isinstance(value, int) and 0 < value < 256**3


def _segments(source: Source, content: Record, folder: Path | None) -> Segments:
    folder = folder or Path(source.path).with_suffix("")
    if not folder.is_dir():
        raise ValueError(f"{source}: there is no folder {folder} with its PNGs")
    records = {record["image_id"]: record for record in content["annotations"]}
    for record in records.values():
        if not (folder / record["file_name"]).is_file():
            raise ValueError(f"{source}: there is no PNG {folder / record['file_name']}")
    return Segments(source, content, records, folder)


def count(truth: Segments, predictions: Sequence[Segments]) -> list[np.ndarray]:
    """Count the segments of each class in each image.

    Args:
        truth: annotations.
        predictions: of the same images.

    Returns:
        for each of ``predictions``: the sum of the matches' IoU, and the numbers of matches, of
        false and of missed segments (4, images, classes).

    Raises:
        ValueError: if a PNG cannot be used.
    """
    classes = {id: k for k, id in enumerate(sorted_ids(truth.content["categories"]))}
    images = [id for id in sorted_ids(truth.content["images"]) if id in truth.records]
    counts = [np.zeros((4, len(images), len(classes))) for _ in predictions]
    for i, image in enumerate(images):
        annotated = truth.read(image)
        for one, result in zip(predictions, counts, strict=True):
            found = one.read(image)
            if found[0].shape != annotated[0].shape:
                raise ValueError(
                    f"{one.source}: the PNG of image {image!r} is of size {found[0].shape}, the "
                    f"annotated one of {annotated[0].shape}; are both of the same dataset?"
                )
            areas = np.bincount(found[0].ravel(), minlength=len(found[1]) + 1)[1:]
            if not areas.all():
                segment = found[1][int(areas.argmin())]
                raise ValueError(
                    f"{one.source}: the PNG of image {image!r} has no pixel of segment "
                    f"{segment['id']}"
                )
            _count_image(annotated, found, classes, result[:, i])
    return counts


def _count_image(
    annotated: tuple[np.ndarray, list[Record]],
    found: tuple[np.ndarray, list[Record]],
    classes: Mapping[Any, int],
    result: np.ndarray,
) -> None:
    """Count the segments of an image into (4, classes)."""
    truth, objects = annotated
    pixels, segments = found
    shape = (len(objects) + 1, len(segments) + 1)
    shared = np.bincount(truth.ravel() * shape[1] + pixels.ravel(), minlength=np.prod(shape))
    shared = shared.reshape(shape)
    of_object = np.array([classes[x["category_id"]] for x in objects], int)
    of_segment = np.array([classes[x["category_id"]] for x in segments], int)
    crowd = np.array([bool(x["iscrowd"]) for x in objects], bool)
    areas = np.array([x["area"] for x in objects], float)
    sizes = shared.sum(axis=0)[1:]
    same = of_object[:, None] == of_segment
    union = areas[:, None] + sizes - shared[1:, 1:] - shared[0, 1:]
    iou = np.divide(shared[1:, 1:], union, out=np.zeros(same.shape), where=union > 0)
    matched = same & ~crowd[:, None] & (iou > 0.5)
    for g, s in zip(*np.nonzero(matched), strict=True):
        result[0, of_object[g]] += iou[g, s]
        result[1, of_object[g]] += 1
    nobodys = shared[0, 1:] + np.where(same & crowd[:, None], shared[1:, 1:], 0).sum(axis=0)
    false = ~matched.any(axis=0) & (nobodys <= 0.5 * sizes)
    np.add.at(result[2], of_segment[false], 1)
    np.add.at(result[3], of_object[~matched.any(axis=1) & ~crowd], 1)


def qualities(counts: np.ndarray, things: np.ndarray) -> dict[str, np.ndarray]:
    """Compute PQ, SQ and RQ in percent from counts.

    Args:
        counts: of :func:`count`, summed over images (4, ..., classes).
        things: whether each class is one of things (classes,).

    Returns:
        each of ``METRICS`` (...,), and "classes": PQ, SQ and RQ of each class (3, ..., classes).
        NaN where there is no segment.
    """
    iou, right, false, missed = counts
    whole = right + false / 2 + missed / 2
    there = np.where(whole > 0, whole, np.nan)
    of_class = np.stack(
        [iou / there, iou / np.where(right > 0, right, 1) + 0 * there, right / there]
    )
    result = {"classes": 100 * of_class}
    for group, chosen in zip(GROUPS, (things | True, things, ~things), strict=True):
        some = of_class[..., chosen]
        present = ~np.isnan(some)
        number = present.sum(axis=-1)
        sums = np.where(present, some, 0).sum(axis=-1)
        means = np.divide(sums, number, out=np.full(sums.shape, np.nan), where=number > 0)
        result |= {f"{n}{group}": 100 * m for n, m in zip(("PQ", "SQ", "RQ"), means, strict=True)}
    return result


def measure(
    truth: Segments,
    predictions: Mapping[str, Sequence[Segments]],
    resamples: int,
    control: str | None = None,
) -> Measured:
    """Evaluate detectors and compare each with the first, and with the control.

    Args:
        truth: annotations.
        predictions: of each seed of named detectors; the baseline first.
        resamples: number of resamples of the bootstrap.
        control: name of the detector that costs as much as the others but has no plugin, if any.

    Raises:
        ValueError: if a PNG cannot be used.
    """
    counts = iter(count(truth, [one for seeds in predictions.values() for one in seeds]))
    names = class_names(truth.content)
    categories = {category["id"]: category for category in truth.content["categories"]}
    things = np.array([bool(categories[i]["isthing"]) for i in sorted_ids([*categories.values()])])
    weights = draw_weights(len(truth.records), resamples)
    with_all = np.concatenate([np.ones((1, len(truth.records))), weights])
    accuracies: dict[str, list[Accuracy]] = {}
    values: dict[str, list[np.ndarray]] = {}
    for name, seeds in predictions.items():
        accuracies[name], values[name] = [], []
        for _ in seeds:
            counted = next(counts)
            found = qualities(with_all @ counted, things)
            by_class = found["classes"]
            metrics = {metric: float(found[metric][0]) for metric in METRICS}
            rows = zip(names, by_class[:, 0].T.tolist(), strict=True)
            of_classes = {k: dict(zip(("PQ", "SQ", "RQ"), row, strict=True)) for k, row in rows}
            accuracies[name].append(Accuracy(metrics, of_classes))
            values[name].append(np.stack([*(found[m] for m in METRICS), *by_class[0].T]))
    annotated = counted[1] + counted[3]  # (images, classes)
    objects = annotated > 0
    chosen = [objects[:, some].any(axis=1).sum() for some in (things | True, things, ~things)]
    images = np.concatenate([np.repeat(chosen, 3), objects.sum(axis=0)])
    classes = dict(zip(names, annotated.sum(axis=0).astype(int).tolist(), strict=True))
    return measured_of(accuracies, values, images, classes, weights, control)
