"""Configs that are based on one of this project by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config

import mm_plugins  # noqa: F401
from mm_plugins.block_plugins import BlockPlugin


def test_what_a_named_base_builds_is_looked_up_in_mmdetection(tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(
        '_base_ = "mm_plugins::synthetic/faster-rcnn_r18_fpn_demo.py"\n'
        "model = dict(backbone=dict(init_cfg=None))\n"
    )
    cfg = Config.fromfile(config)
    marked = [h for h in cfg.custom_hooks if h.get("_scope_") == "mm_plugins"]
    assert marked
    for hook in marked:
        assert type(HOOKS.build(hook)).__name__ == hook.type


def test_a_plugin_is_found_in_the_projects_scope() -> None:
    cfg = {"type": "BlockPlugin", "name": "simam", "in_channels": 8, "_scope_": "mm_plugins"}
    assert isinstance(MODELS.build(cfg), BlockPlugin)
