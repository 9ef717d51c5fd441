"""Shared parts of the studies: their data, their trials, and tables of mean and spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from plugin_core.files import write_text

TABLES = """{table}

Every run:

{single}

## Commands

```
{commands}
```

"""  # what ends most templates
FINDINGS = "## Findings\n"
Command = list[str]
# Detector → seed → number's name → number
Runs = Mapping[str, Mapping[int, Mapping[str, float]]]


def parse_args(description: str | None, work_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each detector (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--steps", type=int, help="of each training, for a try")
    parser.add_argument("--work-dir", type=Path, default=work_dir)
    args = parser.parse_args()
    args.results = args.work_dir if args.steps else Path("benchmarks/results")
    return args


def draw_command(out: Path, options: Mapping[str, Any]) -> Command:
    """The command that draws a dataset; an option without a value has None."""
    words = [str(word) for pair in options.items() for word in pair if word is not None]
    return ["tools/make_synthetic_coco.py", str(out), *words]


def draw(command: Command) -> None:
    """Draw a dataset, unless this was done before."""
    if not Path(command[1]).is_dir():
        subprocess.run([sys.executable, *command], check=True)


def write_config(path: Path, base: Path, options: Mapping[str, Any]) -> None:
    """Write a config of MMDetection with other settings, by their names with dots."""
    from mmengine.config import Config

    cfg = Config.fromfile(base)
    cfg.merge_from_dict(dict(options))
    path.parent.mkdir(parents=True, exist_ok=True)
    # As Config.dump does, but without laying out the text, which takes seconds
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in cfg.to_dict().items()))


def trial_command(
    config: Path, variants: Collection[str], out: Path, args: argparse.Namespace, *more: object
) -> Command:
    """The command that trains a config as it is and its variants.

    Args:
        config: of the plain detector.
        variants: values of ``--with``.
        out: folder of the trial.
        args: of :func:`parse_args`.
        more: further arguments.
    """
    words = [word for variant in variants for word in ("--with", variant)]
    words += ["--seeds", args.seeds, "--jobs", args.jobs, "--out", out, *more]
    words += ["--steps", args.steps] if args.steps else []
    return ["tools/try_plugins.py", *map(str, [config, *words])]


def measure_runs(
    detectors: Mapping[str, tuple[Path, str]],
    measured: Callable[[Path], Mapping[str, Any]],
    args: argparse.Namespace,
) -> Runs:
    """Measure the results of every detector, each named by its trial's folder and label there."""
    return {
        name: {
            seed: measured(out / "results" / f"{label}-seed{seed}.json")
            for seed in range(args.seeds)
        }
        for name, (out, label) in detectors.items()
    }


def write(
    path: Path,
    template: str,
    runs: Runs,
    headers: Collection[str],
    commands: Sequence[Command],
    kind: str = "detector",
    **values: object,
) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them.

    Args:
        path: of the results, without the endings .md and .json.
        template: of the text, with the fields command, machine, seeds, table, single, commands and
            the fields in ``values``.
        runs: numbers of every detector and seed.
        headers: of the numbers.
        commands: that repeat it.
        kind: what the models are.
    """
    lines = []
    for name, by_seed in runs.items():
        columns = zip(*(numbers.values() for numbers in by_seed.values()), strict=True)
        lines.append([name, *map(mean_and_spread, columns)])
    seeds = [
        [name, seed, *(f"{value:.1f}" for value in numbers.values())]
        for name, by_seed in runs.items()
        for seed, numbers in by_seed.items()
    ]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    machine = f"{device}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    content = {"machine": machine, "commands": commands, "runs": runs}
    path.parent.mkdir(exist_ok=True)
    write_text(path.with_suffix(".json"), json.dumps(content, indent=2) + "\n")
    text = template.format(
        command=shlex.join([f"benchmarks/{path.name}.py", *sys.argv[1:]]),
        machine=machine,
        seeds=len(next(iter(runs.values()))),
        table=tabulate(lines, [kind, *headers], "github", disable_numparse=True),
        single=tabulate(seeds, [kind, "seed", *headers], "github", disable_numparse=True),
        commands="\n".join(map(shlex.join, commands)),
        **values,
    )
    path = path.with_suffix(".md")
    before = path.read_text() if path.exists() else ""
    # People's findings stay.
    write_text(path, text + FINDINGS + before.partition(FINDINGS)[2])
    print(f"\n{text}\nwrote {path} and .json")


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
