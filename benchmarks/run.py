#!/usr/bin/env python
"""Measure the speed and memory of the methods, alone and in detectors, beside their textbook forms.

    benchmarks/run.py                           all that this machine can, 15 minutes on 2 cores
    benchmarks/run.py --only ida detector_step  a part
    benchmarks/run.py --quick                   a try with tiny sizes and meaningless times

Results go to benchmarks/results, as a text and as JSON named after the device. They replace those
of other commits, and of this commit those of the same benchmarks. Each benchmark writes as soon as
it is done.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import report
import timing
import torch
from timing import Row, Setting

from plugin_core.kernels import choice

BENCHMARKS = (
    "triplet_attention", "ida", "batchformer", "registry", "detector_step", "auxiliary_losses",
)  # fmt: skip
RESULTS = report.ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPETITIONS, REPETITIONS_IF_QUICK = 5, 2
OUT_HELP = "of the results (default: benchmarks/results; with --quick nothing is written)"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None, only: str | None = None) -> None:
    """Run benchmarks; with ``only``, the one that is a script of its own."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, only)
    setting = Setting(args.device, args.dtypes, args.repetitions, args.quick)
    if setting.on_gpu:
        torch.cuda.set_device(setting.device)
    command = shlex.join([f"benchmarks/{only or 'run'}.py", *argv])
    environment = report.environment(setting, command)
    path = args.out / report.slug(setting) if args.out else None
    results = report.read(path) if path else {"benchmarks": {}}
    # Nothing of an older commit stands beside new results.
    results["benchmarks"] = {
        name: benchmark
        for name, benchmark in results["benchmarks"].items()
        if benchmark["environment"]["commit"] == environment["commit"]
    }
    results["environment"] = environment
    announce(args.only, setting, environment)
    for name in args.only:
        results["benchmarks"][name] = measure(name, setting, environment, path)
        results["benchmarks"] = in_order(results["benchmarks"])
        if path:
            report.write(path, results)
    print(f"\n{report.render(results)}")
    if path:
        print(f"wrote {path}.md and .json")
    failed = [name for name in args.only if has_failed(results["benchmarks"][name])]
    if failed:
        sys.exit(f"error: failed in part, as the results say: {', '.join(failed)}")


def parse_args(argv: Sequence[str], only: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog=f"{only or 'run'}.py",
        description=importlib.import_module(only).__doc__ if only else __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=OUT_HELP)
    if only is None:
        parser.add_argument(
            "--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME"
        )
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="rounds, at least 3 (default: 5)"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: float32, and on a GPU bfloat16, too"
    )
    args = parser.parse_args(argv)
    try:
        check(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.only = [name for name in BENCHMARKS if name in ([only] if only else args.only)]
    return args


def check(args: argparse.Namespace) -> None:
    """Check the arguments and fill in their defaults."""
    choice()  # PLUGIN_KERNELS
    args.device = as_device(args.device)
    names = args.dtype or (["float32"] if args.device.type == "cpu" else DTYPES)
    args.dtypes = tuple(DTYPES[name] for name in dict.fromkeys(names))
    fewest = REPETITIONS_IF_QUICK if args.quick else 3
    if args.repetitions is None:
        args.repetitions = fewest if args.quick else REPETITIONS
    if args.repetitions < fewest:
        raise ValueError(f"--repetitions {args.repetitions}: at least {fewest} are needed")
    if args.out is None and not args.quick:
        args.out = RESULTS
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)


def as_device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA GPUs")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def announce(names: Sequence[str], setting: Setting, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        print(f"{name}: {value}")
    if not (setting.quick or setting.on_gpu):
        minutes = sum(importlib.import_module(name).MINUTES for name in names)
        minutes *= (setting.warm_up + setting.repetitions) / (setting.warm_up + REPETITIONS)
        minutes *= len(setting.dtypes)
        print(f"takes about {minutes:.0f} minutes on 2 cores of a server's CPU")


def measure(
    name: str, setting: Setting, environment: dict[str, str], path: Path | None
) -> dict[str, Any]:
    """Run a benchmark and return its part of the results; plots are written beside ``path``."""
    print(f"{name} ({BENCHMARKS.index(name) + 1} of {len(BENCHMARKS)})", flush=True)
    module = importlib.import_module(name)
    torch.manual_seed(0)
    start = time.perf_counter()
    rows = timing.attempt("", "all of it", partial(module.rows, setting))
    plot = None
    if path and hasattr(module, "plot"):
        image = path.with_name(f"{path.name}-{name}.png")
        found = timing.attempt("", "plot", partial(draw, module.plot, rows, image))
        plot = image.name if image.exists() and not found else None
        rows += found
    return {
        "title": module.TITLE,
        "text": module.TEXT,
        "environment": environment,
        "repetitions": setting.repetitions,
        "seconds": time.perf_counter() - start,
        "plot": plot,
        "rows": [report.as_json(row) for row in rows],
    }


def draw(plot: Callable[[Sequence[Row]], Any], rows: Sequence[Row], image: Path) -> list[Row]:
    figure = plot(rows)
    if figure is None:
        raise timing.Impossible("there is nothing to plot")
    report.write_plot(image, figure)
    return []


def in_order(benchmarks: dict[str, Any]) -> dict[str, Any]:
    return {name: benchmarks[name] for name in BENCHMARKS if name in benchmarks}


def has_failed(benchmark: dict[str, Any]) -> bool:
    return any(row["has_failed"] for row in benchmark["rows"])


if __name__ == "__main__":
    main()
