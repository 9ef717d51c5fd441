"""benchmarks/context_bias.py: what it writes of runs that are done, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import try_plugins
from detectron2.config import get_cfg

from d2_plugins.config import add_plugin_config, merge_config
from plugin_core.training.trials import read_plugins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = ROOT / "benchmarks" / "context_bias.py"
    spec = importlib.util.spec_from_file_location("context_bias_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["benchmarks/context_bias.py"])
    return module


def test_table_has_mean_and_spread_over_the_seeds_and_findings_stay(
    benchmark, monkeypatch, tmp_path, capsys
):
    def measured(results: Path, labels: Path) -> dict[str, float]:
        label, _, seed = results.stem.partition("-seed")
        (trial,) = (t for t in benchmark.TRIALS if results.parts[-3] == f"trial_{t}")
        assert labels == tmp_path / "work" / f"{trial}_50" / "annotations"
        place = [*benchmark.TRIALS[trial].values()].index(label)
        return dict.fromkeys(benchmark.NUMBERS, 10.0 * place + 2 * int(seed))

    monkeypatch.setattr(benchmark, "measured", measured)
    args = argparse.Namespace(
        seeds=2, jobs=1, steps=None, work_dir=tmp_path / "work", results=tmp_path / "results"
    )
    path = tmp_path / "results" / "context_bias.md"
    benchmark.write(args)
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    benchmark.write(args)
    text = path.read_text()
    assert text.endswith(f"{benchmark.study.FINDINGS}\nWritten by hand.\n")
    rows = [line for line in text.splitlines() if line.startswith("| clear: IDA in stages ")]
    assert rows[0].count("11.0 ± 1.4") == len(benchmark.NUMBERS)
    assert [row.split("|")[2].strip() for row in rows[1:]] == ["0", "1"]
    runs = json.loads((tmp_path / "results" / "context_bias.json").read_text())["runs"]
    assert runs["ambiguous: plain"] == {
        "0": dict.fromkeys(benchmark.NUMBERS, 0.0),
        "1": dict.fromkeys(benchmark.NUMBERS, 2.0),
    }


@pytest.mark.parametrize("name", ["clear", "ambiguous"])
def test_detectors_are_variants_of_the_trial_and_differ_in_their_images_or_their_ida(
    benchmark, tmp_path, name
):
    args = argparse.Namespace(seeds=3, jobs=2, steps=None, work_dir=tmp_path)
    benchmark.write_configs(tmp_path)
    trial = try_plugins.parse_args(benchmark.trial_command(name, args, 2)[1:])
    assert trial.seeds == 2
    plugins = read_plugins(trial.plugins)
    labels = [*benchmark.TRIALS[name].values()]
    assert ["plain", *(plugin.label for plugin in plugins)] == labels
    cfgs = {}
    for config in (trial.config, *(plugin.config for plugin in plugins if plugin.config)):
        cfg = cfgs[Path(config).stem] = get_cfg()
        add_plugin_config(cfg)
        merge_config(cfg, config)
        assert cfg.DATASETS.TEST == ("synthetic_val",) and cfg.MODEL.RESNETS.DEPTH == 50
    folders = {dataset: Path(images).parent.name for dataset, _, images in trial.register_coco}
    assert folders["synthetic_val"] == f"{name}_50"
    trains = {label: folders[cfg.DATASETS.TRAIN[0]] for label, cfg in cfgs.items()}
    for label, folder in trains.items():
        assert folder == f"{name}_{label.partition('bias_')[2] or 90}"
    in_stages = {label for label, cfg in cfgs.items() if cfg.MODEL.RESNETS.PLUGINS}
    heads = {label for label, cfg in cfgs.items() if cfg.MODEL.ROI_BOX_HEAD.NAME == "IDABoxHead"}
    assert in_stages == {"ida_grouped", "ida_full"}
    assert heads == {label for label in labels if label.endswith("head")}
