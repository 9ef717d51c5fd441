"""What a trial runs, for how long, and its files.

A trial trains a config as it is ("plain") and with each plugin, each from several seeds. This file
knows neither framework. One is told to it as a :class:`Framework`; the processes that train are the
framework's own commands. A folder holds a trial::

    configs/NAME.yaml           the user's config with one plugin, or NAME.py
    plan.json                   what was asked for, what runs, and what it found
    initial/seedK.pth           the weights that all runs of a seed begin with
    runs/NAME-seedK/            a run: its config, output.txt and the framework's own files
    results/NAME-seedK.json     its detections, in COCO's format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from plugin_core.files import write_text
from plugin_core.inspection.cost import Cost
from plugin_core.training.trials.plugins import Plugin

# A plan of fewer steps is done sooner than its time is measured.
_SHORT = 20
# An image's evaluation takes about this part of its training step.
_EVALUATION = 1 / 3


class Framework(Protocol):
    """What a trial needs to know of a framework and of the user's config.

    Attributes:
        config: path of the user's config.
        suffix: of config files, such as ".yaml".
        annotations: COCO-format file of the images that are evaluated. After :meth:`check` it is
            the copy that the framework reads, where the user's file needs one.
        images: folder of these images; None if there is none on this machine.
        steps: of the config's training.
        batch_size: images in a step.
    """

    config: str
    suffix: str
    annotations: str
    images: str | None
    steps: int
    batch_size: int

    def derive(self, plugin: Plugin | None) -> str:
        """Write the user's config with a plugin; raises ValueError if the plugin does not fit."""

    def settings(self, path: Path) -> Mapping[str, Any]:
        """Read a config whole, as nested mappings."""

    def check(self, path: Path) -> int:
        """Check a config as its training would; returns the number of the model's parameters."""

    def cost(self, path: Path) -> Cost:
        """Count a config's parameters and the FLOPs of an image."""

    def initialize(self, seed: int, path: Path) -> None:
        """Write the weights that the user's config begins with, to a file."""

    def run_config(self, base: Path, run: Run | None, folder: Path, steps: int) -> str:
        """Write the config of a run, or of a measurement that evaluates nothing."""

    def command(self, config: Path, folder: Path, steps: int) -> list[str]:
        """Give the words that train in a folder, go on, or do what is left."""

    def log(self, folder: Path) -> list[dict[str, float]]:
        """Read "step" (from 1) and "time" (seconds a step) of what a run has logged."""

    def results(self, folder: Path) -> Path | None:
        """Find the file of a run's detections."""

    def weights(self, folder: Path, steps: int) -> Path | None:
        """Find the last checkpoint of a run that has ended."""


@dataclass(frozen=True)
class Run:
    """A training of a trial."""

    label: str
    seed: int
    initial: Path
    folder: Path
    results: Path

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}"

    @property
    def marker(self) -> Path:
        return self.folder / "finished.json"

    def finished(self) -> dict[str, Any] | None:
        """What the run's marker says; None if the run has not ended, or its results are gone."""
        if not self.marker.is_file() or not self.results.is_file():
            return None
        return json.loads(self.marker.read_text(encoding="utf-8"))


