"""benchmarks/long_tail_classification.py: what it writes of runs that are done."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    path = ROOT / "benchmarks" / "long_tail_classification.py"
    spec = importlib.util.spec_from_file_location("long_tail_classification", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [f"benchmarks/{path.name}"])
    return module


@pytest.fixture
def args(tmp_path):
    work, results = tmp_path / "work", tmp_path / "results"
    for split, counts in {"train": {"disk": 120, "ring": 3}, "val": {"disk": 5, "ring": 5}}.items():
        for name, count in counts.items():
            folder = work / "drawn" / "classification" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.jpg").touch()
    return argparse.Namespace(seeds=2, jobs=1, steps=None, work_dir=work, results=results)


def end(benchmark, args, name: str, seed: int, few: float) -> None:
    """Write what a run that has ended leaves."""
    path = benchmark.folder(name, seed, args.work_dir) / "20260101_000000/vis_data/scalars.json"
    path.parent.mkdir(parents=True)
    numbers = {"long-tail/all": 50.0, "long-tail/many": 90.0, "long-tail/few": few}
    path.write_text(f"{json.dumps({'loss': 1.0})}\n{json.dumps(numbers)}\n")


def test_table_has_mean_and_spread_of_each_group(benchmark, args):
    for name, start in zip(benchmark.CLASSIFIERS, (10.0, 20.0), strict=True):
        for seed in range(2):
            end(benchmark, args, name, seed, start + 2 * seed)
    benchmark.write(args)
    text = (args.results / "long_tail_classification.md").read_text()
    assert "11.0 ± 1.4" in text and "21.0 ± 1.4" in text
    assert "| disk    | many    |            120 |            5 |" in text
    assert "--resume auto" in text
    content = json.loads((args.results / "long_tail_classification.json").read_text())
    assert content["runs"]["ResNet-10"]["1"]["few"] == 12.0


def test_a_run_that_has_ended_is_not_repeated(benchmark, args, monkeypatch):
    started = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda words, check: started.append(words))
    end(benchmark, args, "ResNet-10", 0, 1.0)
    for seed in range(2):
        benchmark.train("ResNet-10", seed, args)
    (words,) = started
    assert "randomness.seed=1" in words
