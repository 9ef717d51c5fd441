"""Reading the detections that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugin_core.evaluation.coco_files import Source, read_annotations, read_results
from plugin_core.evaluation.comparison.detections import Detections, Truth


@dataclass(frozen=True)
class Detector:
    """Detections of one detector on the images of an annotation file.

    Attributes:
        name: unique among those that are compared.
        seeds: the detections of each seed that it was trained with.
        files: where each seed's came from.
    """

    name: str
    seeds: Sequence[Detections]
    files: Sequence[str]


def read_truth(annotations: Source, iou_type: str) -> dict[str, Any]:
    """Read an annotation file, as :func:`read_annotations` does, with an object to be found in it.

    Raises:
        ValueError: if the file or one of its records cannot be used, or no object counts.
    """
    content = read_annotations(annotations, iou_type)
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    if iou_type == "keypoints":
        objects = [a for a in objects if a["num_keypoints"]]
    if not objects:
        kind = "crowds or without keypoints" if iou_type == "keypoints" else "crowds"
        raise ValueError(f"{annotations}: no object to be found; all are {kind}")
    return content


def named_files(specifications: Sequence[str]) -> dict[str, list[str]]:
    """Sort files by the detector that they are of.

    Args:
        specifications: each ``NAME=FILE`` or ``NAME=FILE,FILE``; a name may occur again.

    Raises:
        ValueError: if one is of another form, or gives a file twice.
    """
    files: dict[str, list[str]] = {}
    for specification in specifications:
        name, _, listed = specification.partition("=")
        name = name.strip()
        if not name or not all(listed.split(",")):
            raise ValueError(f"--detector {specification}: expected NAME=FILE or NAME=FILE,FILE")
        for file in listed.split(","):
            if file in files.setdefault(name, []):
                raise ValueError(f"--detector {name}: {file} is given twice; a file is one seed")
            files[name].append(file)
    return files


def read_detector(
    name: str, files: Sequence[str], truth: Truth, content: dict[str, Any], annotations: Source
) -> Detector:
    """Read the results files of a detector.

    Args:
        name: of the detector.
        files: a results file of Detectron2 or MMDetection for each seed.
        truth: objects of the annotation file; the detections must have boxes, masks or keypoints
            for its type of IoU.
        content: content of the annotation file of the same images.
        annotations: the annotation file.

    Raises:
        ValueError: if a file or one of its records cannot be used.
    """
    seeds = []
    for file in files:
        source = Source(f"--detector {name}", file)
        results = read_results(source, truth.iou_type, content, annotations)
        if truth.iou_type == "segm":
            _check_masks(results, content, str(source))
        seeds.append(Detections(truth, results))
    return Detector(name, seeds, files)


def doubts(detectors: Sequence[Detector]) -> str:
    """Name the files without any detection in most of the images with objects; "" if none is so.

    They may be of another split whose images have the same ids.
    """
    sentences = []
    for one in detectors:
        for file, detections in zip(one.files, one.seeds, strict=True):
            there = detections.truth.objects_of_image > 0
            there[detections.image] = False
            images = int((detections.truth.objects_of_image > 0).sum())
            if 2 * there.sum() > images:
                sentences.append(
                    f"{file} has no detection in {there.sum():,} of the {images:,} images with "
                    "objects; is it of this dataset and split?"
                )
    return " ".join(sentences)


def _check_masks(
    results: Sequence[Mapping[str, Any]], content: Mapping[str, Any], what: str
) -> None:
    """Check that masks are of their images' sizes; of others pycocotools takes any IoU."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for index, detection in enumerate(results):
        size, image = detection["segmentation"]["size"], detection["image_id"]
        if size != sizes[image]:
            raise ValueError(
                f"{what}: detection {index}: its mask is of size {size!r:.40}, image {image!r} of "
                f"{sizes[image]}; are both of the same dataset and split?"
            )
