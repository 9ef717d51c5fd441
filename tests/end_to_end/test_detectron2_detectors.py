"""Detectors other than Faster R-CNN train and report all their metrics by the command line."""

from __future__ import annotations

import json
import math

import pytest
from detectron2_sample import arguments, losses, metrics, register, results

BOXES = "AP,AP50,AP75,APs,APm,APl"
KEYPOINTS = "AP,AP50,AP75,APm,APl"
FEW = {
    "SOLVER.MAX_ITER": "2",
    "SOLVER.CHECKPOINT_PERIOD": "100",
}


@pytest.mark.parametrize(
    ("config", "labels", "expected"),
    [
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_triplet_FPN_1x",
            "person_keypoints",
            {"bbox": BOXES, "keypoints": KEYPOINTS},
        ),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_1x",
            "instances",
            {"bbox": BOXES, "segm": BOXES},
        ),
        ("COCO-Detection/retinanet_R_50_FPN_AMC_1x", "instances", {"bbox": BOXES}),
    ],
    ids=["keypoint", "mask", "retinanet-amc"],
)
def test_detector_trains_and_reports_all_metrics(
    config, labels, expected, photographs, run_tool, tmp_path
):
    line = arguments(
        photographs, tmp_path, config=f"configs/d2/{config}.yaml", labels=labels, **FEW
    )
    printed = run_tool("train_net.py", *line).stdout
    assert losses(tmp_path) and all(map(math.isfinite, losses(tmp_path)))
    records = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    amc = [r for r in records if {"loss_amc_mean", "loss_amc_max"} <= set(r)]
    assert bool(amc) == ("AMC" in config)
    assert reported(printed) == expected
    keys = {"segm": "segmentation", "keypoints": "keypoints", "bbox": "bbox"}
    assert {keys[task] for task in expected} <= set(results(tmp_path)[0])


def reported(printed: str) -> dict[str, str]:
    """Names of the metrics of each task, as Detectron2 prints them to be copied."""
    lines = metrics(printed)
    return {
        line.removeprefix("Task: "): names
        for line, names in zip(lines, lines[1:], strict=False)
        if line.startswith("Task: ")
    }


def lazy_arguments(sample, output, *flags: str, **options: object) -> list[str]:
    settings = {
        "train.output_dir": output,
        "train.init_checkpoint": "''",
        "train.max_iter": 2,
        "train.checkpointer.period": 1,
        "train.log_period": 1,
        "train.seed": 7,
        "model.backbone.bottom_up.freeze_at": 0,
        "model.backbone.bottom_up.stem.norm": "BN",
        "model.backbone.bottom_up.stages.norm": "BN",
        "model.proposal_generator.pre_nms_topk": "[200,200]",
        "model.proposal_generator.post_nms_topk": "[100,50]",
        "model.roi_heads.batch_size_per_image": 16,
        "model.roi_heads.box_head.fc_dims": "[32,1024]",
        "model.roi_heads.mask_head.conv_dims": "[32,32]",
        "model.roi_heads.box_predictor.test_score_thresh": 0.0,
        "model.roi_heads.box_predictor.test_topk_per_image": 10,
        "optimizer.lr": 0.0005,
        "dataloader.train.dataset.names": "sample_train",
        "dataloader.test.dataset.names": "sample_val",
        "dataloader.train.total_batch_size": 2,
        "dataloader.train.num_workers": 0,
        "dataloader.test.num_workers": 0,
        "dataloader.train.mapper.augmentations.0.short_edge_length": "[96]",
        "dataloader.test.mapper.augmentations.0.short_edge_length": 96,
        **options,
    }
    config = "configs/d2/COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_1x.py"
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return ["--config-file", config, *register(sample), *flags, *pairs]


TOOL = "lazyconfig_train_net.py"


def test_lazy_config_trains_resumes_with_new_settings_and_evaluates(
    photographs, run_tool, tmp_path
):
    few = {"train.max_iter": 1, "dataloader.train.mapper.skip_bad_images": True}
    first = run_tool(TOOL, *lazy_arguments(photographs, tmp_path, **few))
    assert reported(first.stdout) == {"bbox": BOXES, "segm": BOXES}
    line = lazy_arguments(photographs, tmp_path, "--resume", **{"optimizer.lr": 0.001})
    resumed = run_tool(TOOL, *line)
    assert "Starting training from iteration 1" in resumed.stdout
    changed = "Resumed at iteration 1 with other settings, which hold from here on: "
    assert changed in resumed.stdout
    assert "optimizer.lr 0.0005 -> 0.001" in resumed.stdout
    assert "train.max_iter 1 -> 2" in resumed.stdout
    checkpoint = {"train.init_checkpoint": tmp_path / "model_final.pth"}
    line = lazy_arguments(photographs, tmp_path / "again", "--eval-only", **checkpoint)
    again = run_tool(TOOL, *line)
    assert metrics(again.stdout) == metrics(resumed.stdout) != []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"train.max_itr": 3}, ["train.max_itr", "did you mean 'max_iter'"]),
        ({"dataloader.train.dataset.names": "sample_trian"}, ["'sample_trian'", "sample_train"]),
        ({"train.init_checkpoint": "none.pth"}, ["train.init_checkpoint", "no checkpoint"]),
    ],
    ids=["key", "dataset", "weights"],
)
def test_wrong_setting_of_a_lazy_config_is_one_clear_line(
    options, expected, photographs, run_tool, earlier_run, assert_refused
):
    line = lazy_arguments(photographs, earlier_run, **options)
    assert_refused(run_tool(TOOL, *line, check=False), expected)
