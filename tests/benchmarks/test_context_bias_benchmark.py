"""benchmarks/context_bias.py: what it writes of runs that are done, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import try_plugins
import yaml
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
    labels = list(benchmark.DETECTORS.values())

    def measured(results: Path, work_dir: Path) -> dict[str, float]:
        label, _, seed = results.stem.partition("-seed")
        assert results.parent == work_dir / "trial" / "results"
        return dict.fromkeys(benchmark.NUMBERS, 10.0 * labels.index(label) + 2 * int(seed))

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
    rows = [line for line in text.splitlines() if line.startswith("| IDA in stages ")]
    assert rows[0].count("21.0 ± 1.4") == len(benchmark.NUMBERS)
    assert [row.split("|")[2].strip() for row in rows[1:]] == ["0", "1"]
    runs = json.loads((tmp_path / "results" / "context_bias.json").read_text())["runs"]
    assert runs["plain"] == {
        "0": dict.fromkeys(benchmark.NUMBERS, 0.0),
        "1": dict.fromkeys(benchmark.NUMBERS, 2.0),
    }


def test_detectors_are_variants_of_the_trial_and_one_alone_trains_on_unbiased_images(
    benchmark, tmp_path
):
    args = argparse.Namespace(seeds=3, jobs=2, steps=None, work_dir=tmp_path)
    for name, content in benchmark.CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    trial = try_plugins.parse_args(benchmark.trial_command(args)[1:])
    plugins = read_plugins(trial.plugins)
    assert ["plain", *(plugin.label for plugin in plugins)] == [*benchmark.DETECTORS.values()]
    cfgs = {}
    for config in (trial.config, *(plugin.config for plugin in plugins if plugin.config)):
        cfg = cfgs[Path(config).stem] = get_cfg()
        add_plugin_config(cfg)
        merge_config(cfg, config)
        assert cfg.DATASETS.TEST == ("synthetic_val",)
    folders = {name: images for name, _, images in trial.register_coco}
    trains = {name: folders[cfg.DATASETS.TRAIN[0]] for name, cfg in cfgs.items()}
    unbiased = str(tmp_path / "coco_unbiased" / "train2017")
    assert [name for name, images in trains.items() if images == unbiased] == ["unbiased"]
    assert not cfgs["plain"].MODEL.RESNETS.PLUGINS and not cfgs["ida_head"].MODEL.RESNETS.PLUGINS
    assert cfgs["ida_head"].MODEL.ROI_BOX_HEAD.NAME == "IDABoxHead"
