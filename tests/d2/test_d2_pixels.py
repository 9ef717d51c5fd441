"""Weights and pixel settings that disagree, in Detectron2's configs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2_plugins import merge_config
from d2_plugins.config import load_lazy_config
from d2_plugins.pixels import find_lazy_mismatches, find_mismatches

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "d2"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_shipped_configs_agree_with_their_weights(cfg, path):
    merge_config(cfg, str(path))
    assert find_mismatches(cfg) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda p: p.stem)
def test_shipped_lazy_configs_agree_with_their_weights(path):
    assert find_lazy_mismatches(load_lazy_config(str(path))) == []


def test_each_wrong_setting_is_a_sentence_with_both_values(cfg):
    cfg.MODEL.WEIGHTS = TORCHVISION  # Detectron2's defaults are MSRA's
    order, mean, std, stride = find_mismatches(cfg)
    assert order.startswith(f"INPUT.FORMAT is 'BGR', but the weights {TORCHVISION!r} look like")
    assert "ones that want 'RGB'" in order
    assert mean.startswith("MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675]")
    assert "want [123.675, 116.28, 103.53]" in mean
    assert std.startswith("MODEL.PIXEL_STD is [1.0, 1.0, 1.0]")
    assert stride.startswith("MODEL.RESNETS.STRIDE_IN_1X1 is True")


@pytest.mark.parametrize("weights", ["", MSRA, "https://example.org/detector.pth"])
def test_weights_that_agree_or_are_unknown_are_silent(cfg, weights):
    cfg.MODEL.WEIGHTS = weights
    assert find_mismatches(cfg) == []


def test_file_of_a_published_detector_tells_its_pixels(cfg, tmp_path):
    state_dict = {
        "pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
        "pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1),
        "backbone.bottom_up.stem.conv1.weight": torch.zeros(1),
    }
    torch.save({"model": state_dict, "iteration": 89999}, tmp_path / "model_final.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    settings = [text.split()[0] for text in find_mismatches(cfg)]
    assert settings == ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]


def test_lazy_config_names_its_own_keys():
    cfg = load_lazy_config(str(next(CONFIGS.rglob("mask_rcnn_*.py"))))
    cfg.train.init_checkpoint = MSRA
    assert [text.split()[0] for text in find_lazy_mismatches(cfg)] == [
        "model.input_format",
        "model.pixel_mean",
        "model.pixel_std",
        "model.backbone.bottom_up.stages.stride_in_1x1",
    ]


def test_lazy_config_of_another_kind_of_model_is_silent():
    cfg = load_lazy_config(str(next(CONFIGS.rglob("mask_rcnn_*.py"))))
    cfg.train.init_checkpoint = MSRA
    cfg.model = {"backbone": cfg.model.backbone}
    assert find_lazy_mismatches(cfg) == []
