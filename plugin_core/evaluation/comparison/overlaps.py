"""How much detections overlap the objects of their images: IoU, or OKS of keypoints.

IoU is pycocotools' own; with a crowd it is the share of the detection that lies in it. OKS, COCO's
object keypoint similarity, is computed as pycocotools does, for all detections of an image at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as masks
from pycocotools.cocoeval import Params

from plugin_core.evaluation.context_bias import load_ground_truth

SIGMAS = Params("keypoints").kpt_oks_sigmas  # how exactly people label each of the 17 points


def shapes_of_objects(content: Mapping[str, Any], iou_type: str) -> Any:
    """Boxes (G, 4), compressed masks, or keypoints (G, 17, 3) of the objects."""
    if iou_type == "segm":
        return [*map(load_ground_truth(dict(content)).annToRLE, content["annotations"])]
    return shapes_of_detections(content["annotations"], iou_type)


def shapes_of_detections(results: Sequence[Mapping[str, Any]], iou_type: str) -> Any:
    """Boxes (D, 4), compressed masks, or keypoints (D, 17, 3) of detections."""
    if iou_type == "segm":
        return [x["segmentation"] for x in results]
    if iou_type == "bbox":
        return numbers([x["bbox"] for x in results], 4)
    return numbers([x["keypoints"] for x in results], 51).reshape(-1, 17, 3)


def areas(shapes: Any, iou_type: str) -> np.ndarray:
    """Areas of detections in pixels, as pycocotools' ``loadRes`` takes them (D,)."""
    if iou_type == "segm":
        # One at a time: of more than 255, pycocotools' area fails with numpy 2
        return np.array([masks.area(shape) for shape in shapes], float)
    if iou_type == "bbox":
        return shapes[:, 2] * shapes[:, 3]
    extent = np.ptp(shapes[..., :2], axis=1)
    return extent[:, 0] * extent[:, 1]


def overlaps(found: Any, objects: Any, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes or masks of one image (detections, objects)."""
    return masks.iou(found, objects, crowd.astype(np.uint8))


def similarities(
    found: np.ndarray, objects: np.ndarray, boxes: np.ndarray, areas: np.ndarray
) -> np.ndarray:
    """Return the OKS of the keypoints of one image (detections, objects).

    An object without labelled keypoints is compared with its box at twice its size.

    Args:
        found: of d detections (d, 17, 3).
        objects: of g objects (g, 17, 3), with their visibility.
        boxes: of the objects (g, 4).
        areas: of the objects (g,).
    """
    result = np.empty((len(found), len(objects)))
    for j, (points, (x, y, w, h), area) in enumerate(zip(objects, boxes, areas, strict=True)):
        labelled = points[:, 2] > 0
        if labelled.any():
            apart = found[..., :2] - points[:, :2]
        else:
            low, high = np.array([x - w, y - h]), np.array([x + w * 2, y + h * 2])
            apart = np.maximum(0, low - found[..., :2]) + np.maximum(0, found[..., :2] - high)
            labelled[:] = True
        errors = (apart[..., 0] ** 2 + apart[..., 1] ** 2) / (SIGMAS * 2) ** 2
        errors = np.ascontiguousarray((errors / (area + np.spacing(1)) / 2)[:, labelled])
        result[:, j] = np.exp(-errors).sum(axis=1) / errors.shape[1]
    return result


def numbers(rows: Sequence[Sequence[float]], width: int) -> np.ndarray:
    """Lay out rows of equal width (n, width)."""
    return np.array(rows, float).reshape(-1, width)
