"""Damaged copies of a small drawn dataset, and objects of its test images found perfectly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("person", "disk", "square", "triangle")

# Damage → what both frameworks' trainings say, or "" where they read what is right
ERRORS = {
    "dup_img_id": "image ids that occur twice",
    "relative_boxes": "boxes in parts of the image",
    "crowd_only": "no objects: all annotations are crowds",
    "exif_as_stored": "images that EXIF turns, with labels of the image as it is stored",
    "image_truncated": "is damaged",
    "image_empty": "is empty (0 bytes)",
    "image_html": "is no image (it begins with b'<html><body>')",
    "image_missing": "images that are not in",
    "latin1_json": "is not in UTF-8",
    "nan_box": "boxes with something else than finite numbers",
    "unknown_category": "category_id 99",
}
RIGHT = (
    "ann_id_zero",
    "backslash",
    "bom",
    "category_zero_gap",
    "dup_ann_id",
    "dup_file",
    "exif_as_shown",
    "modes",
    "no_area",
    "no_info",
    "no_iscrowd",
    "no_size",
    "some_empty",
    "string_boxes",
    "string_img_id",
    "tiny_images",
    "val_categories_reversed",
    "val_other_ids",
)


def damage_all(folder: Path) -> Path:
    """Make all damaged copies; skips where the script that damages is not there."""
    from make_synthetic_coco import make_dataset

    script = ROOT.parent / "shared" / "hard_inputs" / "damage.py"
    if not script.is_file():
        pytest.skip(f"no {script}")
    make_dataset(folder / "base", train=12, val=4, size=96, classes=4, progress=False)
    command = [sys.executable, str(script), str(folder / "base"), str(folder / "damaged")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    return folder / "damaged"


def odd_test_set(folder: Path) -> Path:
    """Draw data whose test set is a subset with ids in no order, and lacks a class's objects."""
    from make_synthetic_coco import make_dataset

    make_dataset(folder, train=4, val=6, size=96, classes=4, seed=1, progress=False)
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][4:] + content["images"][:2]
    ids = {image["id"]: 900 - 7 * i for i, image in enumerate(content["images"])}
    for image in content["images"]:
        image["id"] = ids[image["id"]]
    absent = next(c["id"] for c in content["categories"] if c["name"] == "disk")
    content["annotations"] = [
        {**a, "image_id": ids[a["image_id"]]}
        for a in reversed(content["annotations"])
        if a["image_id"] in ids and a["category_id"] != absent
    ]
    path.write_text(json.dumps(content))
    return folder


def pycocotools_says(folder: Path, moved: float) -> float:
    """Evaluate the objects of :func:`truth`, moved by some pixels, with pycocotools alone."""
    coco = COCO(folder / "annotations" / "instances_val2017.json")
    ids = {category["name"]: category["id"] for category in coco.dataset["categories"]}
    found = [
        {
            "image_id": t["image_id"],
            "category_id": ids[NAMES[t["label"]]],
            "bbox": [x1 + moved, y1, x2 - x1, y2 - y1],
            "score": 1.0,
        }
        for t in truth(folder)
        for x1, y1, x2, y2 in [t["box"]]
    ]
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def truth(folder: Path, classes: Sequence[str] = NAMES) -> list[dict[str, Any]]:
    """Give the objects of a copy's test images: image id, box as corners, place in ``classes``."""
    path = folder / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text("utf-8-sig"))
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = []
    for annotation in content["annotations"]:
        x, y, w, h = map(float, annotation["bbox"])
        found.append(
            {
                "image_id": annotation["image_id"],
                "box": [x, y, x + w, y + h],
                "label": classes.index(names[annotation["category_id"]]),
            }
        )
    return found
