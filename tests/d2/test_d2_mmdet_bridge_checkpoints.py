"""Checkpoints of MMDetection's detectors in Detectron2, also of a LazyConfig's."""

from __future__ import annotations

import logging
import re
from argparse import Namespace

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

import lazyconfig_train_net
from bridged_detectors import BACKBONE, SMALL, as_detectron2, mmdetection_checkpoint, use
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall, instantiate
from detectron2.modeling import build_model
from fvcore.common.param_scheduler import CosineParamScheduler
from mmengine.model import PretrainedInit
from omegaconf import DictConfig, OmegaConf
from torch.optim.swa_utils import AveragedModel

from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.mmdet_bridge import MMDetDetector, build_detector, load_config


def test_checkpoint_of_mmdetection_loads_as_it_is(cfg, tmp_path):
    first, second = (build_model(use(cfg, "detr")) for _ in range(2))
    path = mmdetection_checkpoint(first.detector, tmp_path / "epoch_1.pth")
    PluginCheckpointer(second).load(path)
    theirs = second.detector.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in first.detector.state_dict().items())


def test_checkpoint_of_detectron2_goes_back_to_mmdetection(cfg, tmp_path):
    model, other = (build_model(use(cfg, "retinanet")) for _ in range(2))
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    other.detector.load_state_dict(saved)  # strictly: no name more or less
    DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in saved.items())


def test_what_does_not_fit_is_reported_as_detectron2_does(cfg, tmp_path, caplog):
    model = build_model(use(cfg, "retinanet"))
    more = build_model(use(cfg, "retinanet", "model.bbox_head.num_classes=9"))
    del model.detector.neck.fpn_convs[0].conv.bias
    left_over = {"neck.another": torch.zeros(1)}
    path = mmdetection_checkpoint(model.detector, tmp_path / "epoch_1.pth", **left_over)
    with caplog.at_level(logging.WARNING, "fvcore.common.checkpoint"):
        PluginCheckpointer(more).load(path)
    assert "'bbox_head.retina_cls.weight' to the model due to incompatible shapes" in caplog.text
    said = re.sub(r"\x1b\[\d+m", "", caplog.text)  # names are coloured
    assert "not found in the checkpoint:\nbbox_head.retina_cls.{bias, weight}\nneck.fpn" in said
    assert "keys that are not used by the model:\n  neck.another\n" in said
    assert torch.equal(more.detector.backbone.conv1.weight, model.detector.backbone.conv1.weight)


@pytest.mark.parametrize(("parent", "prefix"), [(nn.Sequential, "0."), (AveragedModel, "module.")])
def test_parent_saves_and_loads_under_the_detectors_names(cfg, parent, prefix):
    source, target = (parent(build_model(use(cfg, "retinanet"))) for _ in range(2))
    state = source.state_dict()
    names = {prefix + name for name in build_model(cfg).detector.state_dict()}
    assert names == {name for name in state if name != "n_averaged"}
    target.load_state_dict(state)  # strictly: no name more or less
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())
    del state[f"{prefix}backbone.conv1.weight"]
    assert "backbone.conv1.weight" in target.load_state_dict(state, strict=False).missing_keys[0]


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit])
@pytest.mark.parametrize("listed", [False, True])
def test_weights_that_would_be_overwritten_are_not_read(kind, listed):
    config = load_config(SMALL["retinanet"][0], BACKBONE)
    missing, other = {"type": kind, "checkpoint": "no.pth"}, {"type": "Kaiming", "layer": "Conv2d"}
    config.model.backbone.init_cfg = [other, missing] if listed else missing
    with pytest.raises(FileNotFoundError):
        build_detector(config, pretrained=True)
    backbone = build_detector(config, pretrained=False).backbone
    assert backbone.init_cfg[0] == other if listed else "no.pth" not in str(backbone.init_cfg)


def test_pretrained_backbone_is_loaded_where_no_weights_are_given(cfg, tmp_path):
    backbone = build_model(use(cfg, "retinanet")).detector.backbone
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    overrides = [o for o in cfg.MODEL.MMDET.OVERRIDES if "init_cfg" not in o]
    overrides.append(f"model.backbone.init_cfg.checkpoint={tmp_path / 'backbone.pth'}")
    cfg.MODEL.MMDET.OVERRIDES = overrides
    loaded = build_model(cfg).detector.backbone
    assert torch.equal(loaded.conv1.weight, backbone.conv1.weight)
    cfg.MODEL.WEIGHTS = "of_the_whole_detector.pth"
    fresh = build_model(cfg).detector.backbone
    assert not torch.equal(fresh.conv1.weight, backbone.conv1.weight)


def lazy(name: str) -> DictConfig:
    config, overrides = SMALL[name]
    return LazyCall(MMDetDetector)(
        detector=LazyCall(build_detector)(
            config=LazyCall(load_config)(config=config, overrides=list(overrides)),
            pretrained=False,
        )
    )


def test_lazy_config_builds_the_detector(cfg):
    names = build_model(use(cfg, "detr")).state_dict().keys()
    assert instantiate(lazy("detr")).state_dict().keys() == names


@pytest.mark.parametrize("eval_only", [False, True])
def test_lazy_config_starts_from_a_checkpoint_of_mmdetection(
    packed, tmp_path, monkeypatch, eval_only
):
    source = instantiate(lazy("retinanet")).detector
    cfg = OmegaConf.create({"model": lazy("retinanet"), "dataloader": {}})
    cfg.train = model_zoo.get_config("common/train.py").train
    cfg.train.output_dir, cfg.train.device, cfg.train.max_iter = str(tmp_path), "cpu", 1
    cfg.train.init_checkpoint = mmdetection_checkpoint(source, tmp_path / "epoch_1.pth")
    batch = [as_detectron2(sample) for sample in packed]
    cfg.dataloader.train = LazyCall(lambda: [batch])()
    cfg.optimizer = model_zoo.get_config("common/optim.py").SGD
    cfg.optimizer.lr = 0.0
    cfg.lr_multiplier = LazyCall(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    models: list[nn.Module] = []
    monkeypatch.setattr(lazyconfig_train_net, "default_setup", lambda *_: None)
    monkeypatch.setattr(lazyconfig_train_net, "evaluate", lambda _, model: models.append(model))
    lazyconfig_train_net.main(Namespace(eval_only=eval_only, resume=False), cfg)
    (model,) = models
    state = source.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
