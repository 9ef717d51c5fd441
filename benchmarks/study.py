"""Shared parts of the studies: trainings from several seeds, and tables of mean and spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from plugin_core.files import replacing

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = "## Findings\n"
Command = list[str]
# Detector → seed → number's name → number
Runs = Mapping[str, Mapping[int, Mapping[str, float]]]


def parse_args(description: str | None, work_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--work-dir", type=Path, default=work_dir)
    return parser.parse_args()


def folder(work_dir: Path, name: str, seed: int) -> Path:
    """Name the folder of a detector's run."""
    return work_dir / name.replace(" ", "_").replace(",", "") / f"seed{seed}"


def draw_command(out: Path, options: Mapping[str, Any]) -> Command:
    words = [str(word) for pair in options.items() for word in pair]
    return ["tools/make_synthetic_coco.py", str(out), *words]


def draw(command: Command) -> None:
    """Draw a dataset, unless this was done before."""
    if not Path(command[1]).is_dir():
        subprocess.run([sys.executable, *command], check=True)


def run_all(
    detectors: Collection[str],
    steps: Callable[[str, int, Path], Iterable[tuple[Command, Path]]],
    args: argparse.Namespace,
) -> None:
    """Run every detector from every seed, without the steps that were done before.

    Args:
        detectors: names of the detectors.
        steps: called with a detector's name, a seed and ``args.work_dir``. It gives commands, each
            with the file that the command writes last.
        args: of :func:`parse_args`.
    """
    threads = max(1, (os.cpu_count() or 1) // args.jobs)

    def run(name: str, seed: int) -> None:
        out = folder(args.work_dir, name, seed)
        out.mkdir(parents=True, exist_ok=True)
        for command, written_last in steps(name, seed, args.work_dir):
            if written_last.exists():
                continue
            with open(out / "output.txt", "a") as log:
                subprocess.run(
                    [sys.executable, *command],
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )

    runs = [(name, seed) for seed in args.seeds for name in detectors]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = pool.map(lambda pair: run(*pair), runs)
        list(tqdm(done, total=len(runs), unit="run"))


def write(
    path: Path,
    template: str,
    runs: Runs,
    headers: Collection[str],
    commands: Sequence[Command],
    **values: object,
) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them.

    Args:
        path: of the results, without the endings .md and .json.
        template: of the text, with the fields command, machine, seeds, table, single, commands and
            the fields in ``values``.
        runs: numbers of every detector and seed.
        headers: of the numbers.
        commands: of the first seed.
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
    with replacing(path.with_suffix(".json")) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
    text = template.format(
        command=shlex.join([f"benchmarks/{path.name}.py", *sys.argv[1:]]),
        machine=machine,
        seeds=len(next(iter(runs.values()))),
        table=tabulate(lines, ["detector", *headers], "github", disable_numparse=True),
        single=tabulate(seeds, ["detector", "seed", *headers], "github", disable_numparse=True),
        commands="\n".join(map(shlex.join, commands)),
        **values,
    )
    path = path.with_suffix(".md")
    before = path.read_text() if path.exists() else ""
    with replacing(path) as file:  # people's findings stay
        file.write((text + FINDINGS + before.partition(FINDINGS)[2]).encode())
    print(f"\n{text}\nwrote {path} and .json")


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
