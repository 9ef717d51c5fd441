"""benchmarks/long_tail.py: what it writes of runs that are done, and the commands it gives."""

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
    path = ROOT / "benchmarks" / "long_tail.py"
    spec = importlib.util.spec_from_file_location("long_tail_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
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
    args = argparse.Namespace(seeds=[0, 1], work_dir=tmp_path / "work")
    val = annotations({1: 2, 2: 2, 3: 2})
    for split, content in (("train", annotations({1: 9, 2: 3, 3: 1})), ("val", val)):
        path = benchmark.annotations(args.work_dir, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for name in benchmark.DETECTORS:
        for seed in args.seeds:
            # All of class 1, of class 2 all with the first seed and else none, and none of class 3
            found = [1, 2] if seed == 0 else [1]
            results = [{**a, "score": 0.9} for a in val["annotations"] if a["category_id"] in found]
            folder = benchmark.folder(args.work_dir, name, seed)
            folder.mkdir(parents=True)
            (folder / "val.bbox.json").write_text(json.dumps(results))
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


def test_a_detector_is_trained_and_evaluated_in_its_folder_on_the_same_images(benchmark):
    work_dir = Path("work")
    for name in benchmark.DETECTORS:
        (train, before), (test, results) = benchmark.steps(name, 1, work_dir)
        out = benchmark.folder(work_dir, name, 1)
        assert before == results and results.parent == out
        assert "randomness.seed=1" in train and "--resume" in train
        last = benchmark.DETECTORS[name][1]["train_cfg.max_iters"]
        assert f"train_cfg.max_iters={last}" in train
        assert f"{out}/iter_{last}.pth" in test
        assert f"test_evaluator.outfile_prefix={out}/val" in test
        for command, part in ((train, "train"), (test, "test")):
            assert f"{part}_dataloader.dataset.data_root=work/coco/" in command
            assert (ROOT / command[0]).is_file() and (ROOT / command[1]).is_file()
            assert command[command.index("--work-dir") + 1] == str(out)


def test_with_batchformer_nothing_else_changes(benchmark):
    for plain, related in (
        ("Faster R-CNN", "Faster R-CNN, BatchFormer"),
        ("Deformable DETR", "Deformable DETR, BatchFormerV2"),
    ):
        config, options = benchmark.DETECTORS[plain]
        other_config, other_options = benchmark.DETECTORS[related]
        if config == other_config:
            assert other_options == {**options, **benchmark.V1}
        else:
            assert other_options == options
            folder = ROOT / benchmark.CONFIGS
            settings, others = (
                Config.fromfile(folder / name).to_dict() for name in (config, other_config)
            )
            model = others["model"]
            assert model.pop("batchformer")
            model["type"] = model["type"].removeprefix("Plugin")
            assert others == settings
