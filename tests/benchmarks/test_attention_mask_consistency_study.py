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
from plugin_core.training.trials import Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = ROOT / "benchmarks" / "attention_mask_consistency.py"
    spec = importlib.util.spec_from_file_location("amc_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["benchmarks/attention_mask_consistency.py"])
    return module


def test_table_has_mean_and_spread_and_findings_stay(benchmark, tmp_path, capsys):
    args = argparse.Namespace(seeds=2, work_dir=tmp_path / "work", results=tmp_path / "results")
    found = args.work_dir / "trial" / "results"
    found.mkdir(parents=True)
    for label, _ in benchmark.DETECTORS.values():
        for seed in range(2):
            folder = args.work_dir / "trial" / "runs" / f"{label}-seed{seed}"
            folder.mkdir(parents=True)
            results = {"accuracy": 0.5 + 0.1 * seed, "chance": 0.2, "phrases": 10}
            results["categories"] = {"disk": {"accuracy": 1.0, "chance": 0.2, "phrases": 10}}
            (found / f"{folder.name}.json").write_text(json.dumps(results))
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


def test_detectors_differ_in_attention_mask_consistency_and_its_heatmap_alone(benchmark, tmp_path):
    plain = None
    for name in benchmark.DETECTORS:
        settings = Config.fromfile(benchmark.write_detector(name, tmp_path)).to_dict()
        amc = settings["model"].pop("attention_mask_consistency", None)
        assert (amc is None) == (name == "Grounding DINO")
        inspect.signature(AttentionMaskConsistency).bind(**(amc or {}))
        heatmap = settings["model"].pop("heatmap")
        assert heatmap.pop("activation", "") == (
            "encoder.fusion_layers.0" if "first" in name else ""
        )
        plain = plain or (settings, heatmap)
        assert (settings, heatmap) == plain


def test_trial_is_judged_by_the_pointing_game(benchmark, tmp_path):
    trial = benchmark.PhraseTrials(str(benchmark.write_detector("AMC", tmp_path)), None)
    run = Run("plain", 0, tmp_path / "w.pth", tmp_path / "run", tmp_path / "r.json")
    (tmp_path / "run.py").write_text(
        trial.run_config(tmp_path / "amc_default.py", run, run.folder, trial.steps)
    )
    settings = trial.settings(tmp_path / "run.py")
    written = str(run.folder / "pointing_game.json")
    assert settings["val_evaluator"][1]["out_file"] == written
    assert trial.results(run.folder) is None
    run.folder.mkdir()
    Path(written).write_text('{"accuracy": 0.25}')
    assert benchmark.accuracy(trial.results(run.folder)) == 25
