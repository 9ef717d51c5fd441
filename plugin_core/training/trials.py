"""Trying plugins on one's own data: what is run, in which order, and what became of it.

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

import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from plugin_core.block_plugins import child_name, find_block_plugin
from plugin_core.errors import ArgumentError, did_you_mean
from plugin_core.files import replacing
from plugin_core.inspection.building import silence
from plugin_core.training.errors import RunError

PLAIN = "plain"
STAGES = (2, 3, 4, 5)
# Plugins that are no block's: of an RoI head, of a DETR's encoder, of the losses
DETECTOR_PLUGINS = ("batchformer_v1", "batchformer_v2", "amc")
MEASURED_STEPS = 5
# A plan of fewer steps is done sooner than its time is measured.
_SHORT = 20
# An image's evaluation takes about this part of its training step.
_EVALUATION = 1 / 3
_DEFAULT_STAGES = {"ida": (4, 5)}  # as in configs/: earlier maps are large for its attention


@dataclass(frozen=True)
class Plugin:
    """A plugin to try.

    Args:
        name: of a block plugin as configs know it, or one of ``DETECTOR_PLUGINS``.
        stages: of a ResNet, 2 to 5, whose blocks get it; none for a plugin of the detector.
        label: that names its files.
    """

    name: str
    stages: tuple[int, ...] = ()
    label: str = ""


def read_plugins(given: Sequence[str]) -> list[Plugin]:
    """Read the values of ``--with``: names of plugins, maybe with stages as in "ida@4,5".

    Raises:
        ValueError: if there is no such plugin or stage, or one is given twice.
    """
    plugins: list[Plugin] = []
    for text in given:
        name, at, numbers = text.partition("@")
        setting = f"--with {text}"
        if name in DETECTOR_PLUGINS:
            if at:
                raise ValueError(f"{setting}: {name} is no block plugin and takes no stages")
            plugin = Plugin(name, (), name)
        else:
            try:
                find_block_plugin(name)
            except ArgumentError as error:
                hint = did_you_mean(name, DETECTOR_PLUGINS)
                detectors = ", ".join(DETECTOR_PLUGINS)
                raise ValueError(
                    f"{setting}: {error.reason}; or a plugin of the detector: {detectors}{hint}"
                ) from error
            stages: tuple[int, ...] = _DEFAULT_STAGES.get(name, STAGES)
            if at:
                if not re.fullmatch(r"[2-5](,[2-5])*", numbers):
                    raise ValueError(
                        f"{setting}: stages must be numbers from 2 to 5 such as {name}@4,5, "
                        f"got {numbers!r}"
                    )
                stages = tuple(sorted({int(number) for number in numbers.split(",")}))
            label = re.sub(r"\W", "_", child_name(name))
            plugin = Plugin(name, stages, "_".join([label, *map(str, stages)]) if at else label)
        if any(plugin.label == other.label for other in plugins):
            raise ValueError(f"{setting}: is given twice")
        plugins.append(plugin)
    if not plugins:
        raise ValueError("--with: name at least one plugin, such as --with triplet_attention")
    return plugins


class Framework(Protocol):
    """What a trial needs to know of a framework and of the user's config.

    Attributes:
        config: path of the user's config.
        suffix: of config files, such as ".yaml".
        annotations: COCO-format file of the images that are evaluated. After :meth:`check` it is
            the copy that the framework reads, where the user's file needs one.
        steps: of the config's training.
        batch_size: images in a step.
    """

    config: str
    suffix: str
    annotations: str
    steps: int
    batch_size: int

    def derive(self, plugin: Plugin | None) -> str:
        """Write the user's config with a plugin; raises ValueError if the plugin does not fit."""

    def settings(self, path: Path) -> Mapping[str, Any]:
        """Read a config whole, as nested mappings."""

    def check(self, path: Path) -> int:
        """Check a config as its training would; returns the number of the model's parameters."""

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

    def seconds(self, label: str) -> float:
        """Estimate the seconds of a run."""
        step = self.seconds_a_step.get(label, 0.0)
        images = self.test_images * _EVALUATION / self.batch_size
        return self.overhead + step * (self.steps + images)

    def total(self, jobs: int) -> float:
        """Estimate the seconds of all runs."""
        return self.seeds * sum(map(self.seconds, self.labels)) / jobs

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
            of_steps = self.seeds * sum(self.seconds_a_step.values()) * self.steps / jobs
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


