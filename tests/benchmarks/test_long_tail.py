"""benchmarks/long_tail.py: what it writes of runs that are done, and the commands it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import try_plugins

from mm_plugins.trials import MMDetectionTrials
from plugin_core.training.trials import read_plugins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    path = ROOT / "benchmarks" / "long_tail.py"
    spec = importlib.util.spec_from_file_location("long_tail_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["benchmarks/long_tail.py"])
    return module


def annotations(counts: dict[int, int]) -> dict:
    """A COCO-format file with an image for each object, by the classes' numbers of objects."""
    objects = [category_id for category_id, count in counts.items() for _ in range(count)]
    return {
        "images": [{"id": i, "width": 64, "height": 64} for i in range(len(objects))],
        "categories": [{"id": c, "name": f"class{c}"} for c in counts],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i,
                "category_id": category_id,
                "bbox": [8, 8, 32, 32],
                "area": 1024,
                "iscrowd": 0,
            }
            for i, category_id in enumerate(objects)
        ],
    }


def test_classes_fall_into_thirds_by_their_number_of_train_objects(benchmark):
    content = annotations({1: 3, 2: 20, 3: 0, 4: 10, 5: 7, 6: 50, 7: 2})
    assert benchmark.groups(content) == {
        **dict.fromkeys((6, 2, 4), "frequent"),
        **dict.fromkeys((5, 1), "common"),
        **dict.fromkeys((7, 3), "rare"),
    }


def test_table_has_mean_and_spread_of_each_third_and_findings_stay(benchmark, tmp_path, capsys):
    args = argparse.Namespace(
        seeds=2, jobs=1, steps=None, work_dir=tmp_path / "work", results=tmp_path / "results"
    )
    val = annotations({1: 2, 2: 2, 3: 2})
    for split, content in (("train", annotations({1: 9, 2: 3, 3: 1})), ("val", val)):
        path = benchmark.annotations(args.work_dir, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for trial, label in benchmark.DETECTORS.values():
        for seed in range(2):
            # All of class 1, of class 2 all with the first seed and else none, and none of class 3
            found = [1, 2] if seed == 0 else [1]
            results = [{**a, "score": 0.9} for a in val["annotations"] if a["category_id"] in found]
            folder = args.work_dir / f"trial_{trial}" / "results"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{label}-seed{seed}.json").write_text(json.dumps(results))
    path = tmp_path / "results" / "long_tail.md"
    benchmark.write(args)
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    benchmark.write(args)

    text = path.read_text()
    assert text.endswith(f"{benchmark.study.FINDINGS}\nWritten by hand.\n")
    rows = [line for line in text.splitlines() if line.startswith("| Deformable DETR ")]
    cells = [[cell.strip() for cell in row.split("|")[2:]] for row in rows]
    thirds = ["100.0 ± 0.0", "50.0 ± 70.7", "0.0 ± 0.0"]
    assert cells[0][:4] == ["50.0 ± 23.6", *thirds]
    assert cells[1][:5] == ["0", "66.7", "100.0", "100.0", "0.0"]
    runs = json.loads(path.with_suffix(".json").read_text())["runs"]
    assert runs["Faster R-CNN"]["1"]["AP common"] == runs["Faster R-CNN"]["1"]["class2"] == 0


def test_detectors_are_variants_of_trials_on_the_drawn_images(benchmark, tmp_path, drawn_coco):
    args = argparse.Namespace(seeds=3, jobs=2, steps=None, work_dir=tmp_path)
    (tmp_path / "coco").symlink_to(drawn_coco)
    for name, (config, options, plugin) in benchmark.TRIALS.items():
        own = {**options, **benchmark.data_options(tmp_path)}
        benchmark.study.write_config(tmp_path / f"{name}.py", benchmark.CONFIGS / config, own)
        words = try_plugins.parse_args(benchmark.trial_command(name, args)[1:])
        assert (words.config, words.out) == (f"{tmp_path / name}.py", tmp_path / f"trial_{name}")
        assert (name, plugin) in benchmark.DETECTORS.values() and words.plugins == [plugin]
        trial = MMDetectionTrials(words.config, None)
        assert trial.steps == options["train_cfg.max_iters"]
        derived = tmp_path / f"{plugin}.py"
        derived.write_text(trial.derive(*read_plugins([plugin])))
        assert trial.check(derived) > trial.check(tmp_path / f"{name}.py")
