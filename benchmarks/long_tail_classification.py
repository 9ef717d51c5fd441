#!/usr/bin/env python
"""Does BatchFormer help a classifier with the rare classes of a long tail?

    benchmarks/long_tail_classification.py

draws train images of one object each, whose numbers fall geometrically over the classes, to 1/100,
and val images of equally frequent classes. tools/train_mmpretrain.py trains a small ResNet-10 with
MMPretrain's linear head and with BatchFormer's. Accuracy of the classes with many, medium and few
train images is measured. Mean and spread over the seeds go to
benchmarks/results/long_tail_classification.md and .json.

Started again, this goes on where it was stopped. 6 runs take about 12 minutes of a CPU core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import study  # noqa: E402

from plugin_core.evaluation.long_tail import GROUPS, shot_groups  # noqa: E402

CONFIGS = Path("configs/mmpretrain/synthetic")
DATA = {"--train": 1500, "--val": 700, "--size": 64, "--imbalance": 100, "--seed": 0}
BATCH, EPOCHS = 64, 20
# Name of the classifier → its config
CLASSIFIERS = {
    "ResNet-10": "resnet10_long-tail_synthetic.py",
    "ResNet-10, BatchFormer": "resnet10-batchformer_long-tail_synthetic.py",
}

TEMPLATE = """# A classifier's long tail, with and without BatchFormer

`{command}` wrote this, but for the last section. {machine}.

Drawn images of one object, each class in a colour of its own: their numbers fall geometrically over
the classes in train, and are equal in val. A ResNet-10 of half the width is trained with MMPretrain
on images of 48 px in batches of {batch}, from random weights, {epochs} epochs, with its linear head
or with `BatchFormerClsHead` on the same schedule. BatchFormer is as in the paper (4 heads, dropout
0.5, a tenth of the learning rate; the loss is the mean over both streams). In evaluation there is
none. Top-1 accuracy in % on the val images after the last epoch: of all, and of the classes with
many (more than 100), medium and few (fewer than 20) train images, each a mean over its classes.
Mean and sample standard deviation over {seeds} seeds.

{classes}

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/long_tail_classification"))
    study.draw(draw_command(args.work_dir))
    todo = [(name, seed) for seed in range(args.seeds) for name in CLASSIFIERS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(*run, args), todo))
    write(args)


def draw_command(work_dir: Path) -> study.Command:
    options = {**DATA, "--classification": None, "--class-colors": None}
    return study.draw_command(work_dir / "drawn", options)


def folder(name: str, seed: int, work_dir: Path) -> Path:
    return work_dir / f"{Path(CLASSIFIERS[name]).stem}-seed{seed}"


def train_command(name: str, seed: int, args: argparse.Namespace) -> study.Command:
    data = args.work_dir / "drawn" / "classification"
    epochs = math.ceil(args.steps * BATCH / DATA["--train"]) if args.steps else EPOCHS
    options = {
        "randomness.seed": seed,
        "train_dataloader.dataset.data_root": data,
        "val_dataloader.dataset.data_root": data,
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": epochs,
        "param_scheduler.T_max": epochs,
        "default_hooks.checkpoint.interval": 5,
        "default_hooks.checkpoint.max_keep_ckpts": 1,
    }
    settings = [f"{key}={value}" for key, value in options.items()]
    out = folder(name, seed, args.work_dir)
    script = ["tools/train_mmpretrain.py", str(CONFIGS / CLASSIFIERS[name])]
    return [*script, "--work-dir", str(out), "--resume", "auto", "--cfg-options", *settings]


def train(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train a classifier, unless this was done before."""
    if measured(folder(name, seed, args.work_dir)) is None:
        subprocess.run([sys.executable, *train_command(name, seed, args)], check=True)


def measured(run: Path) -> dict[str, float] | None:
    """Read the last accuracies of a run, in percent; None if it has not ended."""
    for path in sorted(run.glob("*/vis_data/scalars.json"), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            found = json.loads(line)
            if "long-tail/all" in found:
                names = [f"long-tail/{group}" for group in ("all", *GROUPS)]
                return {name.partition("/")[2]: found[name] for name in names if name in found}
    return None


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    runs: dict[str, dict[int, Mapping[str, float]]] = {
        name: {
            seed: measured(folder(name, seed, args.work_dir)) or {} for seed in range(args.seeds)
        }
        for name in CLASSIFIERS
    }
    study.write(
        args.results / "long_tail_classification",
        TEMPLATE + study.TABLES,
        runs,
        list(next(iter(runs.values()))[0]),
        [draw_command(args.work_dir), *(train_command(name, 0, args) for name in CLASSIFIERS)],
        kind="classifier",
        classes=class_table(args.work_dir / "drawn" / "classification"),
        batch=BATCH,
        epochs=EPOCHS,
    )


def class_table(data: Path) -> str:
    splits = ("train", "val")
    names = sorted(path.name for path in (data / "train").iterdir())
    counts = {
        split: [len(list((data / split / name).iterdir())) for name in names] for split in splits
    }
    rows = zip(names, shot_groups(counts["train"]), *counts.values(), strict=True)
    table = sorted(rows, key=lambda row: -row[2])
    return tabulate(table, ["class", "group", "train images", "val images"], "github")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
