"""A training of MMDetection that is killed at random moments, and resumed each time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killing import check_survival
from tool_server import script_and_arguments

pytest.importorskip("mmdet", reason="MMDetection is not installed")

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

CONFIG = "configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
STEPS = 8
SMALL = {
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": "[8,16,32,64]",
    "train_dataloader.batch_size": 1,
    "train_dataloader.dataset.pipeline.2.scale": "(64,64)",
    "train_cfg.max_iters": STEPS,
    "val_dataloader": None,
    "val_evaluator": None,
    "val_cfg": None,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.checkpoint.max_keep_ckpts": 2,
}


def test_a_training_killed_at_random_moments_ends_with_the_same_weights(
    tool_server, drawn_coco, tmp_path
):
    def command(output: Path, resume: bool) -> list[str]:
        settings = {**SMALL, "train_dataloader.dataset.data_root": f"{drawn_coco}/"}
        pairs = [f"{key}={value}" for key, value in settings.items()]
        flags = ["--resume"] if resume else []
        line = (CONFIG, "--work-dir", output, *flags, "--cfg-options", *pairs)
        return script_and_arguments("train_mmdet.py", line)

    def weights(output: Path) -> dict[str, torch.Tensor]:
        return torch.load(output / f"iter_{STEPS}.pth")["state_dict"]

    print(check_survival(tool_server, tmp_path, command, weights))
