"""Plugins put into a user's yaml config: the lines, the model, the runs' settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from derived_configs import derive, derived_models, inserted
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2_plugins.attention_mask_consistency import AMCGeneralizedRCNN
from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.trials import Detectron2Trials
from plugin_core import BatchFormer
from plugin_core.training.trials import (
    PlainConvolutions,
    Plan,
    Run,
    config_path,
    derive_configs,
    difference,
    read_plugins,
)
from plugin_core.training.trials.control import control_of_width

SMALL = """
_BASE_: "model_zoo://COCO-Detection/{base}_R_50_FPN_1x.yaml"
MODEL:
  WEIGHTS: ""
  BACKBONE: {{FREEZE_AT: 2}}
  RESNETS: {{DEPTH: 18, RES2_OUT_CHANNELS: 64}}
  FPN: {{OUT_CHANNELS: 16}}
  RPN: {{POST_NMS_TOPK_TEST: 8}}
  RPN: {{POST_NMS_TOPK_TEST: 8}}
  ROI_HEADS: {{NUM_CLASSES: 7}}
  RETINANET: {{NUM_CLASSES: 7, NUM_CONVS: 1}}
  ROI_BOX_HEAD: {{FC_DIM: 32}}
DATASETS: {{TRAIN: ["trials_train"], TEST: ["trials_val"]}}
SOLVER: {{MAX_ITER: 100, STEPS: [60, 90], WARMUP_ITERS: 10, IMS_PER_BATCH: 2}}
"""
# What takes a moment to count
SMALL_TEST = "INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}"


@pytest.fixture
def make(tmp_path: Path, drawn_coco: Path):
    def make(base: str = "faster_rcnn", more: str = "", *arguments: Any) -> Any:
        config = tmp_path / "mine.yaml"
        config.write_text(SMALL.format(base=base) + more)
        datasets = [
            (f"trials_{part}", f"{drawn_coco}/annotations/instances_{part}2017.json", str(folder))
            for part in ("train", "val")
            for folder in [drawn_coco / f"{part}2017"]
        ]
        for name, _, _ in datasets:
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
        return Detectron2Trials(str(config), datasets, *(arguments or [None]))

    yield make
    for part in ("train", "val"):
        if f"trials_{part}" in DatasetCatalog:
            DatasetCatalog.remove(f"trials_{part}")
            MetadataCatalog.remove(f"trials_{part}")


def build(trial: Any, path: Path) -> torch.nn.Module:
    cfg = trial.settings(path)
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def load(model: torch.nn.Module, file: str) -> None:
    PluginCheckpointer(model).load(file)


def test_derived_models_have_their_plugin_and_begin_with_the_same_weights(make, tmp_path):
    models = derived_models(make(), tmp_path, build, load, "model")
    blocks = [f"res{stage}.{block}" for stage in (2, 3, 4, 5) for block in (0, 1)]
    triplet = inserted(models["triplet_attention"])
    assert set(triplet) == {f"{b}.triplet_attention" for b in blocks}
    assert all(module.plugin_name == "triplet_attention" for module in triplet.values())
    assert set(inserted(models["ida"])) == {f"{b}.ida" for b in blocks[5::2]}
    assert set(inserted(models["timm_eca"])) == {f"{b}.timm_eca" for b in blocks}
    assert any(isinstance(m, BatchFormer) for m in models["batchformer_v1"].modules())
    assert isinstance(models["amc"], AMCGeneralizedRCNN)


def test_control_begins_as_the_plain_detector_and_is_counted(make, tmp_path):
    trial, path = make(more=SMALL_TEST), (tmp_path / "control").with_suffix(".yaml")
    path.write_text(trial.derive(control_of_width(3, (5,))))
    model = build(trial, path)
    assert set(inserted(model)) == {f"res5.{b}.plain_convolutions" for b in (0, 1)}
    assert {
        m.layers[0].out_channels for m in model.modules() if isinstance(m, PlainConvolutions)
    } == {3}
    cost = trial.cost(path)
    assert cost.parameters == trial.check(path) and cost.flops > 0


def test_only_the_plugins_lines_differ(make, tmp_path):
    trial, out = make(), tmp_path / "out"
    derive(trial, ["simam", "ida"], out)
    plain, simam, ida = (
        trial.settings(config_path(trial, out, n)) for n in ("plain", "simam", "ida")
    )
    changed = {line.split()[1] for line in difference(plain, simam).splitlines()}
    assert changed == {
        *("MODEL.BACKBONE.NAME:", "MODEL.BACKBONE.FREEZE_AT:", "MODEL.RESNETS.PLUGINS:")
    }
    assert simam.MODEL.BACKBONE.FREEZE_AT == 1  # res2 trains
    assert ida.MODEL.BACKBONE.FREEZE_AT == 2


def test_plugins_that_do_not_fit_are_told_together(make):
    trial = make("retinanet")
    plugins = read_plugins(["batchformer_v1", "batchformer_v2", "triplet_attention"])
    with pytest.raises(ValueError, match=r"--with batchformer_v1: .*has none\n--with batchf"):
        derive_configs(trial, plugins)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('DATASETS: {TRAIN: ["trials_train"], TEST: []}', "DATASETS.TEST: must name one"),
        ('DATASETS: {TEST: ["trials_test"]}', "is registered as 'trials_test'"),
        ("SOLVER: {STEPSS: [1]}", "SOLVER.STEPSS"),
    ],
)
def test_config_that_cannot_be_tried_is_refused(make, more, message):
    with pytest.raises(ValueError, match=message):
        make(more=more)


def test_own_variant_keeps_its_settings_and_must_be_as_long(make, tmp_path):
    trial, out = make("faster_rcnn", "", 50), tmp_path / "out"
    mine, longer = tmp_path / "own.yaml", tmp_path / "longer.yaml"
    mine.write_text("_BASE_: mine.yaml\nSOLVER: {STEPS: [20], BASE_LR: 0.5}")
    longer.write_text("_BASE_: mine.yaml\nSOLVER: {MAX_ITER: 200}")
    derive(trial, [f"faster-lr={mine}"], out)
    base = config_path(trial, out, "faster-lr")
    run = Run("faster-lr", 0, tmp_path / "w.pth", tmp_path / "run", tmp_path / "r.json")
    (tmp_path / "run.yaml").write_text(trial.run_config(base, run, tmp_path, 50))
    solver = trial.settings(tmp_path / "run.yaml").SOLVER
    assert (solver.BASE_LR, tuple(solver.STEPS), solver.MAX_ITER) == (0.5, (10,), 50)
    with pytest.raises(ValueError, match=r"--with x: .*longer.yaml: SOLVER.MAX_ITER must be 100"):
        derive_configs(trial, read_plugins([f"x={longer}"]))


def test_what_is_compared_must_be_found_by_the_detector(make):
    with pytest.raises(ValueError, match="--iou-type segm: .* MODEL.MASK_ON is False"):
        make("faster_rcnn", "", None, "segm")


def test_runs_differ_in_their_seed_weights_and_folder_and_scale_the_schedule(make, tmp_path):
    trial, out = make("faster_rcnn", "", 50), tmp_path / "out"
    labels = derive(trial, ["amc"], out)
    plan = Plan({}, "", labels, trial.steps, 2, {}, 2, 3)
    cfgs = {}
    for run in plan.runs(out):
        path = tmp_path / f"{run.name}.yaml"
        base = config_path(trial, out, run.label)
        path.write_text(trial.run_config(base, run, run.folder, plan.steps))
        cfgs[run.name] = trial.settings(path)
    one, other = cfgs["plain-seed1"], cfgs["amc-seed1"]
    solver = one.SOLVER
    assert (solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS) == (50, (30, 45), 5)
    assert one.SEED == other.SEED == 1
    assert one.MODEL.WEIGHTS == other.MODEL.WEIGHTS == str(out / "initial" / "seed1.pth")
    changed = {line.split()[1] for line in difference(one, other).splitlines()}
    assert changed == {"MODEL.META_ARCHITECTURE:", "OUTPUT_DIR:"}
    measured = yaml.safe_load(trial.run_config(base, None, out, 5))
    assert measured["DATASETS"] == {"TEST": []} and measured["SOLVER"]["MAX_ITER"] == 5


def test_whole_schedule_stays_as_it_is(make, tmp_path):
    trial = make()
    run = Run("plain", 0, tmp_path / "w.pth", tmp_path / "run", tmp_path / "r.json")
    settings = yaml.safe_load(trial.run_config(tmp_path / "mine.yaml", run, tmp_path, 100))
    assert settings["SOLVER"] == {"CHECKPOINT_PERIOD": 25}  # Detectron2's 5000 would keep none
