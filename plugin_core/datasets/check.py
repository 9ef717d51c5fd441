"""The check of a dataset in COCO's format, which both trainings run first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_core.datasets.boxes import as_array, check_boxes, image_sizes
from plugin_core.datasets.categories import check_categories
from plugin_core.datasets.coco_file import UNSET, CocoFile, read_coco
from plugin_core.datasets.findings import ERROR, FRAMEWORKS, NOTE, WARNING, Report, both
from plugin_core.datasets.images import check_images as check_image_files
from plugin_core.datasets.keypoints import check_keypoints
from plugin_core.datasets.masks import check_masks
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import (
    check_annotations,
    check_images,
    check_lists,
    image_name,
    is_crowd,
    is_id,
)

_NOTHING = "trains on nothing, or stops at an assertion"
_LEFT_OUT = {
    "detectron2": "no polygon of three points",
    "mmdetection": "boxes smaller than a pixel, areas of 0, 'ignore' or no polygon of three points",
}


@dataclass(frozen=True)
class Use:
    """What a dataset is for.

    Attributes:
        split: "train", "test", or "" if it is not known.
        masks: "any" if masks are trained or evaluated, "polygon" if only polygons are read, "" if
            none are, and None if not known.
        keypoints: how many an object has in the model; 0 without keypoints, None if not known.
        keeps_empty: whether images without objects are trained on.
        min_size: shortest side in pixels of an image that is trained on.
        skips_unreadable: whether images that cannot be read are left out of the training.
    """

    split: str = ""
    masks: str | None = None
    keypoints: int | None = None
    keeps_empty: bool = False
    min_size: int = 0
    skips_unreadable: bool = False

    def for_test(self) -> Use:
        """Say what a test set of the same model is for."""
        masks = "any" if self.masks else self.masks
        return Use("test", masks, self.keypoints)


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
    """A checked dataset.

    Attributes:
        report: what was found.
        mends: what can be mended.
        content: the file's images, annotations and categories.
    """

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
    boxes = check_boxes(content, image_index, report, mends)
    masks, hollow = check_masks(content, image_index, report, mends, read=use.masks != "")
    keypoints = check_keypoints(
        content, image_index, category_index, report, mends, read=use.keypoints != 0
    )
    report.add(
        "number-text",
        NOTE,
        "numbers written as texts, or in another unusual way",
        mends.texts,
        left=both("stops with a traceback"),
        mended="read",
    )
    if use.skips_unreadable:
        unread = [f for f in report.findings if f.kind in ("image-missing", "image-unreadable")]
        all_ = use.split == "train" and sum(f.count for f in unread) >= len(content.images)
        for finding in unread:
            finding.level = ERROR if all_ else WARNING
            finding.remedy = "they are left out, as the config says"
            finding.remedy += ", and nothing is left to train on" if all_ else ""
    _count(content, image_index, category_index, report)
    objects = _count_objects(content, image_index, boxes, hollow, use, mends)
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


def _count_objects(
    content: CocoFile,
    image_index: Sequence[int],
    boxes: NDArray[np.float64],
    hollow: Sequence[int],
    use: Use,
    mends: Mends,
) -> dict[str, int]:
    """Count the objects to train on in each framework, and as "" before it leaves out its own."""
    annotations = content.annotations
    objects = np.asarray(image_index) >= 0
    objects &= ~np.array([is_crowd(a) for a in annotations], bool)
    objects[list(mends.dropped["annotations"])] = False
    full = objects.copy()
    full[hollow] = False
    with np.errstate(invalid="ignore"):
        seen = (full if use.masks else objects) & ~(boxes[:, 2:] < 1).any(1)
        seen &= ~(as_array([a.area for a in annotations]) <= 0)
    seen &= ~np.array([a.ignore is not UNSET and bool(a.ignore) for a in annotations], bool)
    counted = {"": objects, "detectron2": full, "mmdetection": seen}
    return {key: int(mask.sum()) for key, mask in counted.items()}


def _check_use(
    content: CocoFile,
    category_index: Sequence[int],
    objects: dict[str, int],
    masks: dict[str, int],
    keypoints: tuple[set[int], bool, bool],
    use: Use,
    report: Report,
) -> None:
    annotations = len(content.annotations)

    def add(kind: str, level: str, what: str, count: int, **rest: Any) -> None:
        report.add(kind, level, what, [], count=count, **rest)

    if use.split != "test" and not use.keeps_empty:
        crowds = report.counts["crowds"]
        level = ERROR if use.split == "train" else WARNING
        remedy = "label at least one object"
        if not objects[""]:
            what = "no annotations"
            if annotations:
                why = "crowds" if crowds == annotations else "crowds, or boxes that are left out"
                what = f"no objects: all annotations are {why}"
            add("no-objects", level, what, 1, left=both(_NOTHING), remedy=remedy)
        for key in FRAMEWORKS if objects[""] else ():
            if not objects[key]:
                what = f"no objects: all annotations are crowds, or have {_LEFT_OUT[key]}"
                add("no-objects", level, what, 1, left={key: _NOTHING}, remedy=remedy)
    elif use.split == "test" and not objects[""]:
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
        counts, named, visible = keypoints
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
        elif not visible and use.split == "train":
            what, remedy = "no visible keypoint", "label keypoints with a visibility of 1 or 2"
            left = {"detectron2": "leaves out all images"}
            add("no-visible-keypoints", ERROR, what, 1, left=left, remedy=remedy)
    used = set(np.unique(category_index)) if annotations else set()
    unused = [i for i, c in enumerate(content.categories) if i not in used and is_id(c.id)]
    if annotations and use.split != "test":
        report.add(
            "unused-class",
            NOTE,
            "classes without an object",
            [repr(content.categories[i].name) for i in unused],
        )
