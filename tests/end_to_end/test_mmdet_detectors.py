"""Detectors other than Faster R-CNN train and report all their metrics by the command line."""

from __future__ import annotations

import math

import pytest
from mmdet_sample import ONE_STAGE, TWO_STAGES, options, results, scalars

FEW = [
    "train_cfg.max_iters=4",
    "train_cfg.val_interval=4",
    "train_dataloader.batch_size=1",
    "default_hooks.checkpoint=None",
]
MASKS = {**TWO_STAGES, "model.test_cfg.rcnn.max_per_img": 10}  # as masks are pasted one by one


@pytest.mark.parametrize(
    ("detector", "model", "tasks"),
    [
        ("mask-rcnn", MASKS, {"bbox": "bbox", "segm": "segmentation"}),
        ("retinanet", ONE_STAGE, {"bbox": "bbox"}),
    ],
    ids=["mask", "retinanet"],
)
def test_detector_trains_and_reports_all_metrics(
    detector, model, tasks, coco_sample, run_tool, tmp_path
):
    config = f"configs/mm/triplet_attention/{detector}_r50-triplet_fpn_1x_coco.py"
    run_tool("train_mmdet.py", config, *options(coco_sample, tmp_path, *FEW, model=model))
    *steps, evaluation = scalars(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    losses = [v for record in steps for name, v in record.items() if "loss" in name]
    assert all(math.isfinite(loss) for loss in losses) and len(losses) > len(steps)
    sizes = ("", "_50", "_75", "_s", "_m", "_l")
    assert {name for name in evaluation if name.startswith("coco/")} >= {
        f"coco/{task}_mAP{size}" for task in tasks for size in sizes
    }
    for task, key in tasks.items():
        found = results(tmp_path, task)
        assert found and all(key in result for result in found)
