"""Weights and pixel settings that disagree, in MMDetection's configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mm_plugins.pixels import find_mismatches

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "mm"
FASTER = CONFIGS / "triplet_attention" / "faster-rcnn_r50-triplet_fpn_1x_coco.py"


# What test_mm_configs.py trains it asks this, too.
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("g*.py")), ids=lambda p: p.stem)
def test_shipped_grounding_configs_agree_with_their_weights(path):
    assert find_mismatches(Config.fromfile(path)) == []


@pytest.mark.parametrize("listed", [False, True], ids=["alone", "listed"])
def test_each_wrong_setting_is_a_sentence_with_both_values(listed):
    cfg = Config.fromfile(FASTER)
    cfg.model.backbone.init_cfg.checkpoint = "open-mmlab://detectron2/resnet50_caffe"
    if listed:
        overwritten = {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}
        cfg.model.backbone.init_cfg = [overwritten, cfg.model.backbone.init_cfg]
    order, mean, std, style = find_mismatches(cfg)
    assert order.startswith("model.data_preprocessor.bgr_to_rgb is True, but the weights 'open-mm")
    assert mean.startswith("model.data_preprocessor.mean is [123.675, 116.28, 103.53]")
    assert std.startswith("model.data_preprocessor.std is [58.395, 57.12, 57.375]")
    assert style.startswith("model.backbone.style is 'pytorch'") and "'caffe'" in style


def test_load_from_counts_before_the_backbones_own_weights(tmp_path):
    cfg = Config.fromfile(FASTER)
    cfg.model.backbone.init_cfg.checkpoint = "open-mmlab://detectron2/resnet50_caffe"
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}}, tmp_path / "d.pth")
    cfg.load_from = str(tmp_path / "d.pth")
    assert find_mismatches(cfg) == []


@pytest.mark.parametrize("missing", ["data_preprocessor", "backbone"])
def test_model_that_does_not_say_is_silent(missing):
    cfg = Config.fromfile(FASTER)
    cfg.load_from = "open-mmlab://detectron2/resnet50_caffe"
    del cfg.model[missing]
    assert find_mismatches(cfg) == []


def test_resnets_of_basic_blocks_have_no_style():
    cfg = Config.fromfile(CONFIGS / "triplet_attention" / "faster-rcnn_r18-triplet_fpn_1x_coco.py")
    cfg.model.backbone.style = "caffe"
    assert find_mismatches(cfg) == []
