"""benchmarks/context_bias.py: what it writes of runs that are done, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = ROOT / "benchmarks" / "context_bias.py"
    spec = importlib.util.spec_from_file_location("context_bias_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["benchmarks/context_bias.py"])
    return module


def test_table_has_mean_and_spread_over_the_seeds_and_findings_stay(benchmark, tmp_path, capsys):
    args = argparse.Namespace(seeds=[0, 1], work_dir=tmp_path / "work")
    for index, name in enumerate(benchmark.DETECTORS):
        for seed in args.seeds:
            folder = benchmark.folder(args.work_dir, name, seed) / "context_bias"
            folder.mkdir(parents=True)
            mean = {n: {"value": 10.0 * index + 2 * seed, "classes": 4} for n in benchmark.NUMBERS}
            (folder / "context_bias.json").write_text(json.dumps({"mean": mean}))
    path = tmp_path / "results" / "context_bias.md"
    benchmark.write(args)
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    benchmark.write(args)
    text = path.read_text()
    assert text.endswith(f"{benchmark.study.FINDINGS}\nWritten by hand.\n")
    rows = [line for line in text.splitlines() if line.startswith("| IDA in stages ")]
    assert rows[0].count("21.0 ± 1.4") == len(benchmark.NUMBERS)
    assert [row.split("|")[2].strip() for row in rows[1:]] == ["0", "1"]
    runs = json.loads((tmp_path / "results" / "context_bias.json").read_text())["runs"]
    assert runs["plain"] == {
        "0": dict.fromkeys(benchmark.NUMBERS, 0.0),
        "1": dict.fromkeys(benchmark.NUMBERS, 2.0),
    }


def test_only_the_control_trains_on_unbiased_images_and_all_are_measured_on_the_same(benchmark):
    work_dir = Path("work")
    for name in benchmark.DETECTORS:
        train = " ".join(benchmark.train_command(name, 1, work_dir))
        assert ("work/coco_unbiased/train2017" in train) == ("unbiased" in name)
        assert "work/coco/val2017" in train and "SEED 1" in train
        measure = " ".join(benchmark.evaluate_command(name, 1, work_dir))
        assert "work/coco/annotations/context_bias.json" in measure
        assert str(benchmark.folder(work_dir, name, 1)) in train
        assert str(benchmark.folder(work_dir, name, 1)) in measure
