"""The evaluator that belongs to a dataset."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, Instances

from d2_plugins.datasets import register_coco
from d2_plugins.evaluation import build_evaluator
from d2_plugins.panoptic_quality import PanopticQualityEvaluator

pytestmark = pytest.mark.usefixtures("registered")

SIZE = {"width": 24, "height": 16}
MAPS = {
    "thing_dataset_id_to_contiguous_id": {1: 0},
    "stuff_dataset_id_to_contiguous_id": {2: 0},
    "thing_classes": ["thing"],
    "stuff_classes": ["stuff"],
    "ignore_label": 255,
}


def register(name: str, **metadata: object) -> str:
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(**metadata)
    return name


def test_coco_is_evaluated_with_the_keypoints_sigmas_of_the_config(cfg, tiny_coco, tmp_path):
    register_coco("evaluation_coco", *tiny_coco)
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2]
    evaluator = build_evaluator(cfg, "evaluation_coco")
    assert type(evaluator) is COCOEvaluator
    assert evaluator._kpt_oks_sigmas == [0.1, 0.2]
    assert evaluator._output_dir == str(tmp_path / "inference")


def test_output_folder_can_be_chosen(cfg, tiny_coco, tmp_path):
    register_coco("evaluation_coco", *tiny_coco)
    evaluator = build_evaluator(cfg, "evaluation_coco", str(tmp_path / "elsewhere"))
    assert evaluator._output_dir == str(tmp_path / "elsewhere")


def test_semantic_segmentation(cfg):
    register("evaluation_sem_seg", evaluator_type="sem_seg", **MAPS)
    assert type(build_evaluator(cfg, "evaluation_sem_seg")) is SemSegEvaluator


def test_panoptic_segmentation_is_evaluated_in_three_ways(cfg, tiny_coco, tmp_path):
    register(
        "evaluation_panoptic", evaluator_type="coco_panoptic_seg", json_file=tiny_coco[0], **MAPS
    )
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluator = build_evaluator(cfg, "evaluation_panoptic")
    assert type(evaluator) is DatasetEvaluators
    kinds = [type(e) for e in evaluator._evaluators]
    assert kinds == [SemSegEvaluator, COCOEvaluator, PanopticQualityEvaluator]
    assert {e._output_dir for e in evaluator._evaluators} == {str(tmp_path / "inference")}


def test_lvis(cfg, tmp_path):
    pytest.importorskip("lvis", reason="lvis is not installed")
    category = {"id": 1, "name": "thing", "frequency": "f", "image_count": 2, "instance_count": 2}
    images = [
        {"id": i, "neg_category_ids": [], "not_exhaustive_category_ids": [], **SIZE} for i in (1, 2)
    ]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80}
        for i in (1, 2)
    ]
    content = {"images": images, "annotations": annotations, "categories": [category]}
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    name = register(
        "lvis_things",
        evaluator_type="lvis",
        json_file=str(tmp_path / "lvis.json"),
        thing_dataset_id_to_contiguous_id={1: 0},
        thing_classes=["thing"],
    )
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    evaluator.reset()
    found = Instances((16, 24))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 3.0, 12.0, 11.0]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": found}])  # one of the two objects
    results = evaluator.evaluate()
    # Precision is 1 up to a recall of one half: 51 of the 101 points.
    assert results["bbox"]["AP"] == pytest.approx(100 * 51 / 101)
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"} <= set(results["bbox"])
    assert not hasattr(np, "float")


def test_pascal_voc(cfg, tmp_path):
    register(
        "evaluation_voc",
        evaluator_type="pascal_voc",
        dirname=str(tmp_path),
        split="val",
        year=2007,
        thing_classes=["thing"],
    )
    assert type(build_evaluator(cfg, "evaluation_voc")) is PascalVOCDetectionEvaluator


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cityscapes_instance", CityscapesInstanceEvaluator),
        ("cityscapes_sem_seg", CityscapesSemSegEvaluator),
    ],
)
def test_cityscapes(cfg, kind, expected):
    register("evaluation_cityscapes", evaluator_type=kind)
    assert type(build_evaluator(cfg, "evaluation_cityscapes")) is expected


@pytest.mark.parametrize("metadata", [{"evaluator_type": "mine"}, {}])
def test_unknown_type_is_named_with_those_that_exist(cfg, metadata):
    register("evaluation_unknown", **metadata)
    kind = metadata.get("evaluator_type")
    with pytest.raises(ValueError) as error:
        build_evaluator(cfg, "evaluation_unknown")
    message = str(error.value)
    assert message.startswith(
        f"dataset 'evaluation_unknown': no evaluator for evaluator_type {kind!r}"
    )
    assert message.endswith(
        "there are cityscapes_instance, cityscapes_sem_seg, coco, coco_panoptic_seg, lvis, "
        "pascal_voc, sem_seg"
    )
