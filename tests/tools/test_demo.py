"""The demo: one small detector in both frameworks, its command lines, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import demo
import make_synthetic_coco
import pytest
import try_plugins
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def drawing(monkeypatch) -> dict[str, Any]:
    """What the demo asks tools/make_synthetic_coco.py to draw."""
    options: dict[str, Any] = {}

    def note(**given: Any) -> make_synthetic_coco.Summary:
        options.update(given)
        return make_synthetic_coco.Summary(0, 0, 0, given["out"])

    monkeypatch.setattr(make_synthetic_coco, "make_dataset", note)
    assert make_synthetic_coco.main(list(demo.DRAW[1:])) == 0
    return options


def test_both_frameworks_train_the_same_detector_on_the_same_scenes(drawing):
    config = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from detectron2.modeling import build_model
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    from d2_plugins import add_plugin_config, merge_config

    register_all_modules(init_default_scope=False)
    yaml, python = (str(ROOT / trial.config) for trial in demo.TRIALS)
    cfg = config.get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, yaml, ["MODEL.DEVICE", "cpu"])
    other = Config.fromfile(python)
    models = build_model(cfg), MODELS.build({"_scope_": "mmdet", **other.model})
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    assert sizes[0] == sizes[1]
    solver, optimizer = cfg.SOLVER, other.optim_wrapper.optimizer
    assert solver.OPTIMIZER == optimizer.type.upper()
    assert (solver.BASE_LR, solver.WEIGHT_DECAY) == (optimizer.lr, optimizer.weight_decay)
    assert solver.CLIP_GRADIENTS.CLIP_VALUE == other.optim_wrapper.clip_grad.max_norm
    assert solver.IMS_PER_BATCH == other.train_dataloader.batch_size
    assert solver.MAX_ITER == other.train_cfg.max_iters
    warmup, schedule = other.param_scheduler
    assert (solver.WARMUP_ITERS, solver.STEPS) == (warmup.end, tuple(schedule.milestones))
    anchors = other.model.rpn_head.anchor_generator
    assert sum(cfg.MODEL.ANCHOR_GENERATOR.SIZES, []) == anchors.base_sizes
    assert (cfg.INPUT.MAX_SIZE_TRAIN, *cfg.INPUT.MIN_SIZE_TRAIN) == other.scale
    for loader in (other.train_dataloader, other.val_dataloader):
        assert Path(loader.dataset.data_root) == demo.SCENES
    names = [category.name for category in make_synthetic_coco.THINGS][: drawing["classes"]]
    assert len(names) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert tuple(names) == other.metainfo.classes


@pytest.mark.parametrize("trial", demo.TRIALS, ids=lambda trial: trial.framework)
def test_command_lines_are_those_of_the_tools(trial, drawing):
    tool, *words = trial.command
    assert (ROOT / tool).name == "try_plugins.py" and (ROOT / demo.DRAW[0]).is_file()
    args = try_plugins.parse_args(words)
    assert (args.plugins, args.seeds, args.out) == (["triplet_attention"], 1, trial.folder)
    assert (ROOT / args.config).is_file()
    assert drawing["out"] == demo.SCENES
    assert all(Path(file).is_relative_to(demo.SCENES) for _, file, _ in args.register_coco)


def finished_trial(trial: demo.Trial, scenes: Path) -> None:
    """Write what a trial leaves whose plain detector finds everything, and the other nothing."""
    annotations = scenes / "annotations" / "instances_val2017.json"
    objects = json.loads(annotations.read_text())["annotations"]
    perfect = [
        {**{key: thing[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for thing in objects
    ]
    runs = []
    for label, found in (("plain", perfect), ("triplet_attention", [])):
        results = trial.folder / "results" / f"{label}-seed0.json"
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(found))
        finished = {"AP": 0.0, "seconds_a_step": 0.5}
        runs.append({"label": label, "results": f"results/{results.name}", "finished": finished})
    parameters = {"plain": 1000, "triplet_attention": 1010}
    plan = {"annotations": str(annotations), "parameters": parameters, "runs": runs}
    (trial.folder / "plan.json").write_text(json.dumps(plan))


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[Any]:
    """The demo in a folder of its own; commands are noted and not run."""
    monkeypatch.chdir(tmp_path)
    noted: list[Any] = []
    monkeypatch.setattr(demo, "run", noted.append)
    return noted


def test_table_has_a_trained_row_for_each_detector_and_pictures_are_drawn(
    commands, drawn_coco, capsys
):
    demo.SCENES.parent.mkdir(parents=True)
    demo.SCENES.symlink_to(drawn_coco)
    for trial in demo.TRIALS:
        finished_trial(trial, demo.SCENES)
    demo.main()
    assert commands == [trial.command for trial in demo.TRIALS]  # scenes are there
    lines = (demo.OUT / "results.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows == [
        [trial.framework, *cells]
        for trial in demo.TRIALS
        for cells in (
            ["plain", "1,000", "0.50", "100.0", "100.0"],
            ["triplet attention", "1,010", "0.50", "0.0", "0.0"],
        )
    ]
    printed = capsys.readouterr().out
    for trial in demo.TRIALS:
        assert f"{trial.folder}/comparison/report.html" in printed
        pictures = sorted((trial.folder / "pictures").iterdir())
        assert len(pictures) == 3
        with Image.open(pictures[0]) as picture:
            assert picture.width > 3 * 300


def test_scenes_are_drawn_first_where_they_are_not_there(commands, monkeypatch):
    monkeypatch.setattr(
        demo, "finish", lambda trial: [[trial.framework, "plain", 1, 1.0, 1.0, 1.0]]
    )
    demo.OUT.mkdir(parents=True)
    demo.main()
    assert commands[0] == demo.DRAW


def test_failed_command_ends_the_demo_with_a_sentence(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="synthetic_coco.py, see above; the same command goes on"):
        demo.run(
            [str(ROOT / "tools/make_synthetic_coco.py"), "scenes", "--train", "0", "--val", "0"]
        )
    assert "give at least one image" in capfd.readouterr().err
