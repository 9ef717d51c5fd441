"""Contextual bias of a detector: does it find a class as well without the class's companion?

For a class c and its companion d, the ground truth splits the images into four groups:

    in company       c and d        alone     c without d
    companion only   d without c    neither   neither of them

A detector that leans on d finds c less well alone: its AP is lower there. It also sees a c in
images with d only: it has more false positives there than in images with neither. Images with both
classes hold more objects, too, which makes them harder. The gap at equal counts compares only
images with equally many objects, and so leaves the effect of d. All APs are pycocotools' own.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from plugin_core.evaluation.companions import classes_by_image

# Numbers to average over classes, in percent or percentage points: attribute → header
NUMBERS = {
    "ap": "AP",
    "ap_in_company": "AP in company",
    "ap_alone": "AP alone",
    "gap": "gap",
    "gap_at_equal_counts": "gap at equal counts",
    "fp_rate_companion_only": "FP rate companion only",
    "fp_rate_neither": "FP rate neither",
}


class ImageGroups(NamedTuple):
    """Image ids in ascending order, grouped by the presence of a class and its companion."""

    in_company: list[int]
    alone: list[int]
    companion_only: list[int]
    neither: list[int]


@dataclass(frozen=True)
class ClassBias:
    """Measurements of one class; None where nothing can be measured.

    Attributes:
        category_id: of the class.
        name: of the class.
        companion_id: category id of its companion. Without a companion this and all numbers are
            None.
        companion: name of its companion.
        images_in_company: number of images with both; likewise the next three.
        objects_in_company: number of the class's objects in images with the companion, without
            crowds.
        objects_alone: number of the class's objects in images without the companion.
        ap: COCO's AP over all images, in percent.
        ap_in_company: AP over the images with both.
        ap_alone: AP over the images with the class but without the companion.
        gap: ``ap_in_company`` - ``ap_alone``, in percentage points.
        gap_at_equal_counts: weighted mean of the gaps between images that hold equally many objects
            of any class, in percentage points. A gap's weight is the number of the class's objects
            in its images in company.
        fp_rate_companion_only: percentage of the images with only the companion in which the class
            is detected.
        fp_rate_neither: percentage of the images with neither in which the class is detected.
    """

    category_id: int
    name: str
    companion_id: int | None = None
    companion: str | None = None
    images_in_company: int | None = None
    images_alone: int | None = None
    images_companion_only: int | None = None
    images_neither: int | None = None
    objects_in_company: int | None = None
    objects_alone: int | None = None
    ap: float | None = None
    ap_in_company: float | None = None
    ap_alone: float | None = None
    gap: float | None = None
    gap_at_equal_counts: float | None = None
    fp_rate_companion_only: float | None = None
    fp_rate_neither: float | None = None


def split_images(
    images: Mapping[int, set[int]], category_id: int, companion_id: int
) -> ImageGroups:
    """Split images, given by their category ids, by a class and its companion."""
    groups = ImageGroups([], [], [], [])
    for image_id, classes in sorted(images.items()):
        index = 2 * (category_id not in classes) + (companion_id not in classes)
        groups[index].append(image_id)
    return groups


def load_ground_truth(content: dict[str, Any]) -> COCO:
    """Give pycocotools a COCO-format file, without its prints."""
    truth = COCO()
    truth.dataset = content
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def load_detections(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    """Give pycocotools a list of detections, which may be empty, without its prints."""
    if not results:  # pycocotools looks at the first one
        return load_ground_truth({**truth.dataset, "annotations": []})
    with redirect_stdout(io.StringIO()):
        return truth.loadRes(results)


def evaluate(
    truth: COCO, detections: COCO, iou_type: str, category_id: int, image_ids: Sequence[int]
) -> COCOeval:
    """Evaluate one class on some images by pycocotools: all areas, 100 detections an image."""
    evaluation = COCOeval(truth, detections, iou_type)
    params = evaluation.params
    params.catIds, params.imgIds = [category_id], list(image_ids)
    # Only the areas and limits of AP: the others would take most of the time
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    params.maxDets = params.maxDets[-1:]
    with redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def average_precision(evaluation: COCOeval) -> float | None:
    """Read AP in percent, over IoU 0.50:0.95; None if there is no object."""
    precision = evaluation.eval["precision"]
    measured = precision[precision > -1]
    return 100 * float(measured.mean()) if measured.size else None


def measure(
    truth: COCO,
    detections: COCO,
    companions: Mapping[int, int | None],
    iou_type: str,
    score_threshold: float,
) -> list[ClassBias]:
    """Measure the contextual bias of classes.

    Args:
        truth: ground truth.
        detections: of the same images and categories.
        companions: companion of each class to measure, by category id; None if it has none.
        iou_type: "bbox" or "segm".
        score_threshold: 0…1; a detection of less is no false positive. AP takes all detections.

    Returns:
        One entry for each of ``companions``, in the same order.
    """
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    images = classes_by_image(truth.dataset)
    objects = Counter(
        (annotation["image_id"], annotation["category_id"])
        for annotation in truth.dataset["annotations"]
        if not annotation["iscrowd"]
    )
    counts: Counter[int] = Counter()
    for (image_id, _), number in objects.items():
        counts[image_id] += number
    detected = {
        (detection["image_id"], detection["category_id"])
        for detection in detections.dataset["annotations"]
        if detection["score"] >= score_threshold
    }

    def measure_class(category_id: int, companion_id: int) -> ClassBias:
        def ap(image_ids: Sequence[int]) -> float | None:
            if not image_ids:  # COCOeval would take an empty list for all images
                return None
            return average_precision(evaluate(truth, detections, iou_type, category_id, image_ids))

        def gap_at_equal_counts(groups: ImageGroups) -> float | None:
            weighted = weights = 0.0
            for count in {counts[i] for i in groups.in_company}:
                sides = [[i for i in side if counts[i] == count] for side in groups[:2]]
                in_company, alone = map(ap, sides)
                if in_company is not None and alone is not None:
                    weight = sum(objects[i, category_id] for i in sides[0])
                    weighted += weight * (in_company - alone)
                    weights += weight
            return weighted / weights if weights else None

        def fp_rate(image_ids: Sequence[int]) -> float | None:
            wrong = sum((image_id, category_id) in detected for image_id in image_ids)
            return 100 * wrong / len(image_ids) if image_ids else None

        groups = split_images(images, category_id, companion_id)
        in_company, alone = ap(groups.in_company), ap(groups.alone)
        return ClassBias(
            category_id=category_id,
            name=names[category_id],
            companion_id=companion_id,
            companion=names[companion_id],
            **{f"images_{group}": len(image_ids) for group, image_ids in groups._asdict().items()},
            objects_in_company=sum(objects[i, category_id] for i in groups.in_company),
            objects_alone=sum(objects[i, category_id] for i in groups.alone),
            ap=ap(sorted(images)),
            ap_in_company=in_company,
            ap_alone=alone,
            gap=None if in_company is None or alone is None else in_company - alone,
            gap_at_equal_counts=gap_at_equal_counts(groups),
            fp_rate_companion_only=fp_rate(groups.companion_only),
            fp_rate_neither=fp_rate(groups.neither),
        )

    return [
        ClassBias(category_id, names[category_id])
        if companion_id is None
        else measure_class(category_id, companion_id)
        for category_id, companion_id in tqdm(companions.items(), "evaluating", unit="class")
    ]


def means(
    classes: Sequence[Any], numbers: Iterable[str] = NUMBERS
) -> dict[str, tuple[float | None, int]]:
    """Average each of ``numbers`` over the classes that have it, and count these classes."""
    result: dict[str, tuple[float | None, int]] = {}
    for number in numbers:
        values = [value for c in classes if (value := getattr(c, number)) is not None]
        result[number] = (sum(values) / len(values) if values else None, len(values))
    return result
