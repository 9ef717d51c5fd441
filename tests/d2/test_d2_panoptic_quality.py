"""Panoptic quality in Detectron2, without panopticapi."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("hotcoco", reason="hotcoco is not installed")

from detectron2.data import MetadataCatalog
from PIL import Image

from d2_plugins.panoptic_quality import PanopticQualityEvaluator
from plugin_core.evaluation.coco_files import Source
from plugin_core.evaluation.comparison import panoptic

DIVISOR = 1000


@pytest.fixture
def annotations(drawn_coco: Path) -> dict[str, Any]:
    """The drawn panoptic annotations, registered as "drawn_quality"."""
    path = drawn_coco / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    ids = {
        kind: [c["id"] for c in content["categories"] if c["isthing"] == isthing]
        for kind, isthing in (("thing", 1), ("stuff", 0))
    }
    MetadataCatalog.pop("drawn_quality", None)
    MetadataCatalog.get("drawn_quality").set(
        panoptic_json=str(path),
        panoptic_root=str(path.with_suffix("")),
        thing_dataset_id_to_contiguous_id={i: n for n, i in enumerate(ids["thing"])},
        # As separated panoptic datasets have it: 0 is for all things.
        stuff_dataset_id_to_contiguous_id={i: n for n, i in enumerate(ids["stuff"], 1)},
        label_divisor=DIVISOR,
    )
    return content


def truth(annotations: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs and outputs of a model that finds every segment, in the form of PanopticFPN."""
    meta = MetadataCatalog.get("drawn_quality")
    things, stuff = (meta.get(f"{kind}_dataset_id_to_contiguous_id") for kind in ("thing", "stuff"))
    pairs = []
    for record in annotations["annotations"]:
        pixels = Image.open(Path(meta.panoptic_root) / record["file_name"])
        ids = torch.from_numpy(np.asarray(pixels, np.int64) @ [1, 256, 256**2])
        segments, infos = torch.zeros_like(ids, dtype=torch.int32), []
        for number, segment in enumerate(record["segments_info"], 1):
            category = segment["category_id"]
            segments[ids == segment["id"]] = number
            infos.append(
                {
                    "id": number,
                    "isthing": category in things,
                    "category_id": (things if category in things else stuff)[category],
                }
            )
        given = {"image_id": record["image_id"], "file_name": record["file_name"]}
        pairs.append((given, {"panoptic_seg": (segments, infos)}))
    return pairs


def evaluate(
    pairs: list[tuple[dict[str, Any], dict[str, Any]]], output_dir: Path | None = None
) -> dict[str, float]:
    evaluator = PanopticQualityEvaluator("drawn_quality", output_dir and str(output_dir))
    evaluator.reset()
    for given, output in pairs:
        evaluator.process([given], [output])
    return evaluator.evaluate()["panoptic_seg"]


def test_true_segments_have_the_full_quality(annotations):
    scores = evaluate(truth(annotations))
    names = {f"{key}{group}" for key in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")}
    assert set(scores) == names and all(score == 100 for score in scores.values())


def test_predictions_are_written_for_a_comparison(annotations, drawn_coco, tmp_path):
    evaluate(truth(annotations), tmp_path)
    file = drawn_coco / "annotations" / "panoptic_val2017.json"
    segments = panoptic.read_truth(Source("", str(file)), None)
    written = panoptic.read_predictions(Source("", str(tmp_path / "predictions.json")), segments)
    measured = panoptic.measure(segments, {"it": [written]}, 100)
    assert measured.mean("it") == 100


def test_segments_of_no_pixel_are_not_needed_and_missing_ones_cost_quality(annotations):
    pairs = truth(annotations)
    segments, infos = pairs[0][1]["panoptic_seg"]
    segments[segments == infos[0]["id"]] = 0
    pairs[0][1]["panoptic_seg"] = (segments, infos[1:])
    assert 0 < evaluate(pairs)["RQ"] < 100


def test_map_of_categories_and_instances_without_infos_is_read(annotations):
    """As Panoptic-DeepLab gives it: ids of the dataset, and -1 for none."""
    meta = MetadataCatalog.get("drawn_quality")
    ids = sorted([*meta.thing_dataset_id_to_contiguous_id, *meta.stuff_dataset_id_to_contiguous_id])
    meta = meta.as_dict()
    MetadataCatalog.pop("drawn_quality")
    contiguous = {category: n for n, category in enumerate(ids)}
    meta["stuff_dataset_id_to_contiguous_id"] = contiguous
    things = meta["thing_dataset_id_to_contiguous_id"]
    meta["thing_dataset_id_to_contiguous_id"] = {i: contiguous[i] for i in things}
    MetadataCatalog.get("drawn_quality").set(**{k: v for k, v in meta.items() if k != "name"})
    pairs = truth(annotations)
    for record, (_, output) in zip(annotations["annotations"], pairs, strict=True):
        segments, _ = output["panoptic_seg"]
        labels = torch.full_like(segments, -1)
        for number, segment in enumerate(record["segments_info"], 1):
            category = contiguous[segment["category_id"]]
            labels[segments == number] = category * DIVISOR + number
        output["panoptic_seg"] = (labels, None)
    assert evaluate(pairs)["PQ"] == 100
