"""Command lines that train MMDetection's configs on photographs, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

# Faster R-CNN with triplet attention and IDA, and exact resuming
CONFIG = Path(__file__).parent / "faster-rcnn_r18-triplet-ida_fpn_ida-head_coco-sample.py"
# Small images and random weights, as nothing can be downloaded; ten steps with a checkpoint after
# five. Without weight decay, which moves what has no gradient.
SMALL = {
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.init_cfg": None,
    "train_dataloader.num_workers": 1,
    "train_dataloader.dataset.pipeline.2.scale": "(200,128)",
    **{f"{part}_dataloader.num_workers": 1 for part in ("val", "test")},
    **{f"{part}_dataloader.dataset.pipeline.1.scale": "(200,128)" for part in ("val", "test")},
    "train_cfg._delete_": True,
    "train_cfg.type": "IterBasedTrainLoop",
    "train_cfg.max_iters": 10,
    "train_cfg.val_interval": 10,
    "param_scheduler.0.end": 3,
    "optim_wrapper.optimizer.lr": 0.01,
    "optim_wrapper.optimizer.weight_decay": 0.0,
    "optim_wrapper.clip_grad.max_norm": 10.0,
    "default_hooks.checkpoint.by_epoch": False,
    "default_hooks.checkpoint.interval": 5,
    "default_hooks.logger.interval": 1,
    "log_processor.by_epoch": False,
    "log_processor.window_size": 1,
    "randomness.seed": 7,
}
# Narrow, few proposals, and detections even from weights that have learned nothing
TWO_STAGES = {
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": "[8,16,32,64]",
    "model.neck.out_channels": 64,
    "model.rpn_head.in_channels": 64,
    "model.rpn_head.feat_channels": 64,
    "model.roi_head.bbox_roi_extractor.out_channels": 64,
    "model.roi_head.bbox_head.in_channels": 64,
    "model.roi_head.bbox_head.fc_out_channels": 64,
    "model.train_cfg.rpn_proposal.nms_pre": 200,
    "model.train_cfg.rpn_proposal.max_per_img": 100,
    "model.train_cfg.rcnn.sampler.num": 32,
    "model.test_cfg.rpn.nms_pre": 200,
    "model.test_cfg.rpn.max_per_img": 50,
    "model.test_cfg.rcnn.score_thr": 0.0,
    "model.test_cfg.rcnn.max_per_img": 10,
}


def options(
    sample: Path, output: Path, *more: str, model: dict[str, object] = TWO_STAGES
) -> list[str]:
    """What shrinks a config, points it to the sample, and its results to the output folder.

    ``model`` is what shrinks this kind of detector; ``more`` are options as "key=value".
    """
    settings: dict[str, object] = {**SMALL, **model}
    for part in ("train", "val", "test"):
        settings[f"{part}_dataloader.dataset.data_root"] = f"{sample}/"
    for part in ("val", "test"):
        json_file = sample / "annotations" / "instances_val2017.json"
        settings[f"{part}_evaluator.ann_file"] = json_file
        settings[f"{part}_evaluator.outfile_prefix"] = output / "results"
    pairs = [f"{key}={value}" for key, value in settings.items()]
    return ["--work-dir", str(output), "--cfg-options", *pairs, *more]


def weights(output: Path, name: str = "iter_10.pth") -> dict[str, torch.Tensor]:
    return torch.load(output / name)["state_dict"]


def results(output: Path, task: str = "bbox") -> list[dict]:
    return json.loads((output / f"results.{task}.json").read_text())


def scalars(output: Path) -> list[dict]:
    (file,) = output.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]
