#!/usr/bin/env python
"""Does attention make a detector depend less on the company that objects keep?

    benchmarks/context_bias.py

draws biased scenes: of the images with a class, 9 of 10 in train also hold its companion class, and
1 of 10 in val. tools/try_plugins.py trains a small detector of Detectron2 plain, with triplet
attention, with IDA in its last two stages, and with IDA as the classifier of regions. A plain
detector trained on scenes without the bias shows the effect of the bias itself. Each is measured as
tools/evaluate_context_bias.py does. Mean and spread over the seeds go to
benchmarks/results/context_bias.md and .json.

Started again, this goes on where it was stopped. 15 runs; two at a time (--jobs 2) take a quarter
of an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import evaluate_context_bias  # noqa: E402
import study  # noqa: E402
import try_plugins  # noqa: E402

from plugin_core.evaluation.context_bias import NUMBERS, means  # noqa: E402

CONFIG = ROOT / "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
SIZE = {"--size": 128, "--classes": 4, "--seed": 0}
# Folder → options of the drawn data
DATA = {
    "coco": {"--train": 400, "--val": 1200, "--context-bias": 0.9, **SIZE},
    "coco_unbiased": {"--train": 400, "--val": 0, "--context-bias": 0.5, **SIZE},
}
IDA_HEAD = {"ROI_HEADS": {"NAME": "StandardPluginROIHeads"}, "ROI_BOX_HEAD": {"NAME": "IDABoxHead"}}
# Name of a config in the work folder → what it holds
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"_BASE_": str(CONFIG), "MODEL": {"RESNETS": {"PLUGINS": []}}},
    "ida_head": {"_BASE_": "plain.yaml", "MODEL": IDA_HEAD},
    "unbiased": {"_BASE_": "plain.yaml", "DATASETS": {"TRAIN": ["unbiased_train"]}},
}
# Name of the detector → its label in the trial
DETECTORS = {
    "plain": "plain",
    "triplet attention": "triplet",
    "IDA in stages": "ida",
    "IDA in the RoI head": "ida_head",
    "plain, unbiased train images": "unbiased",
}

TEMPLATE = """# Contextual bias of detectors with and without attention

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes: in train 9 of 10 images with an object of a class hold its companion class too, in val
1 of 10. Each detector is a small one (Faster R-CNN R18-FPN, 500 steps of 8 images of 128 px, from
random weights, which are the same but for IDA's and the attention's own), on the same images with
the same schedule, from {seeds} seeds. Mean and sample standard deviation over the seeds, each a
mean over the classes of box AP in percent on the val images: all of them, those with the class and
its companion ("in company"), those with the class without it ("alone"), and the gap between these
two in percentage points, as it is and between images with equally many objects; and the share in
percent of the images without the class in which it is detected nevertheless, with a score of at
least 0.5, where the companion is and where it is not.

{table}

Every run:

{single}

## Commands

```
{commands}
```

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/context_bias"))
    for name in DATA:
        study.draw(draw_command(name, args.work_dir))
    for name, content in CONFIGS.items():
        (args.work_dir / f"{name}.yaml").write_text(yaml.safe_dump(content))
    try_plugins.main(trial_command(args)[1:])
    write(args)


def draw_command(name: str, work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / name, DATA[name])


def trial_command(args: argparse.Namespace) -> study.Command:
    work_dir, register = args.work_dir, []
    for name, data, part in (
        ("synthetic_train", "coco", "train2017"),
        ("synthetic_val", "coco", "val2017"),
        ("unbiased_train", "coco_unbiased", "train2017"),
    ):
        json_file = work_dir / data / "annotations" / f"instances_{part}.json"
        register += ["--register-coco", name, json_file, work_dir / data / part]
    own = [f"{name}={work_dir / name}.yaml" for name in ("ida_head", "unbiased")]
    variants = [f"triplet={CONFIG.relative_to(ROOT)}", "ida", *own]
    return study.trial_command(
        work_dir / "plain.yaml", variants, work_dir / "trial", args, *register
    )


def measured(results: Path, work_dir: Path) -> dict[str, float | None]:
    """Measure the means over the classes, by the number's name."""
    labels = work_dir / "coco" / "annotations"
    words = ["--annotations", labels / "instances_val2017.json", "--results", results]
    words += ["--pairs", labels / "context_bias.json"]
    report = evaluate_context_bias.prepare(evaluate_context_bias.parse_args([*map(str, words)]))()
    return {number: value for number, (value, _) in means(report.classes).items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    detectors = {name: (args.work_dir / "trial", label) for name, label in DETECTORS.items()}
    runs = study.measure_runs(detectors, lambda path: measured(path, args.work_dir), args)
    commands = [*(draw_command(name, args.work_dir) for name in DATA), trial_command(args)]
    study.write(args.results / "context_bias", TEMPLATE, runs, NUMBERS.values(), commands)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
