"""Panoptic quality (Kirillov et al., CVPR 2019, arXiv:1801.00868), computed by hotcoco.

Of each class, with segments matched where their IoU is above 0.5:

    SQ = mean IoU of the matches TP      RQ = |TP| / (|TP| + ½|FP| + ½|FN|)      PQ = SQ · RQ

Things, stuff and all are means over their classes. Pixels without a label, and crowds, count
against nobody. hotcoco is on the package index, and gives the numbers of the authors' panopticapi.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_GROUPS = {"All": "", "Things": "_th", "Stuff": "_st"}


@dataclass(frozen=True)
class PanopticPrediction:
    """Segments that a detector found in an image.

    Attributes:
        image_id: as in the annotations.
        segments: "id", from 1 on, and "category_id", as in the annotations, of each.
        png: a file whose pixels are ids of segments, by :func:`encode_png`.
    """

    image_id: int | str
    segments: list[dict[str, Any]]
    png: bytes


@dataclass(frozen=True)
class PanopticQuality:
    """PQ, SQ and RQ in percent; NaN where there are no segments.

    Attributes:
        scores: "PQ", "SQ", "RQ", of things "PQ_th" and so on, of stuff "PQ_st" and so on.
        by_class: by category id "PQ", "SQ" and "RQ".
        counts: how many classes are in the means of "PQ", "PQ_th" and "PQ_st".
    """

    scores: dict[str, float]
    by_class: dict[int, dict[str, float]]
    counts: dict[str, int]

    def table(self) -> list[list[str]]:
        """Rows of a table, with their head: group, PQ, SQ, RQ and the number of classes."""
        rows = [["", "PQ", "SQ", "RQ", "classes"]]
        for name, suffix in _GROUPS.items():
            numbers = (f"{self.scores[key + suffix]:.3f}" for key in ("PQ", "SQ", "RQ"))
            rows.append([name, *numbers, str(self.counts[f"PQ{suffix}"])])
        return rows


def check_installed() -> None:
    """Raise an ImportError that says what to install, if hotcoco is missing."""
    if importlib.util.find_spec("hotcoco") is None:
        raise ImportError("panoptic quality needs the package hotcoco: pip install 'hotcoco<2'")


def id_of_color(pixels: np.ndarray) -> np.ndarray:
    """Read ids (H, W) of int32 off the pixels (H, W, 3) of a panoptic PNG in RGB."""
    return pixels.astype(np.int32) @ np.array([1, 256, 256**2], np.int32)


def encode_png(ids: np.ndarray) -> bytes:
    """Write ids (H, W), from 0, none, to 256³ - 1, as the pixels of a PNG."""
    from PIL import Image

    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def panoptic_quality(
    annotations: Mapping[str, Any], segments: str, predictions: Iterable[PanopticPrediction]
) -> PanopticQuality:
    """Compare predictions with annotations, in those images that have a prediction.

    Args:
        annotations: content of a panoptic file in COCO's format.
        segments: folder of the PNGs that it names.
        predictions: at most one of an image.

    Raises:
        ImportError: if hotcoco is not installed, with what to install.
        ValueError: if an image that was predicted has no annotation.
    """
    check_installed()
    from hotcoco.panoptic import PanopticEval

    found = {prediction.image_id: prediction for prediction in predictions}
    known = {a["image_id"]: a for a in annotations["annotations"] if a["image_id"] in found}
    if missing := [image for image in found if image not in known]:
        raise ValueError(f"no annotation of image {missing[0]!r}, which was predicted")
    with tempfile.TemporaryDirectory(prefix="panoptic_quality") as folder:
        truth, predicted = Path(folder, "annotations.json"), Path(folder, "predictions.json")
        images = [image for image in annotations["images"] if image["id"] in found]
        whole = {**annotations, "images": images, "annotations": [*known.values()]}
        truth.write_text(json.dumps(whole))
        write_predictions(predicted, found.values())
        pngs = predicted.with_suffix("")
        evaluation = PanopticEval(truth, predicted, gt_folder=segments, pred_folder=pngs)
        evaluation.evaluate()
        return _in_percent(evaluation.results())


def write_predictions(file: Path, predictions: Iterable[PanopticPrediction]) -> None:
    """Write predictions in COCO's panoptic format, for tools/compare_detectors.py.

    Args:
        file: a JSON file, whose name ends with ".json"; the PNGs go into the folder of its name
            without it.
        predictions: at most one of an image.
    """
    folder = file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, prediction in enumerate(predictions):
        name = f"{number:06}.png"
        (folder / name).write_bytes(prediction.png)
        records.append(
            {
                "image_id": prediction.image_id,
                "file_name": name,
                "segments_info": prediction.segments,
            }
        )
    file.write_text(json.dumps({"annotations": records}))


def _in_percent(results: Mapping[str, Any]) -> PanopticQuality:
    def percent(group: Mapping[str, Any], counted: bool, suffix: str = "") -> dict[str, float]:
        return {
            f"{key}{suffix}": 100 * group[key.lower()] if counted else float("nan")
            for key in ("PQ", "SQ", "RQ")
        }

    scores: dict[str, float] = {}
    for name, suffix in _GROUPS.items():
        scores |= percent(results[name], results[name]["n"] > 0, suffix)
    return PanopticQuality(
        scores,
        {
            int(category): percent(one, one["tp"] + one["fp"] + one["fn"] > 0)
            for category, one in results["per_class"].items()
        },
        {f"PQ{suffix}": results[name]["n"] for name, suffix in _GROUPS.items()},
    )
