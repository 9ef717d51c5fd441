"""benchmarks/run.py and its rooms: how it measures, what it writes, and the textbook's formulas."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import detector_step  # noqa: E402
import ida  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
import triplet_attention  # noqa: E402
from textbook import TextbookIDABlock, TextbookTripletAttention  # noqa: E402
from timing import Quantity, Row, Setting, at_least, at_most, measurement  # noqa: E402

from plugin_core import IDABlock, TripletAttention  # noqa: E402
from plugin_core.inspection import devices  # noqa: E402

MMDETECTION = ("mmdet", "mm_plugins", "mmdet_detectors")
SETTING = Setting(torch.device("cpu"), (torch.float32,), repetitions=3, quick=True)


def result_of(folder: Path) -> tuple[dict, str]:
    """The JSON and the text of a run on the CPU."""
    path = folder / report.slug(SETTING)
    return json.loads(path.with_suffix(".json").read_text()), path.with_suffix(".md").read_text()


def test_everything_is_measured_and_written(tmp_path, monkeypatch):
    gc.freeze()  # what other tests left need not be looked through in each measurement of memory
    monkeypatch.setattr(gc, "unfreeze", lambda: None)
    out = tmp_path / "results"
    run.main(["--quick", "--device", "cpu", "--out", str(out)])
    results, text = result_of(out)
    slug = report.slug(SETTING)
    plot = out / f"{slug}-triplet_attention.png"
    assert {path.name for path in out.iterdir()} == {f"{slug}.md", f"{slug}.json", plot.name}
    assert plot.stat().st_size < 200_000 and f"]({plot.name})" in text
    assert list(results["benchmarks"]) == list(run.BENCHMARKS)
    rows = {
        (name, row["group"], row["case"]): row
        for name, benchmark in results["benchmarks"].items()
        for row in benchmark["rows"]
    }
    unmeasured = {where for where, row in rows.items() if row["not_measured"]}
    assert all("torch.compile" in group for _, group, _ in unmeasured)
    for where, row in rows.items():
        assert where in unmeasured or row["values"]
        for column, quantity in row["values"].items():
            assert math.isfinite(quantity["value"]), (where, column)
            if column.endswith(", ms"):
                assert len(quantity["rounds"]) == 2 and min(quantity["rounds"]) > 0
    case = "Faster R-CNN, triplet attention, 2 images of 64x96 float32"
    training = rows["detector_step", "Training steps", case]["values"]
    assert training["losses differ, %"]["value"] < 1e-3
    inference = rows["detector_step", "Inference", case.replace("2 images", "1 image")]["values"]
    assert inference["detections with"] == inference["detections without"] != {"value": 0}
    group, size = "Detectors that read a text", "1 image of 64x96 float32"
    for loss in ("AMC of 1 phrase", "AMC of all 4 phrases", "functional entropy"):
        row = rows["auxiliary_losses", group, f"Grounding DINO, {loss}, {size}"]["values"]
        assert row["losses differ, %"]["value"] < 1e-3
        assert row["with, MiB"]["value"] > row["without, MiB"]["value"]
    case = "1x8x12x10 channels_last float32, forward + backward"
    assert set(rows["triplet_attention", "", case]["values"]) > {
        "textbook / TripletAttention",
        "TripletAttention, extra memory, %",
        "copy_, GB/s",
    }
    assert f"| torch          | {torch.__version__} " in text


def test_a_failed_and_an_impossible_benchmark_are_named(tmp_path, monkeypatch, capsys):
    def impossible(setting):
        raise ImportError("No module named\n'that'")

    def fail(setting):
        raise RuntimeError("it broke")

    monkeypatch.setattr(ida, "rows", impossible)
    monkeypatch.setattr(detector_step, "rows", fail)
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    run.main([*options, "--only", "ida"])
    with pytest.raises(SystemExit, match="error: .*: detector_step$"):
        run.main([*options, "--only", "detector_step"])
    results, text = result_of(tmp_path)
    reasons = {
        name: [row["not_measured"] for row in benchmark["rows"]]
        for name, benchmark in results["benchmarks"].items()
    }
    failure = "it failed: RuntimeError: it broke"
    assert reasons == {"ida": ["No module named 'that'"], "detector_step": [failure]}
    assert "- IDA in a stage: all of it: No module named 'that'\n" in text
    assert f"- Detectors: all of it: {failure}\n" in text
    assert "; not measured: No module named 'that'" in capsys.readouterr().out


def test_what_was_measured_before_is_kept_when_a_run_is_stopped(tmp_path, monkeypatch, capsys):
    row = Row("a case", {"time, ms": Quantity(2.0, 0.5, at_most(3), (1.5, 2.0, 2.5))})

    def stop(setting):
        raise KeyboardInterrupt

    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(detector_step, "rows", lambda setting: [row])
    run.main([*options, "--only", "detector_step"])
    path = tmp_path / f"{report.slug(SETTING)}.md"
    path.write_text(f"{path.read_text()}{report.FINDINGS}\nWritten by hand.\n")
    monkeypatch.setattr(ida, "rows", lambda setting: [])
    monkeypatch.setattr(detector_step, "rows", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main([*options, "--only", "ida", "detector_step"])
    results, text = result_of(tmp_path)
    assert list(results["benchmarks"]) == ["ida", "detector_step"]
    assert results["benchmarks"]["detector_step"]["rows"][0]["values"]["time, ms"] == {
        "value": 2.0,
        "spread": 0.5,
        "target": "≤ 3",
        "is_met": True,
        "rounds": [1.5, 2.0, 2.5],
    }
    assert "| a case | 2 ± 0.500 (≤ 3: yes) |" in text
    assert "Measured before, with command `benchmarks/run.py" in text
    assert text.endswith("## Findings\n\nWritten by hand.\n")
    assert len(list(tmp_path.iterdir())) == 2


def test_results_of_another_commit_do_not_stand_beside_new_ones(tmp_path, monkeypatch):
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    for name, module in (("ida", ida), ("triplet_attention", triplet_attention)):
        monkeypatch.setattr(module, "rows", lambda setting: [])
        monkeypatch.setattr(report, "commit", lambda name=name: name)
        run.main([*options, "--only", name])
    assert list(result_of(tmp_path)[0]["benchmarks"]) == ["triplet_attention"]


def test_a_framework_that_is_not_installed_is_a_reason(monkeypatch, capsys):
    for name in [m for m in sys.modules if m.partition(".")[0] in MMDETECTION]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    case = detector_step.Case("DETR", "training", 2, (64, 96), torch.float32)
    step = partial(detector_step.training_of_detr, case, SETTING)
    [row] = timing.attempt("", "a DETR", step)
    assert "mmdet" in row.not_measured and not row.has_failed, row
    assert "s; not measured: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "tpu"], "--device tpu: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch finds"),
        (["--repetitions", "2"], "--repetitions 2: at least 3 are needed"),
        (["--quick", "--repetitions", "1"], "--repetitions 1: at least 2 are needed"),
        (["--repetitions", "some"], "argument --repetitions: invalid int value: 'some'"),
        (["--only", "speed"], "argument --only: invalid choice: 'speed'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--out", __file__], "File exists"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run.parse_args(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("run.py: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fast"], "error: unknown argument --fast"),
        (["--out"], "error: --out needs a value"),
        (["--wheels", "no/where"], "error: --wheels no/where: there is no such folder"),
    ],
)
def test_bad_arguments_of_the_gpu_check_are_named(arguments, message, tmp_path):
    command = [ROOT / "benchmarks" / "gpu_check.sh", "--out", tmp_path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(message)


def test_a_bad_environment_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("PLUGIN_KERNELS", "quick")
    with pytest.raises(SystemExit):
        run.parse_args(["--quick"])
    assert capsys.readouterr().err.startswith("run.py: error: the environment variable")


def test_arguments_that_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    args = run.parse_args(["--device", "cpu"])
    assert (args.only, args.repetitions, args.out) == (list(run.BENCHMARKS), 5, tmp_path)
    assert args.dtypes == (torch.float32,)
    args = run.parse_args(["--device", "cpu", "--quick", "--only", "ida", "triplet_attention"])
    assert (args.only, args.repetitions, args.out) == (["triplet_attention", "ida"], 2, None)
    assert run.parse_args(["--quick"], only="ida").only == ["ida"]


def test_a_ratio_is_that_of_the_medians_and_spreads_as_the_rounds_do():
    slow, quick = measurement("slow", [8.0, 4.0, 6.0]), measurement("quick", [2.0, 2.0, 2.0])
    found = timing.ratio(slow, quick, at_least(3))
    assert found == Quantity(3.0, 1.0, at_least(3), (4.0, 2.0, 3.0))
    assert found.target.met(found.value)
    # Rounds that drift together do not spread.
    drifting = measurement("drifting", [4.0, 2.0, 3.0], number=2)
    found = timing.ratio(slow, drifting)
    assert found.value == 4.0 and found.spread == 0.0


def test_times_are_of_one_call_in_milliseconds():
    found = timing.milliseconds(measurement("twice", [0.002, 0.004, 0.006, 0.008], number=2))
    assert found.rounds == pytest.approx((1, 2, 3, 4))
    assert found.value == pytest.approx(2.5) and found.spread == pytest.approx(1.5)
    assert timing.interquartile_range([1, 2, 3, 4]) == pytest.approx(1.5)


def test_the_exponent_of_growth():
    assert timing.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert timing.exponent([1, 10, 100], [5, 50, 500]) == pytest.approx(1)
    assert timing.slope_through_origin([1, 2], [3, 1]) == pytest.approx((3 + 2) / (1 + 4))


@pytest.mark.parametrize(
    "target, value, met",
    [(at_least(5), 5.0, True), (at_least(5), 4.99, False), (at_most(1.08), 1.081, False)],
)
def test_targets(target, value, met):
    assert target.met(value) is met


def test_candidates_take_turns_on_the_same_input_and_the_first_round_does_not_count():
    seen = []
    candidates = {name: partial(lambda n, x: seen.append((n, x)), name) for name in "abc"}
    times = timing.interleaved(candidates, lambda i: 10 * i, SETTING)
    assert [x for _, x in seen] == [0] * 3 + [10] * 3 + [20] * 3 + [30] * 3
    assert all({n for n, _ in seen[i : i + 3]} == set("abc") for i in range(0, 12, 3))
    assert {name: len(measured.times) for name, measured in times.items()} == dict.fromkeys(
        "abc", 3
    )


def test_peak_memory_is_what_lived_beyond_the_results():
    def step():
        first = torch.zeros(1000)  # 4000 bytes
        second = torch.zeros(500)
        del first
        third = torch.zeros(100)
        return second, third

    assert devices.peak_extra_bytes(step, torch.device("cpu")) == 4000 - 400


def test_the_choice_of_kernels_is_put_back(monkeypatch):
    monkeypatch.delenv("PLUGIN_KERNELS", raising=False)
    inside = timing.with_kernels("plain", lambda: os.environ["PLUGIN_KERNELS"])
    assert inside() == "plain" and "PLUGIN_KERNELS" not in os.environ
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    assert inside() == "plain" and os.environ["PLUGIN_KERNELS"] == "fast"


def test_the_plot_shows_both_growths():
    rows = [
        Row("", {axis: Quantity(size), "TripletAttention, ms": Quantity(2 * size, 0.1)})
        for axis in ("H·W", "B")
        for size in (1, 2, 3)
    ]
    axes = triplet_attention.plot(rows).axes
    assert [(a.get_xlabel(), a.get_title()) for a in axes] == [
        ("H·W", "exponent 1.00"),
        ("B", "exponent 1.00"),
    ]
    assert triplet_attention.plot([Row("", {"other": Quantity(1)})]) is None


def test_where_the_plain_formulas_are_all_there_is_the_results_say_so(monkeypatch, capsys):
    monkeypatch.setenv("PLUGIN_KERNELS", "plain")
    [row] = triplet_attention.missing_fast_paths(SETTING)
    assert row.case == "fast path in float32" and "PLUGIN_KERNELS=plain" in row.not_measured


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "ours, textbook",
    [
        (TripletAttention, TextbookTripletAttention),
        (partial(IDABlock, 8, num_queries=5, num_heads=2), None),
        (partial(IDABlock, 8, num_queries=5, num_heads=2, heavy=True), None),
    ],
    ids=["triplet attention", "IDA", "heavy IDA"],
)
def test_textbook_and_plugin_are_the_same_function(ours, textbook, training, layout):
    if textbook is None:
        textbook = partial(TextbookIDABlock, *ours.args, **ours.keywords)
    modules = [make().double().train(training) for make in (ours, textbook)]
    state = {
        name: torch.rand_like(value) if value.is_floating_point() else value.clone()
        for name, value in modules[0].state_dict().items()
    }
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64).contiguous(memory_format=layout)
    g = torch.randn_like(x)
    found = []
    for module in modules:
        module.load_state_dict(state)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        gradients = torch.autograd.grad(y, [leaf, *module.parameters()], g)
        found.append([y, *gradients, *module.buffers()])
    torch.testing.assert_close(found[0], found[1])
