#!/usr/bin/env python
"""Does attention make a detector depend less on the company that objects keep?

    benchmarks/context_bias.py

draws scenes in which 9 of 10 train images with an object of a class hold its companion class too,
and 1 of 10 val images; trains the demo's detector of Detectron2 plain, with triplet attention, with
IDA in its last two stages and with IDA as the classifier of regions, each from several seeds with
the same schedule; and has tools/evaluate_context_bias.py measure every one. What the bias itself
does shows beside the plain detector that was trained on scenes without it. Mean and spread over the
seeds go to benchmarks/results/context_bias.md and .json.

A run that is complete is kept: started again, this goes on where it was stopped. 15 runs; two at a
time (--jobs 2) take a quarter of an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from context_bias import NUMBERS  # noqa: E402

from plugin_core.files import replacing  # noqa: E402

RESULTS = Path("benchmarks/results")
CONFIG = "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
SIZE = {"--size": 128, "--classes": 4, "--seed": 0}
# What is drawn, by the folder's name
DATA = {
    "coco": {"--train": 400, "--val": 1200, "--context-bias": 0.9, **SIZE},
    "coco_unbiased": {"--train": 400, "--val": 0, "--context-bias": 0.5, **SIZE},
}
PLAIN = {"MODEL.RESNETS.TRIPLET_ATTENTION.STAGES": "()"}
IDA_STAGES = {"MODEL.RESNETS.IDA.STAGES": "('res4','res5')"}
IDA_HEAD = {
    "MODEL.ROI_HEADS.NAME": "StandardPluginROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead",
}
# What the command line changes of the config, by the name of the detector
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
1 of 10. Each detector is the demo's (Faster R-CNN R18-FPN, 500 steps of 8 images of 128 px, from
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
FINDINGS = "## Findings\n"


def main() -> None:
    args = parse_args()
    for name in DATA:
        if not (args.work_dir / name).is_dir():
            subprocess.run([sys.executable, *draw_command(name, args.work_dir)], check=True)
    runs = [(name, seed) for seed in args.seeds for name in DETECTORS]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda pair: run(*pair, args), runs)
        list(tqdm(done, total=len(runs), unit="run"))
    write(args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/context_bias"))
    return parser.parse_args()


def folder(work_dir: Path, name: str, seed: int) -> Path:
    return work_dir / name.replace(" ", "_").replace(",", "") / f"seed{seed}"


def draw_command(name: str, work_dir: Path) -> list[str]:
    options = [str(word) for pair in DATA[name].items() for word in pair]
    return ["tools/make_synthetic_coco.py", str(work_dir / name), *options]


def train_command(name: str, seed: int, work_dir: Path) -> list[str]:
    train = "coco_unbiased" if "unbiased" in name else "coco"
    register = []
    for part, data in (("train", work_dir / train), ("val", work_dir / "coco")):
        json_file = data / "annotations" / f"instances_{part}2017.json"
        register += ["--register-coco", f"synthetic_{part}", json_file, data / f"{part}2017"]
    settings = {**DETECTORS[name], "SEED": seed, "OUTPUT_DIR": folder(work_dir, name, seed)}
    pairs = [word for pair in settings.items() for word in pair]
    command = ["tools/train_net.py", "--config-file", CONFIG, "--resume", *register, *pairs]
    return [str(word) for word in command]


def evaluate_command(name: str, seed: int, work_dir: Path) -> list[str]:
    out, labels = folder(work_dir, name, seed), work_dir / "coco" / "annotations"
    return [
        "tools/evaluate_context_bias.py",
        *("--annotations", str(labels / "instances_val2017.json")),
        *("--results", str(out / "inference" / "coco_instances_results.json")),
        *("--pairs", str(labels / "context_bias.json")),
        *("--out", str(out / "context_bias")),
    ]


def run(name: str, seed: int, args: argparse.Namespace) -> None:
    """Train, evaluate and measure a detector, unless this was done before."""
    out = folder(args.work_dir, name, seed)
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    steps = [
        (train_command, out / "inference" / "coco_instances_results.json"),
        (evaluate_command, out / "context_bias" / "context_bias.json"),
    ]
    for command, written_last in steps:
        if written_last.exists():
            continue
        with open(out / "output.txt", "a") as log:
            subprocess.run(
                [sys.executable, *command(name, seed, args.work_dir)],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )


def measured(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Means over the classes, by what is measured."""
    path = folder(args.work_dir, name, seed) / "context_bias" / "context_bias.json"
    content = json.loads(path.read_text())
    return {number: mean["value"] for number, mean in content["mean"].items()}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    runs = {name: {seed: measured(name, seed, args) for seed in args.seeds} for name in DETECTORS}
    lines = []
    for name, by_seed in runs.items():
        columns = zip(*(numbers.values() for numbers in by_seed.values()), strict=True)
        lines.append([name, *map(mean_and_spread, columns)])
    table = tabulate(lines, ["detector", *NUMBERS.values()], "github", disable_numparse=True)
    seeds = [
        [name, seed, *(f"{value:.1f}" for value in numbers.values())]
        for name, by_seed in runs.items()
        for seed, numbers in by_seed.items()
    ]
    headers = ["detector", "seed", *NUMBERS.values()]
    single = tabulate(seeds, headers, "github", disable_numparse=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{device}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    commands = [draw_command(name, args.work_dir) for name in DATA]
    for name in DETECTORS:
        commands.append(train_command(name, args.seeds[0], args.work_dir))
        commands.append(evaluate_command(name, args.seeds[0], args.work_dir))
    content = {"machine": machine, "commands": commands, "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    with replacing(RESULTS / "context_bias.json") as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    text = TEMPLATE.format(
        command=shlex.join(["benchmarks/context_bias.py", *sys.argv[1:]]),
        machine=machine,
        seeds=len(args.seeds),
        table=table,
        single=single,
        commands="\n".join(map(shlex.join, commands)),
    )
    path = RESULTS / "context_bias.md"
    before = path.read_text() if path.exists() else ""
    with replacing(path) as file:  # what people wrote of it stays
        file.write((text + FINDINGS + before.partition(FINDINGS)[2]).encode())
    print(f"\n{text}\nwrote {path} and .json")


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
