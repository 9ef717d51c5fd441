"""Reading COCO-format files whole, with a check of every record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugin_core.datasets.coco_file import check_text

Record = dict[str, Any]
Checks = dict[str, Callable[[Any], bool]]  # key → check of its value


@dataclass(frozen=True)
class Source:
    """A file, and the option or setting that names it; error messages show both."""

    option: str
    path: str

    def __str__(self) -> str:
        return f"{self.option} {self.path}"


def read_annotations(source: Source, iou_type: str | None = None) -> Record:
    """Read a COCO-format annotation file.

    Args:
        source: of the file.
        iou_type: "bbox", "segm" or "keypoints" to check the fields of this evaluation; None for
            classes alone.

    Raises:
        ValueError: if the file or one of its records cannot be used.
    """
    content = read_json(source)
    if not isinstance(content, dict):
        raise ValueError(f"{source}: expected an object, COCO's instances")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise ValueError(f"{source}: no list of {key}; expected COCO's instances")
    image_checks: Checks = {"id": is_id}
    checks: Checks = {"id": is_id, "image_id": is_id, "category_id": is_id}
    where = str(source)
    if iou_type:
        checks |= {"iscrowd": is_number, "bbox": is_box, "area": is_number}
        where += f", --iou-type {iou_type}"
    if iou_type == "segm":
        image_checks |= {"height": is_number, "width": is_number}
        checks["segmentation"] = bool  # [] where only boxes were labelled
    if iou_type == "keypoints":
        checks |= {"num_keypoints": is_number, "keypoints": is_keypoints}
    check_records(content["images"], f"{where}: image", image_checks)
    check_records(content["categories"], f"{where}: category", {"id": is_id, "name": is_name})
    check_records(content["annotations"], f"{where}: annotation", checks)
    for key in ("images", "annotations", "categories"):
        check_unique(content[key], "id", f"{source}: {key}")
    check_references(content["annotations"], content, f"{source}: annotations", "the file")
    ids = [annotation["id"] for annotation in content["annotations"]]
    if not all(isinstance(i, int) and i > 0 for i in ids):
        # pycocotools takes an object of id 0 for one that was never found.
        for number, annotation in enumerate(content["annotations"], 1):
            annotation["id"] = number
    return content


def read_results(
    source: Source, iou_type: str, content: Record, annotations: Source
) -> list[Record]:
    """Read a file of detections by Detectron2 or MMDetection.

    Args:
        source: of the file.
        iou_type: "bbox", "segm" or "keypoints"; the detections must have boxes, masks or
            keypoints for it.
        content: content of the annotation file of the same images.
        annotations: the annotation file.

    Raises:
        ValueError: if the file or one of its records cannot be used.
    """
    results = read_json(source)
    if not isinstance(results, list):
        raise ValueError(f"{source}: expected a list of detections, not {type(results).__name__}")
    checks: Checks = {"image_id": is_id, "category_id": is_id, "score": is_number}
    checks |= {
        "bbox": {"bbox": is_box},
        "segm": {"segmentation": is_rle},
        "keypoints": {"keypoints": is_keypoints},
    }[iou_type]
    check_records(results, f"{source}, --iou-type {iou_type}: detection", checks)
    hint = "; are both of the same dataset and split?"
    check_references(results, content, f"{source}: detections", str(annotations), hint)
    if iou_type == "segm":
        for detection in results:  # as in the frameworks, or pycocotools would use the boxes' areas
            detection.pop("bbox", None)
    return results


def read_json(source: Source) -> Any:
    """Read a JSON file; raises ValueError if it cannot be read."""
    try:
        return json.loads(check_text(Path(source.path).read_bytes(), str(source))[0])
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}") from error


def check_records(records: Iterable[Any], what: str, checks: Checks) -> None:
    """Check that each record has all the keys, with usable values."""
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{what} {index}: expected an object, not {record!r:.40}")
        for key, check in checks.items():
            if key not in record:
                raise ValueError(f"{what} {index} has no {key}; expected {', '.join(checks)}")
            if not check(record[key]):
                raise ValueError(f"{what} {index}: {key} cannot be {record[key]!r:.40}")


def is_id(value: Any) -> bool:
    """Tell whether an image or a category can have this id."""
    return isinstance(value, int | str)


def is_name(value: Any) -> bool:
    """Tell whether a category can have this name."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_box(value: Any) -> bool:
    """Tell whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_rle(value: Any) -> bool:
    """Tell whether a mask is compressed as in both frameworks. pycocotools reads no other."""
    return isinstance(value, dict) and isinstance(value.get("counts"), str) and "size" in value


def is_keypoints(value: Any) -> bool:
    """Tell whether a value is x, y and visibility of COCO's 17 keypoints, all that it can rate."""
    return isinstance(value, list) and len(value) == 51 and all(map(is_number, value))


def check_unique(records: Iterable[Record], key: str, what: str) -> None:
    """Check that no two records have the same value of a key."""
    seen = set()
    for record in records:
        if record[key] in seen:
            raise ValueError(f"{what}: {key} {record[key]!r} occurs twice")
        seen.add(record[key])


def check_references(
    records: list[Record], content: Record, what: str, listed_in: str, hint: str = ""
) -> None:
    """Check that an annotation file lists the records' images and categories."""
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[entries]}
        in_order = sorted(known, key=lambda i: (isinstance(i, str), i))
        unknown = [record[key] for record in records if record[key] not in known]
        if unknown:
            raise ValueError(
                f"{what}: {len(unknown)} of {len(records)} are of {entries} that {listed_in} does "
                f"not list, the first of {key} {unknown[0]!r} (it lists {in_order[0]} to "
                f"{in_order[-1]}){hint}"
            )
