"""A training that is killed at random moments, and resumed, ends as one that was not disturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import script_and_arguments

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

pytest.importorskip("mmdet", reason="MMDetection is not installed")

CONFIG = "configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
KILLS = int(os.environ.get("KILLS", "3"))
SEED = int(os.environ.get("KILL_SEED", "0"))
STEPS = 8
SMALL = {
    "train_dataloader.batch_size": 1,
    "train_dataloader.dataset.pipeline.2.scale": "(64,64)",
    "train_cfg.max_iters": STEPS,
    "val_dataloader": None,
    "val_evaluator": None,
    "val_cfg": None,
    "default_hooks.checkpoint.interval": 2,
    "default_hooks.checkpoint.max_keep_ckpts": 2,
}


def command(data: Path, work_dir: Path, *words: str) -> list[str]:
    settings = {**SMALL, "train_dataloader.dataset.data_root": f"{data}/"}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    arguments = (CONFIG, "--work-dir", work_dir, *words, "--cfg-options", *pairs)
    return script_and_arguments("train_mmdet.py", arguments)


def test_a_training_killed_at_random_moments_ends_with_the_same_weights(
    tool_server, drawn_coco, assert_same_weights, tmp_path
):
    def start(folder: Path, *words: str):
        log = tmp_path / f"{folder.name}.log"
        return tool_server.start(command(drawn_coco, folder, *words), log, log)

    def wait(process, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return process.poll() is not None

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    wait(
        tool_server.start(command(drawn_coco, tmp_path, "--help"), *[tmp_path / "help.log"] * 2),
        300,
    )
    began = time.monotonic()  # now that the server has imported what takes seconds
    process = start(undisturbed)
    assert wait(process, 300) and process.poll() == 0, log_of(tmp_path, undisturbed)
    length = time.monotonic() - began
    moments, trainings, figures = random.Random(SEED), 0, []
    expected = torch.load(undisturbed / f"iter_{STEPS}.pth")["state_dict"]
    while len(figures) < KILLS or not trainings:
        process = start(killed, *(["--resume"] if killed.exists() else []))
        if len(figures) < KILLS and not wait(process, moments.uniform(0.2, 0.95) * length):
            os.killpg(process.pid, signal.SIGKILL)
            assert wait(process, 60)
            figures.append(sorted(path.name for path in killed.glob("*.pth*")))
            continue
        assert wait(process, 300) and process.poll() == 0, log_of(tmp_path, killed)
        assert_same_weights(torch.load(killed / f"iter_{STEPS}.pth")["state_dict"], expected)
        assert not list(killed.glob("*.part-*"))
        trainings += 1
        if len(figures) < KILLS:  # it was quicker than the kill: begin another
            for file in [*killed.glob("*.pth"), killed / "last_checkpoint"]:
                file.unlink()
    print(f"{len(figures)} kills in {trainings} trainings of {length:.1f} s: {figures}")


def log_of(folder: Path, training: Path) -> str:
    return (folder / f"{training.name}.log").read_text()[-3000:]
