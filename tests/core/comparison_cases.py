"""Random detections on random ground truth, with all that COCO's evaluation has rules for."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

SIZE = 400  # of the images, in pixels
NAMES = ("cup", "table", "lamp", "never there", "cup")

Case = tuple[dict[str, Any], list[dict[str, Any]]]


def random_case(
    seed: int, iou_type: str = "bbox", ties: bool = True, crowded: bool = False
) -> Case:
    """Draw crowds, small to large objects, equal scores and boxes, and a class without objects.

    Args:
        seed: of the draws.
        iou_type: "bbox", "segm" or "keypoints".
        ties: whether scores and boxes may be equal.
        crowded: whether an image has 130 detections of one class, more than COCO takes.
    """
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(4, 12))
    images = [{"id": 3 * i, "height": SIZE, "width": SIZE} for i in range(num_images)]
    categories = [{"id": 2 * i, "name": name} for i, name in enumerate(NAMES)]
    annotations = []
    for n in range(1, int(rng.integers(10, 60))):
        box = draw_box(rng, ties)
        annotations.append(
            {
                "id": n,
                "image_id": 3 * int(rng.integers(num_images)),
                "category_id": 2 * int(rng.choice([0, 1, 2, 4])),
                "iscrowd": int(rng.random() < 0.1),
                "bbox": box,
                "area": float(box[2] * box[3] * rng.choice([0.6, 1.0])),
                **shape(rng, box, iou_type),
            }
        )
    results = []
    for annotation in annotations:
        for _ in range(int(rng.integers(0, 3))):
            moved = [
                round(side + rng.normal(0, 0.05 * annotation["bbox"][2]))
                for side in annotation["bbox"]
            ]
            box = [*np.clip(moved, 1, SIZE - 1).tolist()]
            results.append(
                detection(
                    rng, annotation["image_id"], annotation["category_id"], box, ties, iou_type
                )
            )
    for _ in range(130 if crowded else 20):
        image = 0 if crowded else 3 * int(rng.integers(num_images))
        category = 0 if crowded else 2 * int(rng.integers(len(NAMES)))
        results.append(detection(rng, image, category, draw_box(rng, ties), ties, iou_type))
    order = rng.permutation(len(results))
    content = {"images": images, "categories": categories, "annotations": annotations}
    return content, [results[i] for i in order]


def draw_box(rng: np.random.Generator, ties: bool) -> list[int]:
    side = np.exp(rng.uniform(2, 5.3, 2))
    step = 16 if ties else 1  # so that some boxes are equal, and of 32² or 96² pixels exactly
    w, h = (np.maximum(1, side // step) * step).astype(int).tolist()
    x, y = (rng.integers(0, SIZE - np.array([w, h])) // step * step).tolist()
    return [x, y, w, h]


def detection(
    rng: np.random.Generator, image: int, category: int, box: list[int], ties: bool, iou_type: str
) -> dict[str, Any]:
    place = {"image_id": image, "category_id": category}
    score = round(float(rng.random()), 1 if ties else 12)
    found = shape(rng, box, iou_type) or {"bbox": box}
    found.pop("num_keypoints", None)
    return {**place, "score": score, **found}


def shape(rng: np.random.Generator, box: list[int], iou_type: str) -> dict[str, Any]:
    x, y, w, h = box
    if iou_type == "segm":
        mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
        mask[y : y + h, x : x + max(1, w - w // 4)] = 1
        encoded = coco_mask.encode(mask)
        return {"segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()}}
    if iou_type == "keypoints":
        points = np.stack([x + w * np.linspace(0, 1, 17), y + h * np.linspace(0, 1, 17) ** 2], 1)
        points += rng.normal(0, 0.02 * w, points.shape)
        seen = rng.choice([0, 1, 2], 17) * int(rng.random() > 0.2)
        together = np.concatenate([points.round(2), seen[:, None]], 1).ravel()
        return {"keypoints": together.tolist(), "num_keypoints": int((seen > 0).sum())}
    return {}
