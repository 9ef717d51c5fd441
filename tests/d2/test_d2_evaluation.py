"""The evaluator that belongs to a dataset."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from d2_plugins import evaluation
from d2_plugins.data import register_coco
from d2_plugins.evaluation import build_evaluator

pytestmark = pytest.mark.usefixtures("registered")

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
    assert kinds == [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator]
    assert {e._output_dir for e in evaluator._evaluators} == {str(tmp_path / "inference")}


def test_lvis(cfg, tmp_path, monkeypatch):
    calls = []

    class FakeLVISEvaluator:  # the real one needs the package lvis
        def __init__(self, *args, **kwargs):
            calls.append((args, kwargs))

    monkeypatch.setattr(evaluation, "LVISEvaluator", FakeLVISEvaluator)
    register("evaluation_lvis", evaluator_type="lvis")
    cfg.OUTPUT_DIR = str(tmp_path)
    assert type(build_evaluator(cfg, "evaluation_lvis")) is FakeLVISEvaluator
    assert calls == [(("evaluation_lvis",), {"output_dir": str(tmp_path / "inference")})]


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
