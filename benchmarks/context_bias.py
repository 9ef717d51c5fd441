#!/usr/bin/env python
"""Does attention make a detector depend less on the company that objects keep?

    benchmarks/context_bias.py

draws biased scenes: of the images with a class, 9 of 10 in train also hold its companion class, and
1 of 10 in val. It trains a small detector of Detectron2 plain, with triplet attention, with IDA
in its last two stages, and with IDA as the classifier of regions. Each is trained from several
seeds with the same schedule. tools/evaluate_context_bias.py measures each detector. A plain
detector trained on scenes without the bias shows the effect of the bias itself. Mean and spread
over the seeds go to benchmarks/results/context_bias.md and .json.

Complete runs are kept: started again, this goes on where it was stopped. 15 runs; two at a time
(--jobs 2) take a quarter of an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import study  # noqa: E402
from study import folder  # noqa: E402

from plugin_core.evaluation.context_bias import NUMBERS  # noqa: E402

RESULTS = Path("benchmarks/results")
CONFIG = "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
SIZE = {"--size": 128, "--classes": 4, "--seed": 0}
# Folder → options of the drawn data
DATA = {
    "coco": {"--train": 400, "--val": 1200, "--context-bias": 0.9, **SIZE},
    "coco_unbiased": {"--train": 400, "--val": 0, "--context-bias": 0.5, **SIZE},
}
PLAIN = {"MODEL.RESNETS.PLUGINS": "[]"}
IDA_STAGES = {
    "MODEL.RESNETS.PLUGINS": "[{'NAME': 'ida', 'STAGES': ['res4', 'res5'], 'WARM_START': True}]"
}
IDA_HEAD = {
    "MODEL.ROI_HEADS.NAME": "StandardPluginROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead",
}
# Name of the detector → changes of the config on the command line
DETECTORS: Mapping[str, Mapping[str, str]] = {
    "plain": PLAIN,
    "triplet attention": {},
    "IDA in stages": {**PLAIN, **IDA_STAGES},
    "IDA in the RoI head": {**PLAIN, **IDA_HEAD},
    "plain, unbiased train images": PLAIN,
}


TEMPLATE = """# Contextual bias of detectors with and without attention

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes: in train 9 of 10 images with an object of a class hold its companion class too, in val
1 of 10. Each detector is a small one (Faster R-CNN R18-FPN, 500 steps of 8 images of 128 px, from
random weights), on the same images with the same schedule, from {seeds} seeds. Mean and sample
standard deviation over the seeds, each a mean over the classes of box AP in percent on the val
images: all of them, those with the class and its companion ("in company"), those with the class
without it ("alone"), and the gap between these two in percentage points, as it is and between
images with equally many objects; and the share in percent of the images without the class in which
it is detected nevertheless, with a score of at least 0.5, where the companion is and where it is
not.

{table}

Every run:

{single}

## Commands

The first seed's; another differs in `SEED` and the folder.

```
{commands}
```

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/context_bias"))
    for name in DATA:
        study.draw(draw_command(name, args.work_dir))
    study.run_all(DETECTORS, steps, args)
    write(args)


def draw_command(name: str, work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / name, DATA[name])


def train_command(name: str, seed: int, work_dir: Path) -> study.Command:
    train = "coco_unbiased" if "unbiased" in name else "coco"
    register = []
    for part, data in (("train", work_dir / train), ("val", work_dir / "coco")):
        json_file = data / "annotations" / f"instances_{part}2017.json"
        register += ["--register-coco", f"synthetic_{part}", json_file, data / f"{part}2017"]
    settings = {**DETECTORS[name], "SEED": seed, "OUTPUT_DIR": folder(work_dir, name, seed)}
    pairs = [word for pair in settings.items() for word in pair]
    command = ["tools/train_net.py", "--config-file", CONFIG, "--resume", *register, *pairs]
    return [str(word) for word in command]


def evaluate_command(name: str, seed: int, work_dir: Path) -> study.Command:
    out, labels = folder(work_dir, name, seed), work_dir / "coco" / "annotations"
    return [
        "tools/evaluate_context_bias.py",
        *("--annotations", str(labels / "instances_val2017.json")),
        *("--results", str(out / "inference" / "coco_instances_results.json")),
        *("--pairs", str(labels / "context_bias.json")),
        *("--out", str(out / "context_bias")),
    ]


def steps(name: str, seed: int, work_dir: Path) -> list[tuple[study.Command, Path]]:
    out = folder(work_dir, name, seed)
    return [
        (train_command(name, seed, work_dir), out / "inference" / "coco_instances_results.json"),
        (evaluate_command(name, seed, work_dir), out / "context_bias" / "context_bias.json"),
    ]


def measured(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Read the means over the classes, by the number's name."""
    path = folder(args.work_dir, name, seed) / "context_bias" / "context_bias.json"
    content = json.loads(path.read_text())
    return {number: mean["value"] for number, mean in content["mean"].items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    runs = {name: {seed: measured(name, seed, args) for seed in args.seeds} for name in DETECTORS}
    commands = [draw_command(name, args.work_dir) for name in DATA]
    for name in DETECTORS:
        commands += [command for command, _ in steps(name, args.seeds[0], args.work_dir)]
    study.write(RESULTS / "context_bias", TEMPLATE, runs, NUMBERS.values(), commands)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
