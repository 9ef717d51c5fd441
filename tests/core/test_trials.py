"""Trying plugins without a framework: what is asked for, planned, run, resumed and reported."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from plugin_core.inspection.cost import Cost
from plugin_core.training import RunError, trials
from plugin_core.training.trials import (
    Plan,
    Plugin,
    Run,
    read_plan,
    read_plugins,
    run_all,
    write_plan,
)
from plugin_core.training.trials.control import fit_control

# Writes a log of 2 steps, one at a call where it "is killed" after the first, and then detections
TRAINING = """
import json, os, sys
folder, steps, fails = sys.argv[1:]
log = os.path.join(folder, "log.txt")
done = len(open(log).readlines()) if os.path.exists(log) else 0
open(os.path.join(folder, "calls.txt"), "a").write(f"{done} ")
for step in range(done, int(steps)):
    open(log, "a").write("0.5\\n")
    if os.path.exists(os.path.join(folder, "hang")):
        import time; time.sleep(600)
if fails == "True":
    sys.exit("error: it diverged")
for name in ("1", steps, "best_1"):
    open(os.path.join(folder, name + ".pth"), "w").close()
box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}
json.dump([box], open(os.path.join(folder, "found.json"), "w"))
"""


class Scripted:
    """A framework whose trainings are small scripts."""

    suffix = ".txt"
    steps, batch_size = 2, 1

    def __init__(self, folder: Path, failing: str = "") -> None:
        self.script = folder / "training.py"
        self.script.write_text(TRAINING)
        self.failing = failing
        self.initialized: list[int] = []

    def initialize(self, seed: int, path: Path) -> None:
        self.initialized.append(seed)
        path.write_text(str(seed))

    def run_config(self, base: Path, run: Run | None, folder: Path, steps: int) -> str:
        return f"{base} {run.initial if run else ''}"

    def command(self, config: Path, folder: Path, steps: int) -> list[str]:
        fails = str(bool(self.failing) and self.failing in folder.name)
        return [sys.executable, str(self.script), str(folder), str(steps), fails]

    def log(self, folder: Path) -> list[dict[str, float]]:
        path = folder / "log.txt"
        lines = path.read_text().split() if path.exists() else []
        return [{"step": i + 1, "time": float(line)} for i, line in enumerate(lines)]

    def results(self, folder: Path) -> Path | None:
        path = folder / "found.json"
        return path if path.exists() else None

    def weights(self, folder: Path, steps: int) -> Path | None:
        path = folder / f"{steps}.pth"
        return path if path.exists() else None


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100}
    content = {
        "images": [{"id": 1, "width": 20, "height": 20, "file_name": "1.jpg"}],
        "categories": [{"id": 1, "name": "disk"}],
        "annotations": [{**box, "iscrowd": 0}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def make_plan(annotations: str) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        labels = ["plain", "simam"]
        values: dict[str, Any] = {
            "request": {"seeds": 2},
            "annotations": annotations,
            "labels": labels,
            "steps": 2,
            "seeds": 2,
            "parameters": dict.fromkeys(labels, 10),
            "batch_size": 1,
            "test_images": 0,
        }
        return Plan(**{**values, **changes})

    return make


def run(
    plan: Plan, framework: Any, out: Path, launcher: Any = None, jobs: int = 2
) -> trials.Outcome:
    out.mkdir(exist_ok=True)
    launcher = launcher or trials.LocalLauncher()
    return run_all(plan, framework, out, jobs=jobs, launcher=launcher, poll=0.02)


def test_plugins_are_read_with_their_stages_and_labels():
    read = read_plugins(["triplet_attention", "ida", "ida@3,5", "timm:eca", "amc"])
    assert [(p.name, p.stages, p.label) for p in read] == [
        ("triplet_attention", (2, 3, 4, 5), "triplet_attention"),
        ("ida", (4, 5), "ida"),
        ("ida", (3, 5), "ida_3_5"),
        ("timm:eca", (2, 3, 4, 5), "timm_eca"),
        ("amc", (), "amc"),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["triplet_atention"], "did you mean 'triplet_attention'"),
        (["batchformer"], "batchformer_v1"),
        (["simam", "simam"], "--with simam: is given twice"),
        (["ida@6"], "stages must be numbers from 2 to 5"),
        (["amc@4"], "takes no stages"),
        (["mine=missing.yaml"], "there is no such config file"),
        (["a/b=missing.yaml"], "expected a name of letters"),
        ([], "name at least one plugin"),
    ],
)
def test_bad_plugins_are_refused(given: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        read_plugins(given)


def test_control_is_the_narrowest_that_costs_no_less_than_any_variant():
    def cost_of(plugin: Plugin) -> Cost:
        width = plugin.arguments["width"]
        return Cost(1000 + 10 * width, 5000 + 100 * width)

    plugins = read_plugins(["ida@4", "triplet_attention@3", "amc"])
    plain = Cost(1000, 5000)
    for other, width in ((Cost(1071, 5000), 8), (Cost(1070, 5401), 7), (Cost(1001, 5401), 5)):
        costs = {"plain": plain, "other": other, "amc": plain}
        control, sentence = fit_control(plugins, costs, cost_of)
        assert control.arguments == {"width": width} and control.stages == (3, 4)
        assert f"{1000 + 10 * width:,} parameters" in sentence
    with pytest.raises(ValueError, match="--control: no plugin has parameters or GFLOPs"):
        fit_control(plugins, {"plain": plain, "amc": plain}, cost_of)


def test_control_is_among_the_variants(tmp_path):
    class Counted(Scripted):
        def derive(self, plugin: Plugin | None) -> str:
            return f"{plugin.label} {plugin.arguments.get('width')}" if plugin else "plain 0"

        def check(self, path: Path) -> int:
            label, width = path.read_text().split()
            return 107 if label == "simam" else 100 + 3 * int(width)

        def cost(self, path: Path) -> Cost:
            return Cost(self.check(path), 1000)

    framework: Any = Counted(tmp_path)
    configs = trials.derive_configs(framework, read_plugins(["simam"]), control=True)
    assert configs.parameters == {"plain": 100, "simam": 107, "control": 109}
    configs.write(framework, tmp_path)
    assert (tmp_path / "configs" / "control.txt").read_text() == "control 3"
    framework.cost = lambda path: 1 / 0
    with pytest.raises(ValueError, match="--control: plain cannot be counted: ZeroDivision"):
        trials.derive_configs(framework, read_plugins(["simam"]), control=True)


def test_difference_shows_the_settings_that_differ_alone():
    before = {"MODEL": {"A": 1, "B": [1]}, "SEED": 0}
    after = {"MODEL": {"A": 1, "B": [1, 2], "C": "x"}, "SEED": 0}
    expected = "  - MODEL.B: [1]\n  + MODEL.B: [1, 2]\n  + MODEL.C: 'x'"
    assert trials.difference(before, after) == expected


def test_estimate_counts_steps_evaluation_and_the_rest(make_plan, tmp_path):
    plan = make_plan(
        steps=100, test_images=30, seconds_a_step={"plain": 1.0, "simam": 2.0}, overhead=5.0
    )
    assert plan.seconds("plain") == pytest.approx(5 + 100 + 10)
    assert plan.total(jobs=2) == pytest.approx(2 * (5 + 110 + 5 + 220) / 2)
    assert plan.total(jobs=3) == plan.total(jobs=2)  # one run is alone after three
    assert plan.left(2, tmp_path) == plan.total(2)
    for run in plan.runs(tmp_path)[:2]:
        for file in (run.marker, run.results):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    assert plan.left(2, tmp_path) == plan.total(2) / 2


def test_measurement_takes_the_median_step_of_each_variant_and_leaves_nothing(make_plan, tmp_path):
    plan, out = make_plan(steps=100), tmp_path / "out"
    trials.measure(plan, Scripted(tmp_path), out, trials.LocalLauncher(), poll=0.02)
    assert plan.seconds_a_step == {"plain": 0.5, "simam": 0.5}
    assert not list(out.iterdir())
    with pytest.raises(RunError, match=r"simam cannot be trained:\nerror: it diverged"):
        failing = Scripted(tmp_path, failing="simam")
        trials.measure(plan, failing, out, trials.LocalLauncher(), poll=0.02)
    without = make_plan(labels=["plain", "ida"], steps=100)
    trials.measure(without, Scripted(tmp_path), out, trials.LocalLauncher(), poll=0.02)
    assert not list(out.iterdir())  # nor anything of the measurement that failed


def test_budget_leaves_out_seeds_first_then_steps(make_plan):
    measured = {"seconds_a_step": {"plain": 1.0, "simam": 1.0}}
    plan = make_plan(steps=100, seeds=5, **measured)
    plan.fit(650, 1, may_shorten=True)
    assert (plan.seeds, plan.steps) == (3, 100)
    assert plan.left_out == "The budget left out 2 of 5 seeds."
    plan.fit(200, 1, may_shorten=True)
    assert (plan.seeds, plan.steps) == (2, 50)
    assert "50 of 100 steps" in plan.left_out
    fixed = make_plan(steps=100, seeds=3, **measured)
    fixed.fit(250, 1, may_shorten=False)
    assert (fixed.seeds, fixed.steps) == (1, 100)
    with pytest.raises(ValueError, match="--budget: 10 s is too short"):
        fixed.fit(10, 1, may_shorten=False)


@pytest.mark.parametrize("text", ["8", "8 hours", "-1h", "0h"])
def test_durations_without_a_unit_are_refused(text: str):
    with pytest.raises(ValueError, match="8h or 90m"):
        trials.read_duration(text)
    assert trials.read_duration("1.5h") == 5400


def test_all_variants_of_a_seed_begin_with_the_same_weights(make_plan, tmp_path):
    plan, framework = make_plan(), Scripted(tmp_path)
    outcome = run(plan, framework, tmp_path / "out")
    assert not outcome.failed
    assert framework.initialized == [0, 1]
    runs = plan.runs(tmp_path / "out")
    assert [r.name for r in runs] == ["plain-seed0", "simam-seed0", "plain-seed1", "simam-seed1"]
    assert runs[0].initial == runs[1].initial != runs[2].initial
    assert all(outcome.finished[r.name]["AP"] == pytest.approx(100) for r in runs)
    assert all(json.loads(r.results.read_text()) for r in runs)
    kept = [{path.name for path in r.folder.glob("*.pth")} for r in runs]
    assert kept == [{"2.pth", "best_1.pth"}] * 4  # the last one, and what the config asks for
    _, rows = trials.summary(plan, outcome, tmp_path / "out")
    row = [pytest.approx(100), 0, "2 of 2", 10, 0.5]
    assert rows == [["plain", *row], ["simam", *row]]
    outcome.failed["simam-seed2"] = "it diverged"
    plan.request["plugins"] = ["simam", "mine=my.yaml"]
    rows[1][4] = 12
    trained = trials.training_section(plan, outcome, rows)
    assert "2 steps of 1 images" in trained.text and "config of mine changes" in trained.text
    assert trained.text.endswith("Failed: simam-seed2.")
    assert trained.tables[0].rows[1] == ["simam", "2 of 2", 12, 2, 0.5]


def test_masks_are_compared_as_masks(make_plan, annotations, tmp_path):
    content = json.loads(Path(annotations).read_text())
    half = {"size": [20, 20], "counts": "05?00000000000000000X6"}
    object_ = {**content["annotations"][0], "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
    Path(annotations).write_text(json.dumps({**content, "annotations": [object_]}))
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{**box, "segmentation": half}]))
    assert trials.average_precision(annotations, results, "bbox") == pytest.approx(100)
    assert trials.average_precision(annotations, results, "segm") < 50
    headers, _ = trials.summary(make_plan(iou_type="segm"), trials.Outcome(), tmp_path)
    assert headers[1] == "segm AP"


def test_plan_of_an_earlier_version_goes_on(make_plan, tmp_path):
    plan, out = make_plan(), tmp_path
    write_plan(plan, out)
    content = json.loads((out / "plan.json").read_text())
    for added in ("control", "iou_type"):
        del content[added]
    (out / "plan.json").write_text(json.dumps(content))
    assert read_plan(out, {**plan.request, "control": False, "iou_type": None}) == plan


def test_failed_run_is_told_others_go_on_and_it_is_tried_again(make_plan, tmp_path):
    plan, out = make_plan(), tmp_path / "out"
    in_the_way = plan.runs(out)[2].folder
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    outcome = run(plan, Scripted(tmp_path, failing="simam-seed0"), out)
    assert set(outcome.failed) == {"simam-seed0", "plain-seed1"}
    assert "error: it diverged" in outcome.failed["simam-seed0"]
    assert "File exists" in outcome.failed["plain-seed1"]
    assert len(outcome.finished) == 2
    in_the_way.unlink()
    again = run(plan, Scripted(tmp_path), out)
    assert len(again.finished) == 4 and not again.failed
    calls = {r.name: (r.folder / "calls.txt").read_text() for r in plan.runs(out)}
    assert calls.pop("simam-seed0") == "0 2 "
    assert set(calls.values()) == {"0 "}  # what has finished is not run again


def test_stopped_command_ends_its_trainings_and_goes_on_where_it_was(make_plan, tmp_path):
    plan, out, framework = make_plan(seeds=1), tmp_path / "out", Scripted(tmp_path)
    hanging = plan.runs(out)[1].folder
    hanging.mkdir(parents=True)
    (hanging / "hang").touch()
    began: list[Any] = []
    launcher = trials.LocalLauncher()
    log = framework.log

    def interrupt(folder: Path) -> list[dict[str, float]]:
        if folder == hanging and log(folder) and (out / "results" / "plain-seed0.json").exists():
            raise KeyboardInterrupt
        return log(folder)

    framework.log = interrupt  # type: ignore[method-assign]
    start = launcher.start
    launcher.start = lambda *a: began.append(start(*a)) or began[-1]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(plan, framework, out, launcher)
    assert len(began) == 2 and all(process.poll() is not None for process in began)
    (hanging / "hang").unlink()
    outcome = run(plan, Scripted(tmp_path), out)
    assert len(outcome.finished) == 2
    assert (hanging / "calls.txt").read_text() == "0 1 "  # it went on after its first step


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_trainings_end_with_a_command_that_is_killed(tmp_path):
    command = os.fork()
    if not command:
        child = trials.LocalLauncher().start(["sleep", "60"], tmp_path / "log", 0)
        (tmp_path / "child").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(command, 0)
    training = Path("/proc", (tmp_path / "child").read_text(), "stat")
    for _ in range(200):
        if not training.exists() or training.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the training goes on")


def test_folder_of_another_plan_is_refused(make_plan, tmp_path):
    plan, out = make_plan(), tmp_path / "out"
    assert read_plan(out, plan.request) is None
    out.mkdir()
    write_plan(plan, out)
    assert read_plan(out, plan.request) == plan
    assert read_plan(out, {"seeds": 1}) is None  # before the first training
    (out / "runs").mkdir()
    with pytest.raises(ValueError, match=r"another plan \(seeds was 2 and is 1\)"):
        read_plan(out, {"seeds": 1})
    more = read_plan(out, {"seeds": 3})
    assert more == make_plan(seeds=3, request={"seeds": 3})
    with pytest.raises(ValueError, match=r"another plan \(seeds was 2 and is 3; steps was None"):
        read_plan(out, {"seeds": 3, "steps": 9})
    write_plan(replace(plan, left_out="The budget left out 1 of 3 seeds."), out)
    with pytest.raises(ValueError, match=r"another plan \(seeds was 2 and is 3\)"):
        read_plan(out, {"seeds": 3})
    (out / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="is no plan of this command"):
        read_plan(out, plan.request)
    (out / "plan.json").unlink()
    (out / "runs").rename(out / "configs")
    assert read_plan(out, plan.request) is None  # killed before it wrote the plan
    (out / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files and no plan"):
        read_plan(out, plan.request)


def test_gpus_are_given_in_turn_and_each_process_has_one_thread(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher, log = trials.LocalLauncher(["0", "3"]), tmp_path / "log"
    for place in range(3):
        words = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS"]
        assert launcher.start(words, log, place).wait() == 0
    assert log.read_text().splitlines() == ["0 1", "3 1", "0 1"]


class Job:
    """submitit's job, as far as it is used; it runs in a thread."""

    known: ClassVar[dict[str, Job]] = {}
    state = "FAILED"

    def __init__(self, folder: Path, job_id: str, function: Callable[[], int] | None = None):
        self.job_id, self.cancelled = job_id, False
        self.thread = threading.Thread(target=self.work, args=(function,))

    def work(self, function: Callable[[], int]) -> None:
        self.found = function()

    def done(self, force_check: bool = False) -> bool:
        return not Job.known[self.job_id].thread.is_alive()

    def result(self) -> int:
        if not hasattr(Job.known[self.job_id], "found"):
            raise RuntimeError("job has died\nof a reason")
        return Job.known[self.job_id].found

    def cancel(self, check: bool) -> None:
        Job.known[self.job_id].cancelled = True