def write_configs(framework: Framework, plugins: Sequence[Plugin], out: Path) -> dict[str, int]:
    """Derive a config for each plugin, check all of them, and only then write them to ``out``.

    Returns:
        The number of parameters of each variant, "plain" first.

    Raises:
        ValueError: for the config itself, or names each plugin that does not fit, and why.
    """
    texts = {PLAIN: framework.derive(None)}
    parameters, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for plugin in [None, *plugins]:
            label = plugin.label if plugin else PLAIN
            path = Path(folder, f"{label}{framework.suffix}")
            try:
                texts[label] = framework.derive(plugin)
                path.write_text(texts[label], encoding="utf-8")
                parameters[label] = framework.check(path)
            except ValueError as error:
                if plugin is None:
                    raise
                wrong.append(f"--with {plugin.name}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    (out / "configs").mkdir(parents=True, exist_ok=True)
    for label, text in texts.items():
        write_text(config_path(framework, out, label), text)
    return parameters


def config_path(framework: Framework, out: Path, label: str) -> Path:
    """Name the config of a variant."""
    return out / "configs" / f"{label}{framework.suffix}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Show the settings that differ between two configs, as a diff."""
    old, new = (dict(_flatten(settings)) for settings in (before, after))
    lines = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            lines += [f"  - {key}: {old[key]}"] if key in old else []
            lines += [f"  + {key}: {new[key]}"] if key in new else []
    return "\n".join(lines)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)


