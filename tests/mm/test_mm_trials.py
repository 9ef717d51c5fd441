"""Plugins put into a user's config of MMDetection: the lines, the model, the runs' settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from derived_configs import derive, derived_models, inserted
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_checkpoint

from mm_plugins import AMCMixin, BatchFormerBBoxHead, BatchFormerMixin
from mm_plugins.trials import MMDetectionTrials
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

ROOT = Path(__file__).resolve().parents[2]
RCNN = """
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
model = dict(
    backbone=dict(depth=18, frozen_stages=1, init_cfg=None),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=7),
    ),
)
"""
DATA = """
metainfo = dict(
    classes=("person", "disk", "square", "triangle", "star", "ring", "cross"))
data_root = "{root}/"
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
"""
DEEP = '_base_ = "mmdet::{name}"\nmodel = dict(backbone=dict(init_cfg=None))\n'
# What takes a moment to count
SMALL_TEST = """
model["test_cfg"] = dict(rpn=dict(nms_pre=8, max_per_img=8))
test_dataloader = dict(dataset=dict(pipeline=[dict(type="Resize", scale=(64, 64))]))
"""


@pytest.fixture
def make(tmp_path: Path, drawn_coco: Path) -> Callable[..., Any]:
    def make(
        text: str = RCNN, steps: int | None = None, more: str = "", iou_type: str = "bbox"
    ) -> Any:
        config = tmp_path / "mine.py"
        config.write_text(text + DATA.format(root=drawn_coco) + more)
        return MMDetectionTrials(str(config), steps, iou_type)

    return make


def build(trial: Any, path: Path) -> torch.nn.Module:
    return MODELS.build(trial._read(str(path)).model)


def test_derived_models_have_their_plugin_and_begin_with_the_same_weights(make, tmp_path):
    models = derived_models(make(), tmp_path, build, load_checkpoint, "state_dict")
    blocks = [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]
    assert set(inserted(models["triplet_attention"])) == {f"{b}.triplet_attention" for b in blocks}
    assert set(inserted(models["ida"])) == {f"{b}.ida" for b in blocks[5::2]}
    assert len(inserted(models["timm_eca"])) == len(blocks)
    assert isinstance(models["batchformer_v1"].roi_head.bbox_head, BatchFormerBBoxHead)
    assert isinstance(models["amc"], AMCMixin)


def test_control_begins_as_the_plain_detector_and_is_counted(make, tmp_path):
    trial, path = make(more=SMALL_TEST), (tmp_path / "control").with_suffix(".py")
    path.write_text(trial.derive(control_of_width(3, (5,))))
    model = build(trial, path)
    assert set(inserted(model)) == {f"layer4.{b}.block_plugin" for b in (0, 1)}
    assert {
        m.layers[0].out_channels for m in model.modules() if isinstance(m, PlainConvolutions)
    } == {3}
    cost = trial.cost(path)
    assert cost.parameters == trial.check(path) and cost.flops > 0


def test_only_the_plugins_lines_differ(make, tmp_path):
    trial, out = make(), tmp_path / "out"
    derive(trial, ["simam"], out)
    plain, simam = (trial.settings(config_path(trial, out, n)) for n in ("plain", "simam"))
    assert {line.split()[1] for line in difference(plain, simam).splitlines()} == {
        *("model.backbone.type:", "model.backbone.plugins:", "model.backbone.frozen_stages:"),
        "custom_imports.imports:",
    }
    assert simam["model"]["backbone"]["frozen_stages"] == 0  # layer1 trains


def test_position_is_that_of_the_backbone(make):
    (simam,) = read_plugins(["simam"])
    deep = make(DEEP.format(name="retinanet/retinanet_r50_fpn_1x_coco.py"))._lines(simam)
    assert deep["backbone"]["plugins"][0]["position"] == "after_conv3"
    assert "type" not in deep["backbone"]
    shipped = ROOT / "configs/mm/triplet_attention/retinanet_mobilenetv2-triplet_fpn_1x_coco.py"
    mobile = make(f"_base_ = {str(shipped)!r}\n")
    (some,) = read_plugins(["simam@4"])
    backbone = mobile._lines(some)["backbone"]
    stages = (False, False, False, True, True, False, False)  # of stride 16
    layer = {"type": "SimAM", "warm_start": True}
    new = {"cfg": layer, "position": "after_linear_conv", "stages": stages}
    assert backbone["plugins"][1:] == [new]  # after the config's own
    other = make('_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"\n')
    with pytest.raises(ValueError, match="'SwinTransformer' takes no block plugins"):
        other.derive(simam)


def test_batchformer_v2_goes_into_a_detr_and_v1_does_not(make, tmp_path):
    trial = make(DEEP.format(name="detr/detr_r50_8xb2-150e_coco.py"))
    first, second, amc = read_plugins(["batchformer_v1", "batchformer_v2", "amc"])
    lines = trial._lines(second)
    assert lines == {"type": "PluginDETR", "batchformer": {}}
    assert issubclass(MODELS.get(lines["type"]), BatchFormerMixin)
    assert trial._lines(amc)["type"] == "PluginDETR"
    with pytest.raises(ValueError, match="'DETR' has no bbox_head"):
        trial.derive(first)


def test_plugins_that_do_not_fit_are_told_together(make):
    trial = make()
    with pytest.raises(ValueError, match="--with batchformer_v2: model.type: 'FasterRCNN' takes"):
        derive_configs(trial, read_plugins(["batchformer_v2", "ida"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("val_evaluator = dict(_delete_=True, type='VOCMetric')", "must have a CocoMetric"),
        ("train_cfg = dict(max_epochz=3)", "train_cfg.max_epochz"),
        ("train_dataloader = None", "has no train_dataloader"),
    ],
)
def test_config_that_cannot_be_tried_is_refused(make, more, message):
    with pytest.raises(ValueError, match=message):
        make(more=more)


def test_own_variant_keeps_its_settings_and_must_be_as_long(make, tmp_path):
    trial, out = make(steps=60), tmp_path / "out"
    mine, longer = tmp_path / "own.py", tmp_path / "longer.py"
    hook = "custom_hooks = [dict(type='EMAHook')]"
    mine.write_text(f"_base_ = 'mine.py'\n{hook}\noptim_wrapper = dict(optimizer=dict(lr=0.5))")
    longer.write_text("_base_ = 'mine.py'\ntrain_cfg = dict(max_epochs=24)")
    derive(trial, [f"own={mine}"], out)
    run = Run("own", 0, tmp_path / "w.pth", tmp_path / "run", tmp_path / "r.json")
    path = tmp_path / "run.py"
    path.write_text(trial.run_config(config_path(trial, out, "own"), run, tmp_path, 60))
    settings = trial.settings(path)
    assert settings["optim_wrapper"]["optimizer"]["lr"] == 0.5
    assert [hook["type"] for hook in settings["custom_hooks"]] == ["EMAHook", "ExactResumeHook"]
    with pytest.raises(ValueError, match=r"longer.py: train_cfg must be as in .*mine.py"):
        trial.derive(*read_plugins([f"x={longer}"]))


def test_functional_entropy_is_for_detectors_that_read_a_text(make):
    (entropy,) = read_plugins(["functional_entropy"])
    dino = "mmdet::grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py"
    lines = make(f"_base_ = {dino!r}\n")._lines(entropy)
    assert lines == {"type": "PluginGroundingDINO", "functional_entropy": {}}
    with pytest.raises(ValueError, match="'FasterRCNN' takes no such plugin; these do: GLIP, Gro"):
        make()._lines(entropy)


def test_what_is_compared_must_be_evaluated(make, tmp_path):
    with pytest.raises(ValueError, match="--iou-type segm: is not in val_evaluator.metric, 'bbox'"):
        make(iou_type="segm")
    masks = make(more='val_evaluator["metric"] = ["bbox", "segm"]', iou_type="segm")
    for kind in ("bbox", "segm"):
        (tmp_path / f"results.{kind}.json").touch()
    assert masks.results(tmp_path).name == "results.segm.json"


def test_runs_of_other_length_count_iterations_and_scale_the_schedule(make, tmp_path):
    trial, out = make(steps=60), tmp_path / "out"
    labels = derive(trial, ["amc"], out)
    plan = Plan({}, "", labels, trial.steps, 1, {}, 2, 3)
    settings = {}
    for run in plan.runs(out):
        path = tmp_path / f"{run.name}.py"
        base = config_path(trial, out, run.label)
        path.write_text(trial.run_config(base, run, run.folder, plan.steps))
        settings[run.label] = trial.settings(path)
    one = settings["plain"]
    loop = {"type": "IterBasedTrainLoop", "max_iters": 60, "val_interval": 60}
    assert one["train_cfg"] == loop
    steps = one["param_scheduler"][1]
    assert (steps["end"], steps["milestones"], steps["by_epoch"]) == (60, [40, 55], False)
    assert one["load_from"] == settings["amc"]["load_from"] == str(out / "initial/seed0.pth")
    assert one["val_evaluator"]["outfile_prefix"].endswith("runs/plain-seed0/results")
    assert one["custom_hooks"] == [{"type": "ExactResumeHook"}]
    changed = {line.split()[1] for line in difference(one, settings["amc"]).splitlines()}
    folders = {"work_dir:", "val_evaluator.outfile_prefix:", "test_evaluator.outfile_prefix:"}
    of_plugin = {name for name in changed - folders if not name.startswith("model.")}
    assert of_plugin == {"custom_imports.imports:"}


def test_own_length_keeps_the_schedule_and_evaluates_at_its_end(make, tmp_path):
    trial = make(more='test_evaluator = dict(type="CocoMetric", format_only=True)')
    assert trial.steps == 12 * 3  # epochs of six images, two at a time
    run = Run("plain", 0, tmp_path / "w.pth", tmp_path / "run", tmp_path / "r.json")
    path = tmp_path / "run.py"
    path.write_text(trial.run_config(tmp_path / "mine.py", run, tmp_path, trial.steps))
    settings = trial.settings(path)
    plain = trial.settings(tmp_path / "mine.py")
    assert settings["param_scheduler"] == plain["param_scheduler"]
    assert settings["train_cfg"] == {**plain["train_cfg"], "val_interval": 12}
    assert settings["test_evaluator"] == settings["val_evaluator"]
    # MMDetection's --resume drops the initial weights
    assert "--resume" not in trial.command(path, tmp_path, trial.steps)
    (tmp_path / "epoch_1.pth").touch()
    assert "--resume" in trial.command(path, tmp_path, trial.steps)
    (tmp_path / "epoch_12.pth").touch()
    assert trial.command(path, tmp_path, trial.steps)[1].endswith("test_mmdet.py")
    # What a budget has shortened
    path.write_text(trial.run_config(tmp_path / "mine.py", run, tmp_path, 12))
    loop = {"type": "IterBasedTrainLoop", "max_iters": 12, "val_interval": 12}
    assert trial.settings(path)["train_cfg"] == loop
    assert trial.weights(tmp_path, 12) is None
