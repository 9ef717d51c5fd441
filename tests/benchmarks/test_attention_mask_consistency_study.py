"""benchmarks/attention_mask_consistency.py: what it writes of runs, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
from mmengine.config import Config

from plugin_core import AttentionMaskConsistency

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
    row = next(line for line in text.splitlines() if line.startswith("| AMC "))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["55.0 ± 7.1", "20.0 ± 0.0", "25.0 ± 0.0", "75.0 ± 0.0", "100.0 ± 0.0"]


def test_detectors_train_on_the_same_with_the_same_schedule(benchmark):
    commands = []
    for name, (config, own) in benchmark.DETECTORS.items():
        ((command, written_last),) = benchmark.steps(name, 1, Path("work"))
        out = str(benchmark.folder(Path("work"), name, 1))
        assert str(written_last.parent) == out and "randomness.seed=1" in command
        assert (ROOT / command[0]).is_file() and command[1] == f"{benchmark.CONFIGS}/{config}"
        added = {f"{key}={value}" for key, value in own.items()}
        assert added <= set(command)
        commands.append([word.replace(out, "OUT") for word in command[2:] if word not in added])
    assert all(command == commands[0] for command in commands)


def test_with_amc_nothing_else_changes(benchmark):
    configs = ROOT / benchmark.CONFIGS
    plain = Config.fromfile(configs / benchmark.CONFIG).to_dict()
    amc = Config.fromfile(configs / benchmark.AMC_CONFIG).to_dict()
    assert amc["model"].pop("attention_mask_consistency") == {}
    assert amc == plain


def test_options_are_settings_of_the_detector(benchmark):
    for config, own in benchmark.DETECTORS.values():
        cfg = Config.fromfile(ROOT / benchmark.CONFIGS / config)
        cfg.merge_from_dict(dict(own))
        inspect.signature(AttentionMaskConsistency).bind(
            **cfg.model.get("attention_mask_consistency", {})
        )
