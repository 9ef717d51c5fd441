"""Detectors of MMDetection in Detectron2's trainer: what trains, and settings that are refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

import numpy as np
from bridged_detectors import (
    BACKBONE,
    DENSE_HEAD,
    PYRAMID,
    SMALL,
    mmdetection_checkpoint,
    use,
    wider,
)
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from d2_plugins import merge_config, mmdet_bridge
from d2_plugins.analysis import analyze
from d2_plugins.datasets import register_coco
from d2_plugins.mmdet_bridge import MMDetDetector, is_bridge, load_config
from d2_plugins.pixels import find_mismatches
from d2_plugins.preflight import check_config
from d2_plugins.trainer import PluginTrainer
from mm_plugins.analysis import analyze as analyze_in_mmdetection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/d2/MMDet-Detection").glob("*.yaml"))


@META_ARCH_REGISTRY.register()
class MyBridge(MMDetDetector):
    """Stands for a user's own, derived from the bridge."""


@META_ARCH_REGISTRY.register()
def build_my_detector(cfg):
    """Stands for a meta-architecture of the user's own that reads the nodes of the plugins."""
    return nn.Identity()


# -------------------------------------------------------------------------------------- the trainer


@pytest.fixture
def training(cfg: CfgNode, drawn_coco: Path, registered: None, tmp_path: Path) -> CfgNode:
    """Two steps on drawn scenes, and their evaluation."""
    for split in ("train", "val"):
        annotations = drawn_coco / f"annotations/instances_{split}2017.json"
        register_coco(f"drawn_{split}", str(annotations), str(drawn_coco / f"{split}2017"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("drawn_train",), ("drawn_val",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 1e-4
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.mark.parametrize("name", ["mask_rcnn", "detr"])
def test_detector_trains_evaluates_and_resumes(training, name, tmp_path):
    use(training, name)
    start = build_model(training)
    training.MODEL.WEIGHTS = mmdetection_checkpoint(start.detector, tmp_path / "epoch_1.pth")
    check_config(training, eval_only=False, resume=False)
    trainer = PluginTrainer(training)
    trainer.resume_or_load(resume=False)
    state = trainer.model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in start.state_dict().items())
    trainer.train()
    tasks = {"bbox", "segm"} if name == "mask_rcnn" else {"bbox"}
    assert set(trainer._last_eval_results) == tasks
    resumed = PluginTrainer(training)
    resumed.resume_or_load(resume=True)
    state = trainer.model.state_dict()
    assert resumed.start_iter == 2
    assert all(torch.equal(t, state[name]) for name, t in resumed.model.state_dict().items())
    assert not torch.equal(state["backbone.conv1.weight"], start.detector.backbone.conv1.weight)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_config_trains_a_step_and_evaluates(training, path, tmp_path):
    small = training.clone()
    merge_config(training, str(path))
    training.MODEL.MMDET.OVERRIDES = [*BACKBONE, *wider(*PYRAMID, *DENSE_HEAD)]
    for node in ("DATASETS", "INPUT", "SOLVER"):
        training[node] = small[node]
    training.SOLVER.MAX_ITER = 1
    check_config(training, eval_only=False, resume=False)
    trainer = PluginTrainer(training)
    trainer.train()
    logged = json.loads((tmp_path / "output/metrics.json").read_text().splitlines()[0])
    assert np.isfinite(logged["total_loss"]) and "bbox" in trainer._last_eval_results


def test_building_leaves_detectron2s_logging_as_it_is_and_prints_nothing(cfg, capfd):
    logger = logging.getLogger("detectron2")
    loggers = [logging.getLogger(), logger, logging.getLogger("fvcore")]
    before = [(list(lg.handlers), lg.level, lg.propagate) for lg in loggers]
    build_model(use(cfg, "retinanet"))
    assert [(list(lg.handlers), lg.level, lg.propagate) for lg in loggers] == before
    assert capfd.readouterr().out == ""


# --------------------------------------------------------------------------------------- the config


def test_overrides_come_from_a_file_and_from_the_command_line(cfg, tmp_path):
    file = tmp_path / "detr.yaml"
    file.write_text(
        "MODEL:\n"
        "  META_ARCHITECTURE: MMDetDetector\n"
        "  MMDET:\n"
        '    CONFIG: "mmdet::detr/detr_r50_8xb2-150e_coco.py"\n'
        '    OVERRIDES: ["model.num_queries=50", "model.backbone.dcn=None"]\n'
        "VERSION: 2\n"
    )
    merge_config(cfg, str(file))
    node = cfg.MODEL.MMDET
    model = load_config(node.CONFIG, node.OVERRIDES).model
    assert model.num_queries == 50 and model.backbone.dcn is None
    options = ["MODEL.MMDET.OVERRIDES", "['model.num_queries=7','model.backbone.strides=(1,2)']"]
    merge_config(cfg, options=options)
    model = load_config(node.CONFIG, node.OVERRIDES).model
    assert model.num_queries == 7 and model.backbone.strides == (1, 2)
    assert "dcn" not in model.backbone


def test_config_may_be_a_file_of_the_users(cfg, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'\nmodel = dict(num_queries=9)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.py").model.num_queries == 9


def test_cost_is_what_mmdetections_side_counts(cfg):
    use(cfg, "mask_rcnn")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    config = load_config(*SMALL["mask_rcnn"])
    assert analyze(cfg) == analyze_in_mmdetection(config, (64, 96))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"MODEL.MMDET.CONFIG": ""}, "MODEL.MMDET.CONFIG: names no config; expected a path, or"),
        ({"MODEL.MMDET.CONFIG": "no.py"}, "MODEL.MMDET.CONFIG 'no.py': FileNotFoundError"),
        ({"MODEL.MMDET.CONFIG": "mmdet::detr/no.py"}, "'mmdet::detr/no.py': FileNotFoundError"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck"]}, "'model.neck' is no override such as 'model."),
        ({"MODEL.MMDET.OVERRIDES": ["train_cfg.max_epochs=1"]}, "nothing but its model is read"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck.in_channels=[(1]"]}, "Imbalanced brackets"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck.type.x=1"]}, "'model.neck.type.x=1': TypeError"),
        (
            {"MODEL.MMDET.OVERRIDES": ["model.nekc=1"]},
            "nekc",
        ),
        ({"MODEL.MASK_ON": False}, "MODEL.MASK_ON: False, but the detector of 'mmdet::mask_rcnn/"),
        ({"INPUT.FORMAT": "L"}, "INPUT.FORMAT: expected 'BGR' or 'RGB' for a detector of"),
        ({"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED: Detectron2 has test-time augmentation"),
        ({"MODEL.WEIGHTS": "no.pth"}, "MODEL.WEIGHTS: there is no checkpoint 'no.pth'"),
        (  # which every config of the model zoo hands on
            {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"},
            "MODEL.WEIGHTS: 'detectron2://ImageNetPretrained/MSRA/R-50.pkl' has Detectron2's names",
        ),
        ({"MODEL.WEIGHTS": "catalog://ImageNetPretrained/R-50"}, 'set MODEL.WEIGHTS to ""'),
        (
            {"MODEL.MMDET.OVERRIDES": ["model.backbone.depth=51"]},
            "MODEL.MMDET.CONFIG/OVERRIDES: model.backbone.depth: no ResNet of depth 51",
        ),
        (
            {"MODEL.RESNETS.PLUGINS": [{"NAME": "ida", "STAGES": ["res5"]}]},
            "MODEL.RESNETS.PLUGINS is set, but MODEL.META_ARCH",
        ),
        (
            {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN"},
            "MODEL.MMDET is set, but MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'",
        ),
        (
            {"MODEL.META_ARCHITECTURE": "MMDetDetektor"},
            "MODEL.MMDET is set, but MODEL.META_ARCHITECTURE is 'MMDetDetektor'",
        ),
    ],
)
def test_wrong_setting_is_one_clear_error(training, settings, reason):
    use(training, "mask_rcnn")
    training.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(training, eval_only=False, resume=False)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("detr", "bbox_head.num_classes=9", "has 7 thing classes, but the detector of .* has 9"),
        ("mask_rcnn", "roi_head.bbox_head.num_classes=9", "has 7 thing classes, but .* has 9"),
        ("maskformer", "panoptic_head.num_stuff_classes=6", "has 2 stuff classes, but .* has 7"),
    ],
)
def test_number_of_classes_is_compared_with_the_datasets(training, name, override, reason):
    MetadataCatalog.get("drawn_val").set(stuff_classes=["things", "a"])
    use(training, name, f"model.{override}")
    with pytest.raises(ValueError, match=f"DATASETS.TEST: 'drawn_val' {reason}"):
        check_config(training, eval_only=True, resume=False)