@dataclass
class Plan:
    """What a trial runs.

    Args:
        request: what was asked for; a folder goes on with the same only.
        annotations: COCO-format file of the evaluated images.
        labels: of the variants, "plain" first.
        steps: of each training.
        seeds: number of them.
        parameters: of each variant.
        seconds_a_step: measured, of each variant; empty before it is measured.
        overhead: seconds of a process besides its steps and its evaluation.
        left_out: a sentence about what the budget has no time for.
        control: a sentence about the control, if there is one.
        iou_type: "bbox", "segm" or "keypoints", what AP is of.
    """

    request: dict[str, Any]
    annotations: str
    labels: list[str]
    steps: int
    seeds: int
    parameters: dict[str, int]
    batch_size: int
    test_images: int
    seconds_a_step: dict[str, float] = field(default_factory=dict)
    overhead: float = 0.0
    left_out: str = ""
    control: str = ""
    iou_type: str = "bbox"

    def seconds(self, label: str) -> float:
        """Estimate the seconds of a run."""
        step = self.seconds_a_step.get(label, 0.0)
        images = self.test_images * _EVALUATION / self.batch_size
        return self.overhead + step * (self.steps + images)

    def total(self, jobs: int) -> float:
        """Estimate the seconds of all runs."""
        return self._rounds(jobs) * sum(map(self.seconds, self.labels))

    def left(self, jobs: int, out: Path) -> float:
        """Estimate the seconds of the runs that have not finished."""
        runs = [run for run in self.runs(out) if run.finished() is None]
        seconds = sum(self.seconds(run.label) for run in runs)
        return math.ceil(len(runs) / jobs) * seconds / max(1, len(runs))

    def _rounds(self, jobs: int) -> float:
        """How often all variants take their time one after another."""
        return math.ceil(self.seeds * len(self.labels) / jobs) / len(self.labels)

    def runs(self, out: Path) -> list[Run]:
        """List the runs: all variants of the first seed, then those of the next one."""
        return [
            Run(
                label,
                seed,
                out / "initial" / f"seed{seed}.pth",
                out / "runs" / f"{label}-seed{seed}",
                out / "results" / f"{label}-seed{seed}.json",
            )
            for seed in range(self.seeds)
            for label in self.labels
        ]

    def fit(self, budget: float, jobs: int, may_shorten: bool) -> None:
        """Leave out seeds, and then steps, until the estimate is within a budget of seconds.

        Two seeds stay as long as steps can be left out, as one alone tells nothing of the noise.

        Raises:
            ValueError: if the time is too short for any training.
        """
        asked, whole = self.seeds, self.steps
        least = min(2, asked) if may_shorten else 1
        while self.seeds > least and self.total(jobs) > budget:
            self.seeds -= 1
        if may_shorten and self.total(jobs) > budget:
            of_steps = self._rounds(jobs) * sum(self.seconds_a_step.values()) * self.steps
            fixed = self.total(jobs) - of_steps
            self.steps = int(self.steps * max(0.0, budget - fixed) / of_steps)
        if self.total(jobs) > budget or self.steps < 1:
            raise ValueError(
                f"--budget: {duration(budget)} is too short: {self.seeds} seed(s) of "
                f"{len(self.labels)} variants take about {duration(self.total(jobs))} even "
                f"with {self.steps} steps; try fewer plugins"
            )
        told = []
        if self.seeds < asked:
            told.append(f"{asked - self.seeds} of {asked} seeds")
        if self.steps < whole:
            told.append(f"{whole - self.steps:,} of {whole:,} steps of each training")
        self.left_out = f"The budget left out {' and '.join(told)}." if told else ""


def read_plan(out: Path, request: Mapping[str, Any]) -> Plan | None:
    """Read the plan that a folder holds; None if no training has begun in it.

    More seeds than before are added to those of a plan that no budget has cut.

    Raises:
        ValueError: if the folder holds another plan, or other files.
    """
    path = out / "plan.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if not path.is_file():
        if out.is_dir() and any(
            not path.name.startswith(".") and path.name != "configs" for path in out.iterdir()
        ):
            raise ValueError(f"--out {out}: holds other files and no plan; name a new folder")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**{key: content[key] for key in Plan.__dataclass_fields__ if key in content})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is no plan of this command ({error!r})") from error
    changed = [
        key
        for key in dict.fromkeys([*plan.request, *request])
        if (plan.request.get(key) or None) != (request.get(key) or None)
    ]
    if changed and not (out / "runs").exists():
        return None
    if changed == ["seeds"] and request["seeds"] > plan.seeds and not plan.left_out:
        plan.request["seeds"] = plan.seeds = request["seeds"]
    elif changed:
        told = (
            f"{key} was {plan.request.get(key)!r} and is {request.get(key)!r}" for key in changed
        )
        raise ValueError(
            f"--out {out}: holds another plan ({'; '.join(told)}); name a new folder, or give "
            "the same arguments to go on"
        )
    return plan


def write_plan(plan: Plan, out: Path) -> None:
    """Write ``plan.json``, with each run and what is known of it."""
    runs = [
        {
            "label": run.label,
            "seed": run.seed,
            "folder": str(run.folder.relative_to(out)),
            "results": str(run.results.relative_to(out)),
            "finished": run.finished(),
        }
        for run in plan.runs(out)
    ]
    write_text(out / "plan.json", json.dumps({**vars(plan), "runs": runs}, indent=2))


def measures_time(steps: int) -> bool:
    """Tell whether trainings of so many steps are worth a measurement first."""
    return steps > _SHORT


def read_duration(text: str) -> float:
    """Read a time such as "8h", "90m" or "1.5h", in seconds; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hms])", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"--budget: must be a time such as 8h or 90m, got {text!r}")
    return float(match[1]) * {"h": 3600, "m": 60, "s": 1}[match[2]]


def duration(seconds: float) -> str:
    """Say a time in hours, minutes or seconds."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
