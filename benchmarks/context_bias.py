#!/usr/bin/env python
"""Does IDA make a detector depend less on the company that objects keep?

    benchmarks/context_bias.py

draws biased scenes: of the images with a class, 9 of 10 in train also hold its companion class, and
5 of 10 in val. In the clear scenes every object has its outline; in the ambiguous ones every image
has a pebble and one more object, which alone tells the pebble's class (--ambiguous of
tools/make_synthetic_coco.py).
tools/try_plugins.py trains a small detector of Detectron2 on each, plain, with three forms of IDA
in its last two stages, and with IDA as the classifier of regions. Plain detectors trained on
ambiguous scenes with less bias show what the bias does. Each is measured as
tools/evaluate_context_bias.py does. Mean and spread over the seeds go to
benchmarks/results/context_bias.md and .json.

Started again, this goes on where it was stopped; all runs of a seed come before those of the next.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import evaluate_context_bias  # noqa: E402
import study  # noqa: E402

from plugin_core.evaluation.context_bias import NUMBERS, means  # noqa: E402

CONFIG = ROOT / "configs/d2/Synthetic-Detection/faster_rcnn_R_18_FPN_demo.yaml"
# A quarter of a ResNet-50's width, with as many blocks
NARROW = {"DEPTH": 50, "STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 16}
# After 400 steps a plain detector's gap on the ambiguous scenes was 7.8.
SCHEDULE = {"MAX_ITER": 600, "STEPS": [480]}
TRAIN = {"--train": 1000, "--val": 0}
VAL = {"--train": 0, "--val": 500}
SIZE = {"--size": 128, "--classes": 4, "--seed": 0}
# Colors tell the other object's class at once, so that the pebble's is what is left to learn.
PEBBLES = {"--ambiguous": 1.0, "--class-colors": None, **SIZE}
# Folder → options of the drawn data
DATA = {
    "clear_90": {**TRAIN, "--context-bias": 0.9, **SIZE},
    "clear_50": {**VAL, "--context-bias": 0.5, **SIZE},
    "ambiguous_90": {**TRAIN, "--context-bias": 0.9, **PEBBLES},
    "ambiguous_70": {**TRAIN, "--context-bias": 0.7, **PEBBLES},
    "ambiguous_50": {**TRAIN, "--val": 500, "--context-bias": 0.5, **PEBBLES},
}
NAMES = {"NAME": "ida", "STAGES": ["res4", "res5"], "WARM_START": True}
GROUPED = {**NAMES, "PROJECTION": "grouped"}
NINE_BLOCKS = {**NAMES, "BLOCKS": "all", "NUM_HEADS": 4, "PROJECTION": "full"}
HEAD = {"ROI_HEADS": {"NAME": "StandardPluginROIHeads"}}


def _in_stages(plugin: dict[str, Any]) -> dict[str, Any]:
    backbone = {"NAME": "build_resnet_plugin_fpn_backbone"}
    return {"MODEL": {"BACKBONE": backbone, "RESNETS": {"PLUGINS": [plugin]}}}


def _as_head(**settings: Any) -> dict[str, Any]:
    return {"MODEL": {**HEAD, "ROI_BOX_HEAD": {"NAME": "IDABoxHead", "IDA": settings}}}


# Name of a config in the work folder → what it holds
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"_BASE_": str(CONFIG), "MODEL": {"RESNETS": NARROW}, "SOLVER": SCHEDULE},
    "ida_grouped": _in_stages(GROUPED),
    "ida_full": _in_stages(NINE_BLOCKS),
    "ida_head": _as_head(),
    "ida_bare_head": _as_head(NUM_MIXERS=0),
    "bias_70": {"DATASETS": {"TRAIN": ["train_70"]}},
    "bias_50": {"DATASETS": {"TRAIN": ["train_50"]}},
}
# Name of the detector → its label in a trial
IDA = {
    "IDA in stages": "ida",
    "IDA in the RoI head": "ida_head",
    "IDA in the RoI head, without mixers": "ida_bare_head",
    "IDA in stages, grouped": "ida_grouped",
    "IDA in stages, full in all blocks": "ida_full",
}
# Trial and its data → detectors
TRIALS = {
    "ambiguous": {
        "plain": "plain",
        "plain, bias 0.5": "bias_50",
        **IDA,
        "plain, bias 0.7": "bias_70",
    },
    "clear": {"plain": "plain", **IDA},
}

TEMPLATE = """# Contextual bias of detectors with and without IDA

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes: in train 9 of 10 images with an object of a class hold its companion class too, in val
5 of 10. In the ambiguous scenes each image has two objects. One of them is a pebble, whatever its
class, and a color tells the class of the other one. "Bias 0.7" and "0.5" are trained on ambiguous
scenes of which 7 and 5 of 10 images hold the companion. Each detector is a small one (Faster R-CNN
R50-FPN of a quarter of the width, {steps} steps of 8 images of 128 px, from random weights, which
are the same but for IDA's own), on the same images with the same schedule, from {seeds} seeds. Mean
and sample standard deviation over the seeds, each a mean over the classes of box AP in percent on
the val images: all of them, those with the class and its companion ("in company"), those with the
class without it ("alone"), and the gap between these two in percentage points, as it is and between
images with equally many objects; and the share in percent of the images without the class in which
it is detected nevertheless, with a score of at least 0.5, where the companion is and where it is
not.

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/context_bias"))
    for name in DATA:
        study.draw(draw_command(name, args.work_dir))
    write_configs(args.work_dir)
    for seeds in range(1, args.seeds + 1):
        for trial in TRIALS:
            # A process of its own: both trials name their datasets alike.
            subprocess.run([sys.executable, *trial_command(trial, args, seeds)], check=True)
    write(args)


def write_configs(work_dir: Path) -> None:
    for name, content in CONFIGS.items():
        text = yaml.safe_dump({"_BASE_": "plain.yaml", **content})
        (work_dir / f"{name}.yaml").write_text(text)


def draw_command(name: str, work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / name, DATA[name])


def trial_command(trial: str, args: argparse.Namespace, seeds: int) -> study.Command:
    work_dir, register = args.work_dir, []
    parts = [("synthetic_train", 90, "train2017"), ("synthetic_val", 50, "val2017")]
    if trial == "ambiguous":
        parts += [(f"train_{bias}", bias, "train2017") for bias in (70, 50)]
    for name, bias, part in parts:
        data = f"{trial}_{bias}"
        json_file = work_dir / data / "annotations" / f"instances_{part}.json"
        register += ["--register-coco", name, json_file, work_dir / data / part]
    variants = [
        f"{label}={work_dir / label}.yaml" if label in CONFIGS else label
        for label in TRIALS[trial].values()
        if label != "plain"
    ]
    arguments = argparse.Namespace(**{**vars(args), "seeds": seeds})
    out = work_dir / f"trial_{trial}"
    return study.trial_command(work_dir / "plain.yaml", variants, out, arguments, *register)


def measured(results: Path, labels: Path) -> dict[str, float | None]:
    """Measure the means over the classes, by the number's name."""
    words = ["--annotations", labels / "instances_val2017.json", "--results", results]
    words += ["--pairs", labels / "context_bias.json"]
    report = evaluate_context_bias.prepare(evaluate_context_bias.parse_args([*map(str, words)]))()
    return {number: value for number, (value, _) in means(report.classes).items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    runs: dict[str, Any] = {}
    commands = [draw_command(name, args.work_dir) for name in DATA]
    for trial, detectors in TRIALS.items():
        labels, out = (
            args.work_dir / f"{trial}_50" / "annotations",
            args.work_dir / f"trial_{trial}",
        )
        named = {f"{trial}: {name}": (out, label) for name, label in detectors.items()}
        runs |= study.measure_runs(named, partial(measured, labels=labels), args)
        commands.append(trial_command(trial, args, args.seeds))
    steps = args.steps or SCHEDULE["MAX_ITER"]
    path = args.results / "context_bias"
    study.write(path, TEMPLATE + study.TABLES, runs, NUMBERS.values(), commands, steps=steps)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
