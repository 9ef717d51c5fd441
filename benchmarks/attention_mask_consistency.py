#!/usr/bin/env python
"""Does attention mask consistency (AMC) make a grounding detector look where a phrase's object is?

    benchmarks/attention_mask_consistency.py

draws scenes with captions, and trains a small Grounding DINO on them without AMC and with several
of its settings, on the same schedule and from several seeds. On other scenes it measures the recall
of the phrases' boxes and the pointing game, the share of phrases with the heatmap's maximum in one
of their boxes. Mean and spread over the seeds go to benchmarks/results, to
attention_mask_consistency.md and .json.

Complete runs are kept: started again, this goes on where it was stopped. 18 runs; two at a time
(--jobs 2) take about an hour and a half on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import study  # noqa: E402
from study import folder  # noqa: E402

RESULTS = Path("benchmarks/results")
CONFIGS = "configs/mm/synthetic"
DATA = {"--train": 800, "--val": 200, "--size": 128, "--seed": 0}
STEPS = 500
CONFIG = "grounding-dino_r50_synthetic.py"
AMC_CONFIG = "grounding-dino_r50-amc_synthetic.py"
_AMC = "model.attention_mask_consistency"
_FIRST_LAYER = {"model.heatmap.activation": "encoder.fusion_layers.0"}
# Name of the detector → its config, and options
DETECTORS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "Grounding DINO": (CONFIG, {}),
    "AMC": (AMC_CONFIG, {}),
    "AMC, one random box": (AMC_CONFIG, {f"{_AMC}.boxes": "random"}),
    "AMC, in the activation": (AMC_CONFIG, {f"{_AMC}.resolution": "activation"}),
    "AMC, first fusion layer": (AMC_CONFIG, _FIRST_LAYER),
    "AMC, weights of 10 in the activation": (
        AMC_CONFIG,
        {
            f"{_AMC}.mean_weight": 10.0,
            f"{_AMC}.max_weight": 10.0,
            f"{_AMC}.resolution": "activation",
        },
    ),
}

TEMPLATE = """# Attention mask consistency and where a grounding detector looks

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes with captions ("the red disk, the small square left of the star."). MMDetection's
Grounding DINO, small (ResNet-50 of a quarter of the width, 3 levels, 2 encoder and 2 decoder
layers, 20 queries, a BERT of 2 layers and 64 channels), is trained on {train} images of 128 px in
batches of 4, from random weights, {steps} steps, without AMC, with its defaults (the authors'
weights, 0.2 and 0.8, and losses in the resolution of the image), and with what a row names, on the
same schedule. On {val} other images, in percent of the phrases: the pointing game, whether the
gradient heatmap over the image–text attention of the last fusion layer, or the layer that the row
names, has its maximum in a box of the phrase (all, and by the class of the phrase's objects), and
recall at 1 and 5, whether one of the best detections of the phrase overlaps a box of it by an IoU
of 0.5. Chance is a point anywhere. Mean and sample standard deviation over {seeds} seeds.

{table}

Every run:

{single}

## Commands

The first seed's; another differs in `randomness.seed` and the folder.

```
{commands}
```

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/attention_mask_consistency"))
    study.draw(draw_command(args.work_dir))
    if not text_model(args.work_dir).is_dir():
        subprocess.run([sys.executable, *text_model_command(args.work_dir)], check=True)
    study.run_all(DETECTORS, steps, args)
    write(args)


def data(work_dir: Path) -> Path:
    return work_dir / "coco"


def text_model(work_dir: Path) -> Path:
    return work_dir / "bert"


def draw_command(work_dir: Path) -> study.Command:
    return study.draw_command(data(work_dir), DATA)


def text_model_command(work_dir: Path) -> study.Command:
    texts = [
        str(data(work_dir) / "annotations" / f"grounding_{split}2017_odvg.jsonl")
        for split in ("train", "val")
    ]
    return ["tools/make_tiny_text_model.py", str(text_model(work_dir)), "--texts", *texts]


def steps(name: str, seed: int, work_dir: Path) -> list[tuple[study.Command, Path]]:
    """List the commands of a run: a training, which evaluates at its end."""
    out, of_data = folder(work_dir, name, seed), data(work_dir)
    phrases = of_data / "annotations" / "grounding_val2017_flickr30k.json"
    options = {
        "model.language_model.name": text_model(work_dir),
        "train_dataloader.dataset.pipeline.3.tokenizer_name": text_model(work_dir),
        "train_dataloader.dataset.data_root": f"{of_data}/",
        "val_dataloader.dataset.data_root": f"{of_data}/",
        "val_evaluator.1.ann_file": phrases,
        "val_evaluator.1.out_file": out / "pointing_game.json",
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_interval": STEPS,
        "param_scheduler.1.end": STEPS,
        "param_scheduler.1.milestones": f"[{STEPS * 4 // 5}]",
        "default_hooks.checkpoint.max_keep_ckpts": 1,
        "randomness.seed": seed,
    }
    config, own = DETECTORS[name]
    pairs = [f"{key}={value}" for key, value in (options | own).items()]
    config = f"{CONFIGS}/{config}"
    command = ["tools/train_mmdet.py", config, "--work-dir", out, "--cfg-options", *pairs]
    return [([str(word) for word in command], out / "pointing_game.json")]


def measured(name: str, seed: int, work_dir: Path) -> dict[str, float]:
    """Read pointing game and recall of a run, in percent."""
    out = folder(work_dir, name, seed)
    pointing = json.loads((out / "pointing_game.json").read_text())
    # MMDetection's metric of recall writes only to the log.
    log = (out / "output.txt").read_text()
    recall = {
        f"recall@{k}": float(re.findall(rf"recall/{k}: {{'all': ([\d.]+)}}", log)[-1])
        for k in (1, 5)
    }
    numbers = {"pointing game": pointing["accuracy"], "chance": pointing["chance"], **recall}
    numbers |= {k: v["accuracy"] for k, v in pointing["categories"].items()}
    return {key: 100 * value for key, value in numbers.items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    runs = {
        name: {seed: measured(name, seed, args.work_dir) for seed in args.seeds}
        for name in DETECTORS
    }
    commands = [draw_command(args.work_dir), text_model_command(args.work_dir)]
    for name in DETECTORS:
        commands += [command for command, _ in steps(name, args.seeds[0], args.work_dir)]
    study.write(
        RESULTS / "attention_mask_consistency",
        TEMPLATE,
        runs,
        list(next(iter(next(iter(runs.values())).values()))),
        commands,
        train=DATA["--train"],
        val=DATA["--val"],
        steps=STEPS,
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
