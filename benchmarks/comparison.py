#!/usr/bin/env python
"""Measure how long tools/compare_detectors.py takes on detections drawn in COCO val2017's size.

    benchmarks/comparison.py [--images 5000] [--seeds 1] [--out work_dirs/comparison]

Draws 7.2 objects of 80 classes in each image and two detectors with 100 detections in each, writes
them to --out and compares them there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOOL = Path(__file__).resolve().parents[1] / "tools" / "compare_detectors.py"
SIZE, CLASSES, PER_IMAGE = 640, 80, 100


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=1, help="of each detector")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/comparison"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    truth = draw_truth(rng, args.images)
    (args.out / "truth.json").write_text(json.dumps(truth))
    command = [sys.executable, str(TOOL), str(args.out / "truth.json")]
    for name, error in (("plain", 0.10), ("other", 0.098)):
        for seed in range(args.seeds):
            path = args.out / f"{name}{seed}.json"
            path.write_text(json.dumps(draw_detections(rng, truth, error)))
            command += ["--detector", f"{name}={path}"]
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(args.out / "report")], check=True)
    print(f"\n{time.perf_counter() - start:.1f} s, reading and writing included")


def draw_truth(rng: np.random.Generator, num_images: int) -> dict[str, Any]:
    """Ground truth whose classes are as unequally frequent as 1, 1/2, 1/3 …"""
    num_objects = int(7.2 * num_images)
    frequency = 1 / np.arange(1, CLASSES + 1)
    boxes = draw_boxes(rng, num_objects)
    classes = rng.choice(CLASSES, num_objects, p=frequency / frequency.sum()) + 1
    images = rng.integers(1, num_images + 1, num_objects)
    annotations = [
        {
            "id": n,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": 0.7 * box[2] * box[3],
            "iscrowd": int(n % 100 == 0),
        }
        for n, (image, category, box) in enumerate(
            zip(images.tolist(), classes.tolist(), boxes.tolist(), strict=True), 1
        )
    ]
    return {
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(1, num_images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": annotations,
    }


def draw_detections(
    rng: np.random.Generator, truth: dict[str, Any], error: float
) -> list[dict[str, Any]]:
    """Find 85% of the objects, with an error relative to their size, among false positives."""
    found = [a for a in truth["annotations"] if rng.random() < 0.85]
    number = PER_IMAGE * len(truth["images"]) - len(found)
    boxes = np.array([a["bbox"] for a in found])
    boxes = boxes + rng.normal(0, error, boxes.shape) * np.tile(boxes[:, 2:], 2)
    boxes = np.concatenate([boxes, draw_boxes(rng, number)]).round(2)
    scores = np.concatenate([rng.beta(4, 2, len(found)), rng.beta(1, 6, number)]).round(5)
    # False positives are of classes in the image as often as of others
    by_image = np.array([a["image_id"] for a in found])
    like = rng.integers(len(found), size=number)
    images = np.concatenate([by_image, np.where(rng.random(number) < 0.5, by_image[like], 0)])
    elsewhere = images == 0
    images[elsewhere] = rng.integers(1, len(truth["images"]) + 1, elsewhere.sum())
    classes = np.array([a["category_id"] for a in found])
    classes = np.concatenate([classes, classes[like]])
    records = zip(images.tolist(), classes.tolist(), boxes.tolist(), scores.tolist(), strict=True)
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in records
    ]


def draw_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    sides = np.exp(rng.normal(4.2, 0.9, (number, 2))).clip(4, 600)
    return np.concatenate([rng.uniform(0, 400, (number, 2)), sides], axis=1).round(2)


if __name__ == "__main__":
    main()