def test_number_of_classes_of_a_cascade_is_known(training):
    training.MODEL.META_ARCHITECTURE = "MMDetDetector"
    training.MODEL.MMDET.CONFIG = "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    with pytest.raises(ValueError, match="has 7 thing classes, but the detector of .* has 80; set"):
        check_config(training, eval_only=True, resume=False)


def test_weights_with_detectron2s_names_are_refused(training, tmp_path):
    path = tmp_path / "R-18.pth"
    torch.save({"model": {"backbone.res2.0.conv1.weight": torch.zeros(1)}}, path)
    training.MODEL.WEIGHTS = str(path)
    with pytest.raises(ValueError, match="^MODEL.WEIGHTS: .*R-18.pth' has Detectron2's names, of"):
        check_config(use(training, "retinanet"), eval_only=False, resume=False)


def test_weights_of_a_training_with_detectron2_pass(training, tmp_path):
    model = build_model(use(training, "retinanet"))
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    training.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    check_config(training, eval_only=False, resume=False)


# Whole configs: they are refused before anything of them is built in memory.
@pytest.mark.parametrize(
    ("config", "reason", "evaluates"),
    [
        ("tood/tood_r50_fpn_1x_coco.py", "trains by the number of the epoch, as TOOD does", True),
        ("htc/htc_r50_fpn_1x_coco.py", "learns a semantic map, which only panoptic", True),
        ("glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py", "reads texts, as", False),
        ("grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py", "reads texts, as", False),
    ],
)
def test_detector_that_is_not_given_what_it_asks_for_is_refused(
    training, config, reason, evaluates
):
    training.MODEL.META_ARCHITECTURE = "MMDetDetector"
    training.MODEL.MMDET.CONFIG = f"mmdet::{config}"
    training.MODEL.MASK_ON = True
    training.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=f"^MODEL.MMDET.CONFIG: the .* {reason}"):
        check_config(training, eval_only=False, resume=False)
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    if evaluates:
        check_config(training, eval_only=True, resume=False)
    else:
        with pytest.raises(ValueError, match=reason):
            check_config(training, eval_only=True, resume=False)


