#!/usr/bin/env python
"""Does attention mask consistency (AMC) make a grounding detector look where a phrase's object is?

    benchmarks/attention_mask_consistency.py

draws scenes with captions, and trains a small Grounding DINO on them without AMC and with several
of its settings, as a trial of tools/try_plugins.py with configs of its own. On other scenes it
measures the recall of the phrases' boxes and the pointing game, the share of phrases with the
heatmap's maximum in one of their boxes. Phrases are no objects of COCO, so the trial is judged by
the pointing game and not by AP. Mean and spread over the seeds go to benchmarks/results, to
attention_mask_consistency.md and .json.

Started again, this goes on where it was stopped. 18 runs; two at a time (--jobs 2) take about an
hour and a half on 2 CPU cores.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

import study  # noqa: E402

from mm_plugins.trials import MMDetectionTrials  # noqa: E402
from plugin_core.training.run_folder import occupy  # noqa: E402
from plugin_core.training.trials import (  # noqa: E402
    LocalLauncher,
    Plan,
    derive_configs,
    read_plugins,
    run_all,
)

DATA = {"--train": 800, "--val": 200, "--size": 128, "--seed": 0}
STEPS = 500
CONFIG = ROOT / "configs/mm/synthetic/grounding-dino_r50_synthetic.py"
_AMC = "model.attention_mask_consistency"
# Name of the detector → its label in the trial, and options
DETECTORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Grounding DINO": ("plain", {}),
    "AMC": ("amc_default", {_AMC: {}}),
    "AMC, one random box": ("random_box", {_AMC: {"boxes": "random"}}),
    "AMC, in the activation": ("in_activation", {_AMC: {"resolution": "activation"}}),
    "AMC, first fusion layer": (
        "first_layer",
        {_AMC: {}, "model.heatmap.activation": "encoder.fusion_layers.0"},
    ),
    "AMC, weights of 10 in the activation": (
        "weights_of_10",
        {_AMC: {"mean_weight": 10.0, "max_weight": 10.0, "resolution": "activation"}},
    ),
}

TEMPLATE = """# Attention mask consistency and where a grounding detector looks

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes with captions ("the red disk, the small square left of the star."). MMDetection's
Grounding DINO, small (ResNet-50 of a quarter of the width, 3 levels, 2 encoder and 2 decoder
layers, 20 queries, a BERT of 2 layers and 64 channels), is trained on {train} images of 128 px in
batches of 4, from random weights, {steps} steps, without AMC, with its defaults (the authors'
weights, 0.2 and 0.8, and losses in the resolution of the image), and with what a row names, on the
same schedule and from the same weights. On {val} other images, in percent of the phrases: the
pointing game, whether the gradient heatmap over the image–text attention of the last fusion layer,
or the layer that the row names, has its maximum in a box of the phrase (all, and by the class of
the phrase's objects), and recall at 1 and 5, whether one of the best detections of the phrase
overlaps a box of it by an IoU of 0.5. Chance is a point anywhere. Mean and sample standard
deviation over {seeds} seeds.

{table}

Every run:

{single}

## Commands

The last one trains; its configs and runs are in the folder `trial` of the work folder.

```
{commands}
```

"""


class PhraseTrials(MMDetectionTrials):
    """A trial of detectors that are measured by phrases; its results are the pointing game's."""

    def _metric(self, evaluator: Any) -> Any:
        return evaluator[1]

    def _keep_results(self, evaluator: Any, folder: Path) -> None:
        self._metric(evaluator)["out_file"] = str((folder / "pointing_game.json").absolute())

    def results(self, folder: Path) -> Path | None:
        path = folder / "pointing_game.json"
        return path if path.is_file() else None


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/attention_mask_consistency"))
    study.draw(draw_command(args.work_dir))
    if not text_model(args.work_dir).is_dir():
        subprocess.run([sys.executable, *text_model_command(args.work_dir)], check=True)
    trial = PhraseTrials(str(write_detector("Grounding DINO", args.work_dir)), args.steps)
    others = [f"{DETECTORS[n][0]}={write_detector(n, args.work_dir)}" for n in [*DETECTORS][1:]]
    plugins, out = read_plugins(others), args.work_dir / "trial"
    configs = derive_configs(trial, plugins)
    configs.write(trial, out)
    size = trial.steps, args.seeds, configs.parameters, trial.batch_size, DATA["--val"]
    plan = Plan({}, trial.annotations, list(configs.parameters), *size)
    with occupy(str(out), "--work-dir"):
        outcome = run_all(
            plan, trial, out, jobs=args.jobs, launcher=LocalLauncher(), score=accuracy
        )
    if outcome.failed:
        sys.exit("\n".join(f"failed: {name}: {reason}" for name, reason in outcome.failed.items()))
    write(args)


def accuracy(results: Path) -> float:
    """The share of phrases that the heatmaps point at, in percent."""
    return 100 * json.loads(results.read_text())["accuracy"]


def text_model(work_dir: Path) -> Path:
    return work_dir / "bert"


def draw_command(work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / "coco", DATA)


def text_model_command(work_dir: Path) -> study.Command:
    texts = [
        str(work_dir / "coco" / "annotations" / f"grounding_{split}2017_odvg.jsonl")
        for split in ("train", "val")
    ]
    return ["tools/make_tiny_text_model.py", str(text_model(work_dir)), "--texts", *texts]


def write_detector(name: str, work_dir: Path) -> Path:
    """Write a detector's config; returns its path."""
    of_data, (label, own) = (work_dir / "coco").absolute(), DETECTORS[name]
    options = {
        "model.language_model.name": str(text_model(work_dir).absolute()),
        "train_dataloader.dataset.pipeline.3.tokenizer_name": str(text_model(work_dir).absolute()),
        "train_dataloader.dataset.data_root": f"{of_data}/",
        "val_dataloader.dataset.data_root": f"{of_data}/",
        "val_evaluator.1.ann_file": str(of_data / "annotations/grounding_val2017_flickr30k.json"),
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_interval": STEPS,
        "param_scheduler.1.end": STEPS,
        "param_scheduler.1.milestones": [STEPS * 4 // 5],
        "default_hooks.checkpoint.max_keep_ckpts": 1,
    }
    path = work_dir / f"{label}.py"
    study.write_config(path, CONFIG, {**options, **own})
    return path


def measured(results: Path) -> dict[str, float]:
    """Read pointing game and recall of a run, in percent."""
    pointing = json.loads(results.read_text())
    # MMDetection's metric of recall writes only to the log.
    log = (results.parents[1] / "runs" / results.stem / "output.txt").read_text()
    recall = {
        f"recall@{k}": float(re.findall(rf"recall/{k}: {{'all': ([\d.]+)}}", log)[-1])
        for k in (1, 5)
    }
    numbers = {"pointing game": pointing["accuracy"], "chance": pointing["chance"], **recall}
    numbers |= {k: v["accuracy"] for k, v in pointing["categories"].items()}
    return {key: 100 * value for key, value in numbers.items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    detectors = {name: (args.work_dir / "trial", label) for name, (label, _) in DETECTORS.items()}
    runs = study.measure_runs(detectors, measured, args)
    study.write(
        args.results / "attention_mask_consistency",
        TEMPLATE,
        runs,
        list(next(iter(next(iter(runs.values())).values()))),
        [
            draw_command(args.work_dir),
            text_model_command(args.work_dir),
            ["benchmarks/attention_mask_consistency.py", *sys.argv[1:]],
        ],
        train=DATA["--train"],
        val=DATA["--val"],
        steps=STEPS,
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
