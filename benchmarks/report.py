"""Results of the speed benchmarks: the machine, tables for people, and all numbers as JSON.

A file of results holds the last run of each benchmark, with the run's machine and commit.
"""

from __future__ import annotations

import datetime
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from timing import Quantity, Row, Setting

from plugin_core.files import replacing, write_text
from plugin_core.inspection.devices import cpu_name
from plugin_core.kernels import choice

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = "## Findings\n"
PACKAGES = ("detectron2", "mmdet", "mmcv", "triton")
Results = dict[str, Any]

TEMPLATE = """# Speed and memory on {device}

`{command}` wrote this{hand}.

{environment}

Times are medians over rounds in which each candidate of a line has its turn, in a changing order,
± the interquartile range. Ratios are those of the medians, ± the interquartile range of the ratios
of the rounds. Behind a target stands whether it is met.

{summary}
{sections}
"""


def environment(setting: Setting, command: str) -> dict[str, str]:
    """Describe the machine and the software."""
    packages = {name: _version(name) for name in PACKAGES}
    found = {
        "device": device_name(setting),
        "processor": f"{cpu_name()}, {cores()} cores, {torch.get_num_threads()} threads",
        "load before": f"{os.getloadavg()[0]:.1f} processes",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "commit": commit(),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "PLUGIN_KERNELS": choice(),
    }
    if setting.quick:
        found["sizes"] = "tiny, by --quick: the times say nothing"
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(setting.device)
        found["GPU memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
    elif not torch.cuda.is_available():
        found["GPU"] = "not measured: PyTorch finds none"
    return found


def device_name(setting: Setting) -> str:
    if setting.on_gpu:
        return torch.cuda.get_device_name(setting.device)
    return f"CPU {cpu_name()}, {cores()} cores"


def slug(setting: Setting) -> str:
    """Turn the device's name into the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(setting).lower()).strip("-")


def cores() -> int:
    """Count the cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def commit() -> str:
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changes else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def as_json(row: Row) -> dict[str, Any]:
    values = {column: _quantity_as_json(quantity) for column, quantity in row.values.items()}
    return {
        "group": row.group,
        "case": row.case,
        "values": values,
        "not_measured": row.not_measured,
        "has_failed": row.has_failed,
    }


def _quantity_as_json(quantity: Quantity) -> dict[str, Any]:
    found: dict[str, Any] = {"value": _shortened(quantity.value)}
    if quantity.spread is not None:
        found["spread"] = _shortened(quantity.spread)
    if quantity.target is not None:
        sign = "≥" if quantity.target.at_least else "≤"
        found["target"] = f"{sign} {quantity.target.bound:g}"
        found["is_met"] = quantity.target.met(quantity.value)
    if quantity.rounds:
        found["rounds"] = [_shortened(value) for value in quantity.rounds]
    return found


def _shortened(value: float) -> float:
    return float(f"{value:.6g}")


def read(path: Path) -> Results:
    """Read earlier runs' results from ``path`` with the ending .json."""
    try:
        return json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return {"benchmarks": {}}


def write(path: Path, results: Results) -> None:
    """Write ``path`` with the endings .json and .md, and keep people's text below the tables."""
    write_text(path.with_suffix(".json"), as_text(results))
    path = path.with_suffix(".md")
    before = path.read_text() if path.exists() else ""
    write_text(path, render(results, before.partition(FINDINGS)[2]))


def as_text(results: Results) -> str:
    """Write JSON with each list of rounds on one line."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    lists = re.compile(r"\[[\s\d.,e+-]+\]")
    return lists.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def write_plot(path: Path, figure: Any) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    with replacing(path) as file:
        file.write(image.getvalue())


def render(results: Results, findings: str = "") -> str:
    """Lay out results as Markdown."""
    machine, benchmarks = results["environment"], results["benchmarks"]
    text = TEMPLATE.format(
        device=machine["device"],
        command=machine["command"],
        hand=", but for the last section" if findings else "",
        environment=_table([*machine.items()], ["", ""]),
        summary=summary(benchmarks),
        sections="\n".join(section(benchmark, machine) for benchmark in benchmarks.values()),
    )
    return text + FINDINGS + findings if findings else text


def summary(benchmarks: Mapping[str, Any]) -> str:
    """List missed targets and rows that were not measured."""
    lines, met, missed, unmeasured = [], 0, [], []
    for benchmark in benchmarks.values():
        for row in benchmark["rows"]:
            where = f"{benchmark['title']}: {_where(row)}"
            if row["not_measured"]:
                unmeasured.append(f"- {where}: {row['not_measured']}")
            for column, quantity in row["values"].items():
                if "target" in quantity:
                    met += quantity["is_met"]
                    if not quantity["is_met"]:
                        missed.append(f"- {where}: {column} is {cell(quantity)}")
    lines.append(f"Of {met + len(missed)} targets {met} are met{'; not met:' if missed else '.'}\n")
    lines += missed
    if unmeasured:
        lines += ["\nNot measured:\n", *unmeasured]
    return "\n".join([*lines, ""])


def _where(row: Mapping[str, Any]) -> str:
    return ", ".join(filter(None, (row["group"], row["case"])))


def section(benchmark: Mapping[str, Any], machine: Mapping[str, str]) -> str:
    """Lay out the tables of a benchmark."""
    parts = [f"## {benchmark['title']}", benchmark["text"]]
    others = {
        name: value
        for name, value in benchmark["environment"].items()
        if machine.get(name) != value
    }
    others.pop("load before", None)
    if others:  # the benchmark is from an earlier run
        differences = ", ".join(f"{name} `{value}`" for name, value in others.items())
        parts.append(f"Measured before, with {differences}.")
    for group in dict.fromkeys(row["group"] for row in benchmark["rows"]):
        rows = [row for row in benchmark["rows"] if row["group"] == group]
        parts += [f"### {group}"] if group else []
        parts += [rows_as_table(rows)]
    if benchmark.get("plot"):
        parts.append(f"![{benchmark['title']}, plotted]({benchmark['plot']})")
    minutes = benchmark["seconds"] / 60
    parts.append(f"This took {minutes:.1f} minutes, {benchmark['repetitions']} rounds each.")
    return "\n\n".join(parts) + "\n"


def rows_as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row["values"]))
    if any(row["not_measured"] for row in rows):
        columns.append("")
    lines = []
    for row in rows:
        cells = {column: cell(quantity) for column, quantity in row["values"].items()}
        if row["not_measured"]:
            cells[""] = "not measured"
        lines.append([row["case"], *(cells.get(column, "") for column in columns)])
    return _table(lines, ["", *columns])


def cell(quantity: Mapping[str, Any]) -> str:
    """Write a number as in "4.18 ± 0.02 (≥ 4: yes)"."""
    text = number(quantity["value"])
    if "spread" in quantity:
        text += f" ± {number(quantity['spread'])}"
    if "target" in quantity:
        text += f" ({quantity['target']}: {'yes' if quantity['is_met'] else 'no'})"
    return text


def number(value: float) -> str:
    """Write three digits behind the point, or fewer where the number is large."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    digits = 0 if size >= 1000 or value == int(value) else 3 - (size >= 10) - (size >= 100)
    return f"{value:,.{digits}f}"


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(lines, headers, "github", disable_numparse=True)