def read_plan(out: Path, request: Mapping[str, Any]) -> Plan | None:
    """Read the plan that a folder holds; None if the folder is new or empty.

    Raises:
        ValueError: if the folder holds another plan, or other files.
    """
    path = out / "plan.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    if not path.is_file():
        if out.is_dir() and any(not name.name.startswith(".") for name in out.iterdir()):
            raise ValueError(f"--out {out}: holds other files and no plan; name a new folder")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**{key: content[key] for key in Plan.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no plan of this command ({error!r})") from error
    other = [
        f"{key} was {plan.request.get(key)!r} and is {request.get(key)!r}"
        for key in dict.fromkeys([*plan.request, *request])
        if plan.request.get(key) != request.get(key)
    ]
    if other:
        raise ValueError(
            f"--out {out}: holds another plan ({'; '.join(other)}); name a new folder, or give "
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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def measure(plan: Plan, framework: Framework, out: Path, environment: Mapping[str, str]) -> None:
    """Train each variant for a few steps, and note the time in the plan.

    Raises:
        RunError: if one of them fails.
    """
    overheads = []
    for label in tqdm(plan.labels, f"timing {MEASURED_STEPS} steps", unit="variant"):
        folder = out / "measured" / label
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = folder / f"measured{framework.suffix}"
        base = config_path(framework, out, label)
        write_text(config, framework.run_config(base, None, folder, MEASURED_STEPS))
        began = time.monotonic()
        log = folder / "output.txt"
        process = start(framework.command(config, folder, MEASURED_STEPS), log, environment)
        try:
            code = process.wait()
        finally:
            stop([process])
        times = [record["time"] for record in framework.log(folder)]
        if code or not times:
            raise RunError(f"{label} cannot be trained:\n{tail(log)}\nsee {log}")
        plan.seconds_a_step[label] = statistics.median(times)
        overheads.append(time.monotonic() - began - MEASURED_STEPS * plan.seconds_a_step[label])
        shutil.rmtree(folder)  # checkpoints are large
    plan.overhead = max(0.0, statistics.median(overheads))
    (out / "measured").rmdir()


@dataclass
class Outcome:
    """What became of the runs: what finished ones found, and the reasons of failed ones."""

    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Job:
    run: Run
    place: int
    process: subprocess.Popen[bytes]
    attempts: int = 1


def run_all(
    plan: Plan,
    framework: Framework,
    out: Path,
    *,
    jobs: int,
    environment: Callable[[int], Mapping[str, str]],
    poll: float = 1.0,
) -> Outcome:
    """Train and evaluate what a plan has left, ``jobs`` runs at a time.

    A run that was stopped goes on from its last checkpoint. After a run that fails the others go
    on.

    Args:
        plan: of the folder.
        framework: that trains.
        out: folder of the trial.
        jobs: number of processes.
        environment: of the process at a place, 0 to ``jobs`` - 1.
        poll: seconds between two looks at the processes.
    """
    runs, outcome = plan.runs(out), Outcome()
    for run in runs:
        if (found := run.finished()) is not None:
            outcome.finished[run.name] = found
    waiting = [run for run in runs if run.name not in outcome.finished]
    active: list[_Job] = []
    with tqdm(
        total=len(runs) * plan.steps,
        initial=len(outcome.finished) * plan.steps,
        unit="step",
        mininterval=1 if sys.stderr.isatty() else 60,
    ) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    place = min(set(range(jobs)) - {job.place for job in active})
                    run = waiting.pop(0)
                    process = _begin(run, plan, framework, out, environment(place))
                    active.append(_Job(run, place, process))
                time.sleep(poll)
                for job in [job for job in active if job.process.poll() is not None]:
                    log = job.run.folder / "output.txt"
                    results = framework.results(job.run.folder)
                    if job.process.returncode == 0 and results is None and job.attempts == 1:
                        # It was killed before between its last checkpoint and its evaluation.
                        env = environment(job.place)
                        job.process = _begin(job.run, plan, framework, out, env)
                        job.attempts = 2
                        continue
                    active.remove(job)
                    try:
                        if job.process.returncode or results is None:
                            raise RunError(tail(log, 1) or "it has left no results")
                        found = _collect(job, results, plan, framework)
                    except (ValueError, OSError) as error:
                        outcome.failed[job.run.name] = f"{error} (see {log})"
                        bar.write(f"{job.run.name} failed: {outcome.failed[job.run.name]}")
                    else:
                        outcome.finished[job.run.name] = found
                        bar.write(
                            f"{job.run.name}: AP {found['AP']:.1f} "
                            f"({len(outcome.finished)} of {len(runs)} runs)"
                        )
                    write_plan(plan, out)
                done = (len(outcome.finished) + len(outcome.failed)) * plan.steps
                done += sum(_steps(framework, job.run, plan) for job in active)
                bar.update(max(0, done - bar.n))
        finally:
            stop([job.process for job in active])
    return outcome


def _steps(framework: Framework, run: Run, plan: Plan) -> int:
    steps = max((record["step"] for record in framework.log(run.folder)), default=0)
    return min(plan.steps, int(steps))


def _begin(
    run: Run, plan: Plan, framework: Framework, out: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    run.results.parent.mkdir(parents=True, exist_ok=True)
    if not run.initial.is_file():
        run.initial.parent.mkdir(parents=True, exist_ok=True)
        with silence():
            framework.initialize(run.seed, run.initial)
    config = run.folder / f"run{framework.suffix}"
    base = config_path(framework, out, run.label)
    write_text(config, framework.run_config(base, run, run.folder, plan.steps))
    command = framework.command(config, run.folder, plan.steps)
    return start(command, run.folder / "output.txt", environment)


def _collect(job: _Job, results: Path, plan: Plan, framework: Framework) -> dict[str, Any]:
    """Copy a run's detections, and write its marker."""
    times = [record["time"] for record in framework.log(job.run.folder)]
    write_text(job.run.results, results.read_text(encoding="utf-8"))
    found = {
        "results": job.run.results.name,
        "AP": box_ap(plan.annotations, job.run.results),
        "seconds_a_step": statistics.median(times) if times else None,
    }
    write_text(job.run.marker, json.dumps(found))
    return found


def box_ap(annotations: str, results: Path) -> float:
    """COCO's AP of boxes, in percent; raises ValueError where no object counts."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    detections = json.loads(results.read_text(encoding="utf-8"))
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if evaluation.stats[0] < 0:
        raise ValueError(f"{annotations}: has no objects but crowds, so AP is not defined")
    return 100 * float(evaluation.stats[0])


def digest(settings: Mapping[str, Any]) -> str:
    """Give a short text that differs between configs that differ."""
    return hashlib.sha256(repr(sorted(_flatten(settings))).encode()).hexdigest()[:16]


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a process that adds to a log and ends with this process, however this one ends."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that still run."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(text.strip().splitlines()[-lines:])


def environment_of(place: int, gpus: Sequence[str]) -> dict[str, str]:
    """Give a process one thread, and the GPU of its turn where there are GPUs."""
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    gpu = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
    return {**os.environ, **threads, **gpu}


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


def summary(plan: Plan, outcome: Outcome, out: Path) -> tuple[list[str], list[list[Any]]]:
    """Make a table of each variant: headers and rows.

    It has the mean of AP over the seeds, the sample standard deviation where there are two or more,
    the parameters, and the median of the seconds of a step where the framework has logged any.
    """
    headers = ["", "AP", "± sd", "seeds", "parameters", "s/step"]
    rows = []
    for label in plan.labels:
        names = [run.name for run in plan.runs(out) if run.label == label]
        finished = [outcome.finished[name] for name in names if name in outcome.finished]
        values = [found["AP"] for found in finished]
        times = [found["seconds_a_step"] for found in finished if found["seconds_a_step"]]
        rows.append(
            [
                label,
                statistics.mean(values) if values else None,
                statistics.stdev(values) if len(values) > 1 else None,
                f"{len(values)} of {plan.seeds}",
                plan.parameters[label],
                statistics.median(times) if times else None,
            ]
        )
    return headers, rows
