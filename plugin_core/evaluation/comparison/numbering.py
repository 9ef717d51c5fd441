"""COCO-format records reduced to what an evaluation reads, with ids 1, 2, … in COCO's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]

FIELDS = {  # of an object and of a detection, by type of IoU
    "bbox": (("bbox",), ("bbox",)),
    "segm": (("bbox", "segmentation"), ("segmentation",)),
    "keypoints": (("bbox", "keypoints", "num_keypoints"), ("keypoints",)),
}


def sorted_ids(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Ids in the order in which COCO's evaluation takes them; texts come after numbers."""
    return sorted((record["id"] for record in records), key=lambda i: (isinstance(i, str), i))


def class_names(content: Mapping[str, Any]) -> list[str]:
    """Names of the classes in the order of their ids; the id is added to a name given twice."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    uses = Counter(names.values())
    return [
        names[i] if uses[names[i]] == 1 else f"{names[i]} ({i})"
        for i in sorted_ids(content["categories"])
    ]


def number(
    content: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: str
) -> tuple[Record, list[Record]]:
    """Copy ground truth and detections, without the fields that an evaluation does not read.

    An evaluation may write into the copies. Ids may have been texts, which pycocotools and hotcoco
    do not both take.

    Args:
        content: of the annotation file, as read by
            :func:`plugin_core.evaluation.coco_files.read_annotations`.
        results: detections of its images.
        iou_type: "bbox", "segm" or "keypoints".
    """
    of_object, of_detection = FIELDS[iou_type]
    images = {id: n for n, id in enumerate(sorted_ids(content["images"]), 1)}
    classes = {id: n for n, id in enumerate(sorted_ids(content["categories"]), 1)}

    def place(record: Mapping[str, Any]) -> Record:
        return {
            "image_id": images[record["image_id"]],
            "category_id": classes[record["category_id"]],
        }

    objects = [
        {
            "id": n,
            **place(record),
            "iscrowd": int(bool(record["iscrowd"])),
            "area": record["area"],
            **{field: record[field] for field in of_object},
        }
        for n, record in enumerate(content["annotations"], 1)
    ]
    truth = {
        "images": [
            {
                "id": images[image["id"]],
                **{key: image[key] for key in ("height", "width") if key in image},
            }
            for image in content["images"]
        ],
        "categories": [{"id": n, "name": str(n)} for n in classes.values()],
        "annotations": objects,
    }
    detections = [
        {
            **place(record),
            "score": record["score"],
            **{field: record[field] for field in of_detection},
        }
        for record in results
    ]
    return truth, detections
