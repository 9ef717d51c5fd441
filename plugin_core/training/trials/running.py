"""Running a trial: measuring a step, training what is left to train, and collecting results."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plugin_core.evaluation.coco_files import Source, read_results
from plugin_core.evaluation.comparison.accuracy import accuracy
from plugin_core.evaluation.comparison.detections import Detections, Truth
from plugin_core.evaluation.comparison.inputs import read_truth
from plugin_core.evaluation.comparison.sections import Section, Table
from plugin_core.files import write_text
from plugin_core.inspection.building import silence
from plugin_core.processes import Launcher, Process, tail
from plugin_core.training.errors import RunError
from plugin_core.training.trials.configs import config_path
from plugin_core.training.trials.plan import (
    Framework,
    Plan,
    Run,
    write_plan,
)

MEASURED_STEPS = 5


def measure(
    plan: Plan, framework: Framework, out: Path, launcher: Launcher, poll: float = 0.1
) -> None:
    """Train each variant for a few steps, and note the time in the plan.

    Raises:
        RunError: if one of them fails.
    """
    overheads = []
    measured = out / "measured"
    shutil.rmtree(measured, ignore_errors=True)  # of a measurement that was stopped or failed
    for label in tqdm(plan.labels, f"timing {MEASURED_STEPS} steps", unit="variant"):
        folder = measured / label
        folder.mkdir(parents=True)
        config = folder / f"measured{framework.suffix}"
        base = config_path(framework, out, label)
        write_text(config, framework.run_config(base, None, folder, MEASURED_STEPS))
        began = time.monotonic()
        log = folder / "output.txt"
        process = launcher.start(framework.command(config, folder, MEASURED_STEPS), log, 0)
        try:
            while (code := process.poll()) is None:
                time.sleep(poll)
        finally:
            launcher.stop([process])
        times = [record["time"] for record in framework.log(folder)]
        if code or not times:
            raise RunError(f"{label} cannot be trained:\n{tail(log)}\nsee {log}")
        plan.seconds_a_step[label] = statistics.median(times)
        overheads.append(time.monotonic() - began - MEASURED_STEPS * plan.seconds_a_step[label])
        shutil.rmtree(folder)  # checkpoints are large
    plan.overhead = max(0.0, statistics.median(overheads))
    measured.rmdir()


@dataclass
class Outcome:
    """What became of the runs: what finished ones found, and the reasons of failed ones."""

    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _Job:
    run: Run
    place: int
    process: Process
    attempts: int = 1


def run_all(
    plan: Plan,
    framework: Framework,
    out: Path,
    *,
    jobs: int,
    launcher: Launcher,
    poll: float = 1.0,
    score: Callable[[Path], float] | None = None,
) -> Outcome:
    """Train and evaluate what a plan has left, ``jobs`` runs at a time.

    A run that was stopped goes on from its last checkpoint. After a run that fails the others go
    on.

    Args:
        plan: of the folder.
        framework: that trains.
        out: folder of the trial.
        jobs: number of processes.
        launcher: of the processes.
        poll: seconds between two looks at the processes.
        score: of a file of results; COCO's AP by default.
    """
    measure_name = "AP" if score is None else "score"
    score = score or partial(average_precision, plan.annotations, iou_type=plan.iou_type)
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

        def fail(run: Run, error: Exception) -> None:
            log = run.folder / "output.txt"
            outcome.failed[run.name] = f"{error} (see {log})" if log.is_file() else str(error)
            bar.write(f"{run.name} failed: {outcome.failed[run.name]}")

        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    place = min(set(range(jobs)) - {job.place for job in active})
                    run = waiting.pop(0)
                    try:
                        process = _begin(run, plan, framework, out, launcher, place)
                    except (ValueError, OSError) as error:  # of its config or its folder
                        fail(run, error)
                    else:
                        active.append(_Job(run, place, process))
                time.sleep(poll)
                for job, code in [(job, job.process.poll()) for job in active]:
                    if code is None:
                        continue
                    log = job.run.folder / "output.txt"
                    results = framework.results(job.run.folder)
                    if code == 0 and results is None and job.attempts == 1:
                        # It was killed before between its last checkpoint and its evaluation.
                        begin = job.run, plan, framework, out, launcher, job.place
                        job.process = _begin(*begin)
                        job.attempts = 2
                        continue
                    active.remove(job)
                    try:
                        if code or results is None:
                            raise RunError(_reason(code, log))
                        found = _collect(job, results, plan, framework, score)
                    except (ValueError, OSError) as error:
                        fail(job.run, error)
                    else:
                        outcome.finished[job.run.name] = found
                        bar.write(
                            f"{job.run.name}: {measure_name} {found['AP']:.1f} "
                            f"({len(outcome.finished)} of {len(runs)} runs)"
                        )
                    write_plan(plan, out)
                done = (len(outcome.finished) + len(outcome.failed)) * plan.steps
                done += sum(_steps(framework, job.run, plan) for job in active)
                bar.update(max(0, done - bar.n))
        finally:
            launcher.stop([job.process for job in active])
    return outcome


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"it was killed by signal {-code} ({signal.Signals(-code).name})"
    return tail(log, 1) if code else "it has left no results"


def _steps(framework: Framework, run: Run, plan: Plan) -> int:
    steps = max((record["step"] for record in framework.log(run.folder)), default=0)
    return min(plan.steps, int(steps))


def _begin(
    run: Run, plan: Plan, framework: Framework, out: Path, launcher: Launcher, place: int
) -> Process:
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
    return launcher.start(command, run.folder / "output.txt", place)


def _collect(
    job: _Job, results: Path, plan: Plan, framework: Framework, score: Callable[[Path], float]
) -> dict[str, Any]:
    """Copy a run's detections, write its marker, and leave its last checkpoint alone."""
    times = [record["time"] for record in framework.log(job.run.folder)]
    write_text(job.run.results, results.read_text(encoding="utf-8"))
    found = {
        "results": job.run.results.name,
        "AP": score(job.run.results),
        "seconds_a_step": statistics.median(times) if times else None,
    }
    write_text(job.run.marker, json.dumps(found))
    last = framework.weights(job.run.folder, plan.steps)
    for path in job.run.folder.glob("*.pth") if last else ():
        if path != last and not path.name.startswith("best"):  # one that the config asks for
            path.unlink()
    return found


