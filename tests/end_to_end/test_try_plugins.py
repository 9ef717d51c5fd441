"""tools/try_plugins.py on drawn images, as a user types it, killed and started again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare_detectors
import pytest
import try_plugins
from detectron2.data import DatasetCatalog, MetadataCatalog
from tool_server import script_and_arguments

from plugin_core.evaluation.comparison.sections import Section
from plugin_core.training.trials import Plan

CONFIG = """
_BASE_: "model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MODEL:
  WEIGHTS: ""
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}
  FPN: {OUT_CHANNELS: 16}
  RPN: {PRE_NMS_TOPK_TRAIN: 50, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {NUM_CLASSES: 7, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {FC_DIM: 32}
DATASETS: {TRAIN: ["tried_train"], TEST: ["tried_val"]}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 0.001}
DATALOADER: {NUM_WORKERS: 0}
"""

MMDETECTION = """
_base_ = "mm_plugins::synthetic/faster-rcnn_r18_fpn_demo.py"
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32),
    ),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=20)),
)
train_dataloader = dict(dataset=dict(data_root="{root}"))
val_dataloader = dict(dataset=dict(data_root="{root}"))
val_evaluator = dict(ann_file="{root}annotations/instances_val2017.json")
"""


@pytest.fixture
def arguments(drawn_coco: Path, tmp_path: Path) -> Iterator[list[Any]]:
    (tmp_path / "mine.yaml").write_text(CONFIG)
    words: list[Any] = [tmp_path / "mine.yaml", "--out", tmp_path / "trial", "--seeds", 1]
    for part in ("train", "val"):
        labels = drawn_coco / f"annotations/instances_{part}2017.json"
        words += ["--register-coco", f"tried_{part}", labels, drawn_coco / f"{part}2017"]
    yield words
    for name in [name for name in DatasetCatalog.list() if name.startswith("tried_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_killed_trial_goes_on_and_collects_the_results(tool_server, run_tool, arguments, tmp_path):
    command = [*arguments, "--with", "simam", "--steps", 2]
    out = tmp_path / "trial"
    log = tmp_path / "killed.log"
    killed = tool_server.start(script_and_arguments("try_plugins.py", tuple(command)), log, log)
    while not (out / "runs/plain-seed0/finished.json").is_file():
        assert killed.poll() is None, log.read_text()
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    while killed.poll() is None:
        time.sleep(0.02)
    begun = (out / "runs/plain-seed0/output.txt").read_bytes()

    # The rest without what its processes would import
    printed = run_tool("../tests/end_to_end/forking_try_plugins.py", *command).stdout

    assert (out / "runs/plain-seed0/output.txt").read_bytes() == begun  # not trained again
    assert (out / "comparison/report.md").is_file()
    assert "+ MODEL.RESNETS.PLUGINS: [{'NAME': 'simam'" in printed
    assert "2 variants × 1 seed = 2 runs of 2 steps" in printed
    plan = json.loads((out / "plan.json").read_text())
    for run in plan["runs"]:
        assert run["finished"]["AP"] >= 0
        assert isinstance(json.loads((out / run["results"]).read_text()), list)
    report = json.loads((out / "comparison/report.json").read_text())
    assert "Each training has 2 steps of 2 images." in (out / "comparison/report.md").read_text()
    (costs,) = (s["data"] for s in report["sections"] if s["title"] == "What it costs")
    assert costs["simam"]["parameters"] > costs["plain"]["parameters"] > 0
    assert all(len(cost["seconds"]["1"]) >= 3 for cost in costs.values())
    with pytest.raises(SystemExit, match=r"another plan \(plugins was \['simam'\] and is "):
        try_plugins.main([*map(str, command), "--with", "ida"])


def test_trial_in_mmdetection_trains_and_compares(run_tool, drawn_coco, tmp_path):
    config, out = tmp_path / "mine.py", tmp_path / "trial"
    config.write_text(MMDETECTION.format(root=f"{drawn_coco}/"))
    words = [config, "--out", out, "--with", "simam", "--control", "--seeds", 1, "--steps", 1]
    printed = run_tool("../tests/end_to_end/forking_try_plugins.py", *words).stdout
    assert "3 variants × 1 seed = 3 runs of 1 steps" in printed
    runs = json.loads((out / "plan.json").read_text())["runs"]
    assert [run["label"] for run in runs if run["finished"]["AP"] >= 0] == [
        "plain",
        "simam",
        "control",
    ]
    report = json.loads((out / "comparison/report.json").read_text())
    assert report["settings"]["control"] == "control"
    assert report["verdict"].startswith("simam and plain are not told apart")
    (costs,) = (s["data"] for s in report["sections"] if s["title"] == "What it costs")
    assert all(len(cost["seconds"]["1"]) >= 3 for cost in costs.values())


@pytest.mark.parametrize(("finished", "given"), [(3, True), (2, True), (1, False)])
def test_control_is_told_to_the_comparison(monkeypatch, tmp_path, finished, given):
    commands: list[list[str]] = []
    monkeypatch.setattr(compare_detectors, "main", lambda argv, _: commands.append(argv))
    labels = ["plain", "control", "simam"]
    parameters = dict.fromkeys(labels, 10)
    plan = Plan({}, "val.json", labels, 2, 1, parameters, batch_size=1, test_images=0)
    framework = SimpleNamespace(images=None, suffix=".yaml", weights=lambda *_: "model.pth")
    names = [run.name for run in plan.runs(tmp_path)][:finished]
    assert try_plugins.compare(framework, plan, tmp_path, names, Section("Training", ""))
    assert ("--control control" in " ".join(commands[0])) is given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with", "simamm"], "error: --with simamm: must be one of"),
        (["--with", "simam", "--with", "simam"], "error: --with simam: is given twice"),
        (["--with", "batchformer_v2"], "error: --with batchformer_v2: MODEL.META_ARCH"),
        (["--with", "simam", "--budget", "soon"], "error: --budget: must be a time"),
        (["--with", "simam", "--jobs", 0], "error: --jobs: must be 1 or more"),
        (["--with", "simam", "--launcher", "slurm"], "error: --launcher slurm: "),
        (["--with", "simam", "--iou-type", "segm"], "MODEL.MASK_ON is False"),
        (["--with", "simam", "--partition", "gpu"], "are for --launcher slurm"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, tmp_path, words, message):
    with pytest.raises(SystemExit) as failed:
        try_plugins.main([*map(str, arguments), *map(str, words)])
    assert message in str(failed.value) and "\n" not in str(failed.value)
    assert not (tmp_path / "trial").exists()