@pytest.mark.parametrize("name", ["mask_rcnn", "maskformer"])
def test_masks_are_asked_for_where_they_are_learned(training, name):
    use(training, name, "model.data_preprocessor.pad_mask=False").MODEL.MASK_ON = False
    with pytest.raises(ValueError, match="^MODEL.MASK_ON: False, but the detector of .* set it to"):
        check_config(training, eval_only=False, resume=False)
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    check_config(training, eval_only=True, resume=False)


def test_check_takes_no_memory_where_the_detector_allows_it(training, monkeypatch):
    devices = []
    for kind in ("retinanet", "mask_rcnn", "detr", "maskformer"):
        monkeypatch.setattr(
            mmdet_bridge,
            "_check_classes",
            lambda detector, *_: devices.append(next(detector.parameters()).device.type),
        )
        check_config(use(training, kind), eval_only=False, resume=False)
    assert set(devices) == {"meta"}
    # It computes its layers' rates of dropping with tensors.
    training.MODEL.MMDET.CONFIG = "mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py"
    training.MODEL.MMDET.OVERRIDES = []
    check_config(training, eval_only=False, resume=False)
    assert devices[-1] == "cpu"


def test_bridge_of_the_users_own_is_one_to_every_tool(training):
    use(training, "retinanet")
    training.INPUT.MIN_SIZE_TEST, training.INPUT.MAX_SIZE_TEST = 64, 64
    cost, mismatches = analyze(training), find_mismatches(training)
    training.MODEL.META_ARCHITECTURE = "MyBridge"
    assert is_bridge(training) and isinstance(build_model(training), MyBridge)
    check_config(training, eval_only=False, resume=False)
    assert (analyze(training), find_mismatches(training)) == (cost, mismatches)
    training.MODEL.MMDET.CONFIG = ""
    with pytest.raises(ValueError, match="^MODEL.MMDET.CONFIG: names no config"):
        check_config(training, eval_only=False, resume=False)


def test_meta_architecture_of_the_users_own_may_read_what_it_likes(training):
    use(training, "retinanet").MODEL.META_ARCHITECTURE = "build_my_detector"
    check_config(training, eval_only=False, resume=False)
    assert not is_bridge(training)


def test_without_mmdetection_the_error_says_what_to_install(training, monkeypatch):
    use(training, "detr")
    for name in [m for m in sys.modules if m.partition(".")[0] == "mm_plugins"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(ImportError, match=r"pip install -e .\[mmdet\]"):
        build_model(training)
    with pytest.raises(ValueError, match=r"'MMDetDetector': .*pip install -e .\[mmdet\]"):
        check_config(training, eval_only=False, resume=False)
