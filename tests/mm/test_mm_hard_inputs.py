"""Data that real people have, in MMDetection: the right value, or a clear error beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import hard_inputs
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.config import Config

from mm_plugins.datasets import prepare

PIPELINE = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True},
    {"type": "PackDetInputs"},
]


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hard_inputs.damage_all(tmp_path_factory.mktemp("damaged"))


def prepared(folder: Path, classes: Any = hard_inputs.NAMES, *, masks: bool = False) -> Config:
    """Prepare a config as the launcher does, with its changes."""
    loaders: dict[str, Any] = {}
    pipeline = [dict(step) for step in PIPELINE]
    if masks:
        pipeline[1] |= {"with_mask": True}
    for split in ("train", "val"):
        loaders[f"{split}_dataloader"] = {
            "dataset": {
                "type": "CocoDataset",
                "ann_file": str(folder / "annotations" / f"instances_{split}2017.json"),
                "data_prefix": {"img": str(folder / f"{split}2017")},
                "metainfo": {"classes": classes},
                "filter_cfg": {"filter_empty_gt": True},
                "pipeline": pipeline,
                "test_mode": split == "val",
            }
        }
    ann_file = loaders["val_dataloader"]["dataset"]["ann_file"]
    cfg = Config({**loaders, "val_evaluator": {"type": "CocoMetric", "ann_file": ann_file}})
    cfg.merge_from_dict(prepare(cfg, None, train=True))
    return cfg


def average_precision(folder: Path, cfg: Config, moved: float = 0.0) -> float:
    """Evaluate detections that are right in image and class, and in box unless it is moved."""
    metric = CocoMetric(ann_file=cfg.val_evaluator.ann_file)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        image = dataset.get_data_info(i)
        mine = [t for t in hard_inputs.truth(folder) if t["image_id"] == image["img_id"]]
        boxes = torch.tensor([t["box"] for t in mine]).reshape(-1, 4)
        boxes[:, ::2] += moved
        found = {
            "bboxes": boxes,
            "scores": torch.ones(len(mine)),
            "labels": torch.tensor([t["label"] for t in mine], dtype=torch.long),
        }
        sample = {"img_id": image["img_id"], "ori_shape": (image["height"], image["width"])}
        metric.process({}, [sample | {"pred_instances": found}])
    return metric.evaluate(len(dataset))["coco/bbox_mAP"]


@pytest.mark.parametrize("case", [*hard_inputs.RIGHT, "sixteen_bit"])
def test_what_can_be_read_in_one_way_is_read_so(damaged, case):
    cfg = prepared(damaged / case)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    for i in range(min(3, len(dataset))):
        assert dataset[i]["inputs"].float().std() > 0
    assert average_precision(damaged / case, cfg) == pytest.approx(1)


@pytest.mark.parametrize("case", hard_inputs.ERRORS)
def test_what_would_train_something_wrong_is_an_error(damaged, case):
    with pytest.raises(ValueError) as error:
        prepared(damaged / case)
    message = " ".join(str(error.value).split())
    assert hard_inputs.ERRORS[case] in message and len(message) < 4000


@pytest.mark.parametrize("moved", [0, 3])
def test_subset_in_no_order_without_objects_of_a_class_is_evaluated_as_by_pycocotools(
    tmp_path, moved
):
    folder = hard_inputs.odd_test_set(tmp_path / "odd")
    wanted = hard_inputs.pycocotools_says(folder, moved)
    found = average_precision(folder, prepared(folder), moved)
    assert found == pytest.approx(wanted, abs=6e-4) and wanted > 0.01  # it rounds to 3 digits


def test_boxes_that_mmdetection_drops_are_a_warning(damaged, capsys):
    prepared(damaged / "bad_boxes")
    said = " ".join(capsys.readouterr().err.split())
    for what in ("negative width", "no width or height", "outside of their image", "reach out of"):
        assert what in said


@pytest.mark.parametrize(
    ("case", "arguments", "said"),
    [
        ("mixed_segm", {"masks": True}, "13 × annotations without a mask"),
        ("no_info", {"classes": "person"}, "must be a tuple of names, got 'person'"),
        ("no_info", {"classes": ("person", "disc", "square", "triangle")}, "did you mean 'disk'?"),
        ("no_info", {"classes": ("a", "b")}, "file's are ('person', 'disk', "),
    ],
)
def test_data_that_the_config_does_not_fit_is_an_error(damaged, case, arguments, said):
    with pytest.raises(ValueError) as error:
        prepared(damaged / case, **arguments)
    assert said in " ".join(str(error.value).split())


def test_classes_in_another_order_than_the_files_are_the_configs(damaged):
    folder = damaged / "no_info"
    cfg = prepared(folder, hard_inputs.NAMES[::-1])
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    labels = [a["bbox_label"] for i in range(4) for a in dataset.get_data_info(i)["instances"]]
    assert sorted(labels) == sorted(3 - t["label"] for t in hard_inputs.truth(folder))


@pytest.mark.parametrize(
    ("case", "classes"),
    [
        ("rle_segm", hard_inputs.NAMES),
        ("keypoints5", ("person",)),
        ("odd_names", ("a|b", "干净\n脏污", "$10_$20", "<b>")),
        ("triangles", hard_inputs.NAMES),
        ("val_empty", hard_inputs.NAMES),
    ],
)
def test_unusual_data_is_accepted(damaged, case, classes):
    cfg = prepared(damaged / case, classes)
    assert len(DATASETS.build(cfg.train_dataloader.dataset))


def test_test_set_of_fewer_categories_is_evaluated_on_those(damaged, capsys):
    folder = damaged / "val_fewer_categories"
    cfg = prepared(folder)
    assert "'square'; 'triangle'" in " ".join(capsys.readouterr().err.split())
    assert average_precision(folder, cfg) == pytest.approx(1)