def average_precision(annotations: str, results: Path, iou_type: str) -> float:
    """COCO's AP, in percent; raises ValueError where no object counts, or the results are wrong."""
    source = Source("annotations", annotations)
    content = read_truth(source, iou_type)
    found = read_results(Source("results", str(results)), iou_type, content, source)
    return accuracy(Detections(Truth(content, iou_type), found)).metrics["AP"]


def summary(plan: Plan, outcome: Outcome, out: Path) -> tuple[list[str], list[list[Any]]]:
    """Make a table of each variant: headers and rows.

    It has the mean of AP over the seeds, the sample standard deviation where there are two or more,
    the parameters, and the median of the seconds of a step where the framework has logged any.
    """
    ap = "AP" if plan.iou_type == "bbox" else f"{plan.iou_type} AP"
    headers = ["", ap, "± sd", "seeds", "parameters", "s/step"]
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


def training_section(plan: Plan, outcome: Outcome, rows: Sequence[Sequence[Any]]) -> Section:
    """Say in the report what the trainings have in common, and lay out what differs.

    Args:
        plan: of the trial.
        outcome: of its runs.
        rows: of :func:`summary`.
    """
    text = [
        f"Each training has {plan.steps:,} steps of {plan.batch_size} images. Those of a seed "
        "begin with the same weights but for the plugin's own, and see the same images in the "
        "same order."
    ]
    if own := [name.partition("=")[0] for name in plan.request.get("plugins", []) if "=" in name]:
        text.append(f"What else the config of {', '.join(own)} changes is up to its author.")
    text += filter(None, [plan.control, plan.left_out])
    if outcome.failed:
        text.append(f"Failed: {', '.join(outcome.failed)}.")
    plain = rows[0][4]
    headers = ["detector", "seeds", "parameters", "more than plain", "s/step"]
    cells = [[label, seeds, n, n - plain, time] for label, _, _, seeds, n, time in rows]
    return Section("Training", " ".join(text), [Table("Trainings", headers, cells, decimals=3)])
