"""Configs that evaluate MMDetection's checkpoints on a dataset of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from mm_plugins.evaluation_runs import prepare_evaluation
from plugin_core.evaluation.comparison.evaluations import Checkpoint, GroundTruth

CONFIG = """
model = dict(type="FasterRCNN")
dataset = dict(type="CocoDataset", ann_file="x.json", data_root="d/", data_prefix=dict(img="v/"))
test_dataloader = dict(batch_size=1, dataset=dict(type="RepeatDataset", times=1, dataset=dataset))
test_evaluator = [dict(type="DumpResults"), dict(type="CocoMetric", ann_file="d/x.json")]
default_hooks = dict(logger=dict(type="LoggerHook", interval=50))
"""
NEW_STYLE = """
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.models.detectors import FasterRCNN

model = dict(type=FasterRCNN)
dataset = dict(type=CocoDataset, ann_file="x.json", data_prefix=dict(img="v/"))
test_dataloader = dict(dataset=dataset)
test_evaluator = dict(type=CocoMetric, ann_file="x.json")
"""
TRUTH = GroundTruth("/d/my val, 1.json", "/d/images")


def prepare(folder: Path, text: str, iou_type: str = "bbox") -> Any:
    (folder / "a.py").write_text(text)
    checkpoint = Checkpoint(str(folder / "a.py"), "w.pth")
    return prepare_evaluation(checkpoint, TRUTH, folder / "out", iou_type)


@pytest.mark.parametrize("text", [CONFIG, NEW_STYLE])
def test_written_config_has_the_data_and_writes_detections(tmp_path, text):
    prepared = prepare(tmp_path, text, "segm")
    ((path, write),) = prepared.files.items()
    assert prepared.command[2:] == [str(path), "w.pth"]
    path.parent.mkdir()
    path.write_text(write())
    cfg = Config.fromfile(str(path))
    dataset = cfg.test_dataloader.dataset
    dataset = dataset.get("dataset", dataset)
    assert (dataset.ann_file, dataset.data_root) == ("/d/my val, 1.json", "")
    assert dataset.data_prefix == {"img": "/d/images/"}
    assert cfg.test_evaluator.ann_file == "/d/my val, 1.json"
    assert prepared.results == Path(f"{cfg.test_evaluator.outfile_prefix}.segm.json")
    assert prepare(tmp_path, text).content == prepared.content
    assert prepare(tmp_path, text + "more = 1\n").content != prepared.content


@pytest.mark.parametrize(
    ("text", "iou_type", "message"),
    [
        (CONFIG, "keypoints", "MMDetection evaluates no keypoints"),
        (
            CONFIG + "test_dataloader = dict(dataset=dict(datasets=[dataset, dataset]))\n",
            "bbox",
            "test_dataloader.dataset: must be one dataset in COCO's format, got 2",
        ),
        (CONFIG + "test_evaluator = None\n", "bbox", "test_evaluator: must have a CocoMetric"),
        (CONFIG + "model = 1 / 0\n", "bbox", "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_evaluated_is_said(tmp_path, text, iou_type, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, text, iou_type)