@pytest.fixture
def submitit(monkeypatch) -> Any:
    """Stands in for the library, which is not among the tests' requirements."""

    class AutoExecutor:
        def __init__(self, folder: Path, cluster: str) -> None:
            if cluster != "slurm":
                raise RuntimeError('Could not detect "srun"')

        def update_parameters(self, **parameters: Any) -> None:
            library.parameters = parameters

        def submit(self, function: Callable[[], int]) -> Job:
            job = Job.known[str(len(Job.known))] = Job(Path(), str(len(Job.known)), function)
            job.thread.start()
            return job

    library = SimpleNamespace(AutoExecutor=AutoExecutor, SlurmJob=Job, LocalJob=Job)
    monkeypatch.setitem(sys.modules, "submitit", library)
    monkeypatch.setattr(Job, "known", {})
    return library


def test_runs_are_jobs_of_slurm_and_a_job_that_fails_is_told(make_plan, tmp_path, submitit):
    options = {"partition": "gpu", "gpus-per-node": "1"}
    launcher = trials.SlurmLauncher(tmp_path / "slurm", options)
    limit = {"slurm_timeout_min": 1440}
    assert submitit.parameters == {"slurm_partition": "gpu", "slurm_gpus_per_node": 1, **limit}
    plan, framework = make_plan(seeds=1), Scripted(tmp_path, failing="simam")
    outcome = run(plan, framework, tmp_path / "out", launcher)
    assert outcome.finished["plain-seed0"]["AP"] == pytest.approx(100)
    assert "error: it diverged" in outcome.failed["simam-seed0"]
    assert len(Job.known) == 2
    launcher.executor.submit = lambda function: Job.known.setdefault("9", Job(Path(), "9"))
    outcome = run(plan, framework, tmp_path / "out", launcher)
    assert "error: job 9 (FAILED): job has died" in outcome.failed["simam-seed0"]


def test_job_of_an_earlier_command_is_taken_over_and_stopped_with_this_one(tmp_path, submitit):
    launcher, log = trials.SlurmLauncher(tmp_path, {"time": "60"}), tmp_path / "output.txt"
    assert submitit.parameters == {"slurm_time": 60}
    first = launcher.start(["sleep", "0.5"], log, 0)
    again = trials.SlurmLauncher(tmp_path, {}).start(["sleep", "0.5"], log, 0)
    assert again.job.job_id == first.job.job_id and again.poll() is None
    launcher.stop([again])
    assert first.job.cancelled
    first.job.thread.join()
    assert again.poll() == 0
    last = launcher.start(["true"], log, 0)
    assert last.job.job_id != first.job.job_id
    last.job.thread.join()


def test_slurm_without_submitit_or_cluster_is_one_line(tmp_path, submitit, monkeypatch):
    with pytest.raises(ValueError, match='--launcher slurm: Could not detect "srun"'):
        trials.SlurmLauncher(tmp_path, {}, cluster="local")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"--launcher slurm: needs submitit: `pip install -e"):
        trials.SlurmLauncher(tmp_path, {})
