"""benchmarks/attention_mask_consistency.py: what it writes of runs, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = ROOT / "benchmarks" / "attention_mask_consistency.py"
    spec = importlib.util.spec_from_file_location("amc_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["benchmarks/attention_mask_consistency.py"])
    return module


def test_table_has_mean_and_spread_and_findings_stay(benchmark, tmp_path, capsys):
    args = argparse.Namespace(seeds=[0, 1], work_dir=tmp_path / "work")
    for name in benchmark.DETECTORS:
        for seed in args.seeds:
            folder = benchmark.folder(args.work_dir, name, seed)
            folder.mkdir(parents=True)
            results = {"accuracy": 0.5 + 0.1 * seed, "chance": 0.2, "phrases": 10}
            results["categories"] = {"disk": {"accuracy": 1.0, "chance": 0.2, "phrases": 10}}
            (folder / "pointing_game.json").write_text(json.dumps(results))
            log = "recall/1: {'all': 0.1}  recall/5: {'all': 0.3}\nrecall/1: {'all': 0.25}  "
            (folder / "output.txt").write_text(f"{log} recall/5: {{'all': 0.75}}")
    path = tmp_path / "results" / "attention_mask_consistency.md"
    benchmark.write(args)
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    benchmark.write(args)

    text = path.read_text()
    assert text.endswith(f"{benchmark.study.FINDINGS}\nWritten by hand.\n")
    row = next(line for line in text.splitlines() if line.startswith("| Grounding DINO, AMC"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["55.0 ± 7.1", "20.0 ± 0.0", "25.0 ± 0.0", "75.0 ± 0.0", "100.0 ± 0.0"]


def test_both_detectors_train_on_the_same_with_the_same_schedule(benchmark):
    work_dir = Path("work")
    commands = {}
    for name in benchmark.DETECTORS:
        ((command, written_last),) = benchmark.steps(name, 1, work_dir)
        out = str(benchmark.folder(work_dir, name, 1))
        assert str(written_last.parent) == out and "randomness.seed=1" in command
        assert (ROOT / command[0]).is_file() and (ROOT / command[1]).is_file()
        commands[name] = [word.replace(out, "OUT") for word in command[2:]]
    plain, amc = commands.values()
    assert plain == amc


def test_with_amc_nothing_else_changes(benchmark):
    plain, amc = (
        Config.fromfile(ROOT / benchmark.CONFIGS / name).to_dict()
        for name in benchmark.DETECTORS.values()
    )
    assert amc["model"].pop("attention_mask_consistency")
    assert amc == plain
