"""Small trainings on data that is read from a copy, and with a detector that finds nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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


def train_mmdetection(run_tool, data, output, **more):
    settings = {
        **SMALL,
        **{f"{split}_dataloader.dataset.data_root": f"{data}/" for split in ("train", "val")},
        "val_evaluator.ann_file": data / "annotations/instances_val2017.json",
        **more,
    }
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return run_tool("train_mmdet.py", CONFIG, "--work-dir", output, "--cfg-options", *pairs)


def test_no_detections_are_a_line_in_mmdetection(run_tool, drawn_coco, tmp_path):
    more = {
        "model.test_cfg.rcnn.score_thr": 1.1,
        "default_hooks.checkpoint.save_best": "auto",
    }
    done = train_mmdetection(run_tool, drawn_coco, tmp_path, **more)
    printed = done.stdout + done.stderr
    assert "results of the whole dataset is empty" in printed and "Traceback" not in printed


def test_written_config_names_the_users_own_files(run_tool, drawn_coco, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn_coco, data)
    for path in data.glob("annotations/instances_*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            del annotation["iscrowd"]
        path.write_text(json.dumps(content))
    done = train_mmdetection(run_tool, data, tmp_path / "out")
    assert done.stderr.count("reading a copy of") == 2
    written = (tmp_path / "out" / Path(CONFIG).name).read_text()
    assert "copies" not in written and str(data / "annotations") in written
