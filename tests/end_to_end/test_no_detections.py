"""Evaluation where a detector finds nothing."""

from __future__ import annotations

import json

from detectron2_sample import arguments
from test_fuzz_mmdet import CONFIG, SMALL

LABELS = "annotations/instances_train2017.json"


def test_no_detections_are_a_line_in_detectron2(run_tool, drawn_coco, tmp_path):
    classes = len(json.loads((drawn_coco / LABELS).read_text())["categories"])
    options = {
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "MODEL.ROI_HEADS.NUM_CLASSES": str(classes),
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "1.1",
        "SOLVER.MAX_ITER": "2",
    }
    done = run_tool("train_net.py", *arguments(drawn_coco, tmp_path, **options))
    printed = done.stdout + done.stderr
    assert "No predictions from the model" in printed and "Traceback" not in printed


def test_no_detections_are_a_line_in_mmdetection(run_tool, drawn_coco, tmp_path):
    settings = {
        **SMALL,
        **{f"{split}_dataloader.dataset.data_root": f"{drawn_coco}/" for split in ("train", "val")},
        "val_evaluator.ann_file": drawn_coco / "annotations/instances_val2017.json",
        "model.test_cfg.rcnn.score_thr": 1.1,
        "default_hooks.checkpoint.save_best": "auto",
    }
    pairs = [f"{key}={value}" for key, value in settings.items()]
    done = run_tool("train_mmdet.py", CONFIG, "--work-dir", tmp_path, "--cfg-options", *pairs)
    printed = done.stdout + done.stderr
    assert "results of the whole dataset is empty" in printed and "Traceback" not in printed
