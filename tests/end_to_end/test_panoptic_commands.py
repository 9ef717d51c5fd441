"""The panoptic DETR's masks by the command line: trained on a detector's boxes, and then its PQ."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from make_synthetic_coco import make_dataset

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("hotcoco", reason="hotcoco is not installed")

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

CONFIG = (
    Path(__file__).resolve().parents[2]
    / "configs/mm/batchformer/panoptic-detr_r50-batchformer_8xb2-25e_coco-panoptic.py"
)
SMALL = """
_base_ = {base!r}
things = ("person", "disk", "square", "triangle", "star", "ring", "cross")
stuff = ("grass", "sand", "water", "brick", "stone", "sky")
metainfo = dict(classes=things + stuff, thing_classes=things, stuff_classes=stuff)
attention = dict(embed_dims=128)
layer = dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=128, feedforward_channels=64))
model = dict(
    num_queries=8,
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[64], out_channels=128),
    encoder=dict(num_layers=1, layer_cfg=layer),
    batchformer=dict(insert_after=(0,)),
    decoder=dict(num_layers=1, layer_cfg=dict(cross_attn_cfg=attention, **layer)),
    positional_encoding=dict(num_feats=64),
    bbox_head=dict(embed_dims=128, num_classes=13),
    panoptic_head=dict(
        embed_dims=128, in_channels=(8, 16, 32), num_things_classes=7, num_stuff_classes=6
    ),
    test_cfg=dict(score_thr=0.0, max_per_img=8),
)
load = [dict(type="LoadImageFromFile"), dict(type="LoadPanopticSegments")]
dataset = dict(data_root={data!r}, metainfo=metainfo)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(pipeline=[*load, dict(type="PackDetInputs")], **dataset), **loader
)
test_dataloader = dict(dataset=dict(**dataset), **loader)
quality = dict(
    type="PanopticQualityMetric",
    ann_file={data!r} + "annotations/panoptic_val2017.json",
    seg_prefix={data!r} + "annotations/panoptic_val2017/",
)
val_dataloader = val_evaluator = val_cfg = None  # after the training
test_evaluator = [quality]
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=1, by_epoch=True, milestones=[1])]
load_from = {load_from!r}
"""


@pytest.fixture
def config(tmp_path):
    """A small config on the shipped one, with the weights of a random detector."""
    data = tmp_path / "coco"
    make_dataset(data, train=4, val=2, size=64, progress=False)
    path, weights = tmp_path / "small.py", tmp_path / "boxes.pth"
    path.write_text(
        SMALL.format(base=str(CONFIG), data=f"{data}/", load_from=str(weights)), encoding="utf-8"
    )
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.save({"state_dict": MODELS.build(Config.fromfile(path).model).state_dict()}, weights)
    return path


def test_masks_are_trained_on_boxes_and_evaluated(config, run_tool, tmp_path):
    run_tool("train_mmdet.py", config, "--work-dir", tmp_path / "masks")
    last = tmp_path / "masks" / "epoch_1.pth"
    paths = (tmp_path / "boxes.pth", last)
    before, after = (torch.load(path)["state_dict"] for path in paths)
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"panoptic_head"}
    result = run_tool("test_mmdet.py", config, last, "--work-dir", tmp_path / "tested")
    printed = result.stdout + result.stderr
    assert re.search(r"coco_panoptic/PQ: \d+\.\d+ .*coco_panoptic/PQ_st: ", printed)
