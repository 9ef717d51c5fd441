"""The check of a dataset in COCO's format, which both trainings run first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plugin_core.datasets.boxes import check_boxes, image_sizes
from plugin_core.datasets.coco_file import CocoFile, read_coco
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.images import check_images as check_image_files
from plugin_core.datasets.keypoints import check_keypoints
from plugin_core.datasets.masks import check_masks
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import (
    check_annotations,
    check_categories,
    check_images,
    check_lists,
    image_name,
    is_crowd,
    is_id,
)


@dataclass(frozen=True)
class Use:
    """What a dataset is for.

    Attributes:
        split: "train", "test", or "" if it is not known.
        masks: whether masks are trained or evaluated; "polygon" if only polygons are read.
        keypoints: how many an object has in the model; 0 without keypoints.
        keeps_empty: whether images without objects are trained on.
        min_size: shortest side in pixels of an image that is trained on.
        skips_unreadable: whether images that cannot be read are left out of the training.
    """

    split: str = ""
    masks: str = ""
    keypoints: int = 0
    keeps_empty: bool = False
    min_size: int = 0
    skips_unreadable: bool = False


@dataclass
class Reads:
    """What a config reads of a dataset.

    Attributes:
        use: of its data.
        classes: that it names; None if it takes those of the file.
        heads: settings of numbers of classes, and the numbers.
    """

    use: Use
    classes: Sequence[str] | None = None
    heads: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Checked:
    """A checked dataset: what was found, what can be mended, and its categories."""

    report: Report
    mends: Mends
    content: CocoFile


def check_dataset(
    annotations: str, images: str | None, use: Use | None = None, *, decode: bool = False
) -> Checked:
    """Check an annotation file, and the images that it lists.

    Args:
        annotations: path of the file in COCO's format.
        images: folder of the images; None to check the annotations alone.
        use: what the dataset is for.
        decode: read every image whole.

    Raises:
        ValueError: if the file cannot be read at all.
    """
    use = use or Use()
    content = read_coco(annotations)
    report, mends = Report(annotations), Mends()
    check_lists(content, report)
    image_places = check_images(content, report, mends)
    if images is not None:
        check_image_files(content, images, report, mends, decode=decode)
    elif mends.sizes:
        report.add(
            "no-size",
            ERROR,
            "images without width and height",
            [str(content.images[i].file_name) for i in sorted(mends.sizes)],
            left=both("stops with a KeyError"),
            remedy="set them, or name the image folder to have them read",
        )
    category_places = check_categories(content, report, mends)
    image_index, category_index = check_annotations(
        content, image_places, category_places, report, mends
    )
    check_boxes(content, image_index, report, mends)
    masks = check_masks(content, image_index, report, mends)
    keypoints = check_keypoints(content, image_index, category_index, report, mends)
    report.add(
        "number-text",
        NOTE,
        "numbers written as texts, or in another unusual way",
        mends.texts,
        left=both("stops with a traceback"),
        mended="read",
    )
    for finding in report.findings:
        if use.split and not use.masks and finding.kind in ("mask-elsewhere", "relative-polygons"):
            finding.level = NOTE  # masks are not read
        if use.skips_unreadable and finding.kind in ("image-missing", "image-unreadable"):
            finding.level, finding.remedy = WARNING, "they are left out, as the config says"
    _count(content, image_index, category_index, report)
    dropped = mends.dropped["annotations"]
    objects = sum(
        at >= 0 and i not in dropped and not is_crowd(content.annotations[i])
        for i, at in enumerate(image_index)
    )
    if use.split == "train" and use.min_size and content.images:
        sizes = image_sizes(content, mends).min(1)
        small = [i for i, size in enumerate(sizes) if size < use.min_size]
        report.add(
            "small-images",
            ERROR if len(small) == len(sizes) else WARNING,
            f"images with a side of less than {use.min_size} pixels",
            [image_name(content, i) for i in small],
            left={"mmdetection": "leaves them out"},
            remedy="set filter_cfg.min_size to what these images have",
        )
    _check_use(content, category_index, objects, masks, keypoints, use, report)
    if content.rewritten:
        report.add(
            "encoding",
            NOTE,
            f"{content.rewritten} at the beginning of the file",
            [],
            count=1,
            left=both("cannot read the file"),
            mended="read",
        )
    return Checked(report, mends, content)


def _count(
    content: CocoFile,
    image_index: Sequence[int],
    category_index: Sequence[int],
    report: Report,
) -> None:
    objects = Counter(
        at
        for at, annotation in zip(category_index, content.annotations, strict=True)
        if not is_crowd(annotation)
    )
    report.classes = {str(c.name): objects[i] for i, c in enumerate(content.categories)}
    with_objects = len(set(image_index) - {-1})
    report.counts = {
        "images": len(content.images),
        "images without annotations": len(content.images) - with_objects,
        "annotations": len(content.annotations),
        "crowds": len(content.annotations) - sum(objects.values()),
        "classes": len(content.categories),
    }


def _check_use(
    content: CocoFile,
    category_index: Sequence[int],
    objects: int,
    masks: dict[str, int],
    keypoints: tuple[set[int], bool],
    use: Use,
    report: Report,
) -> None:
    annotations = len(content.annotations)

    def add(kind: str, level: str, what: str, count: int, **rest: Any) -> None:
        report.add(kind, level, what, [], count=count, **rest)

    if use.split != "test" and not use.keeps_empty:
        crowds = report.counts["crowds"]
        what = "no annotations"
        if annotations:
            why = "crowds" if crowds == annotations else "crowds, or boxes that are left out"
            what = f"no objects: all annotations are {why}"
        left = both("trains on nothing, or stops at an assertion")
        if not objects:
            level = ERROR if use.split == "train" else WARNING
            add("no-objects", level, what, 1, left=left, remedy="label at least one object")
    elif use.split == "test" and not objects:
        left = {"detectron2": "gives nan for AP", "mmdetection": "gives -1 for AP"}
        add("nothing-to-find", WARNING, "no objects to evaluate on", 1, left=left)
    if use.masks and masks["none"] and annotations:
        level = ERROR if masks["none"] < annotations or use.split == "train" else WARNING
        what = "annotations without a mask, in a model with masks"
        remedy = "label their masks, take them out, or train boxes only"
        left = both("stops with a KeyError")
        add("no-mask", level, what, masks["none"], left=left, remedy=remedy)
    if use.masks == "polygon" and masks["rle"] and use.split == "train":
        add(
            "mask-format",
            ERROR,
            "run-length encoded masks, where polygons are read",
            masks["rle"],
            left={"detectron2": "stops when it loads the image"},
            remedy="set INPUT.MASK_FORMAT to 'bitmask' (in a LazyConfig "
            "dataloader.train.mapper.instance_mask_format)",
        )
    if use.keypoints:
        counts, named = keypoints
        if not counts:
            what, remedy = "no keypoints, in a model with keypoints", "label keypoints"
            add("no-keypoints", ERROR, what, 1, left=both("stops"), remedy=remedy)
        elif counts != {use.keypoints}:
            numbers = " and ".join(map(str, sorted(counts)))
            add(
                "keypoints-of-model",
                ERROR,
                f"keypoints for an object are {numbers}, but the model's are {use.keypoints}",
                1,
                left=both("stops in the first steps"),
                remedy=f"set the model's number of keypoints to {numbers}",
            )
        elif not named:
            add(
                "keypoint-names",
                ERROR,
                "no category names its keypoints",
                1,
                left={"detectron2": "stops with an AttributeError"},
                remedy="list the names as the category's keypoints",
            )
    used = set(np.unique(category_index)) if annotations else set()
    unused = [i for i, c in enumerate(content.categories) if i not in used and is_id(c.id)]
    if annotations and use.split != "test":
        report.add(
            "unused-class",
            NOTE,
            "classes without an object",
            [repr(content.categories[i].name) for i in unused],
        )
