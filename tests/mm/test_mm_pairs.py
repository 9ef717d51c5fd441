"""Every two methods that can meet in a detector of MMDetection's train a step together."""

from __future__ import annotations

import copy
import re
from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from batchformer_detectors import model_config
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from torch import nn

from mm_plugins.analysis import load_config
from mm_plugins.preflight import check_config
from plugin_core import BatchFormer, BlockPlugin, IDAClassifier

STAGE_PLUGINS: dict[str, list[dict[str, Any]]] = {
    "no plugin": [],
    "triplet attention": [{"type": "TripletAttention"}],
    "IDA": [{"type": "IDABlock", "num_queries": 5}],
    "SE": [{"type": "BlockPlugin", "name": "timm:se"}],
    "triplet attention and IDA": [
        {"type": "TripletAttention"},
        {"type": "IDABlock", "num_queries": 5},
    ],
}
BOX_HEADS = {
    "plain": {},
    "IDA": {"type": "IDABBoxHead"},
    "BatchFormer": {"type": "BatchFormerBBoxHead", "batchformer": {"dropout": 0.0}},
}
# Margins of 1, so that both losses have a gradient whatever the heat
AMC = {
    "attention_mask_consistency": {"mean_margin": 1.0, "max_margin": 1.0},
    "heatmap": {"activation": "backbone.layer3"},
}
BASES = {
    "Faster R-CNN": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "Cascade R-CNN": "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "RetinaNet": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
}
DETRS = ("DETR", "Conditional DETR", "DAB-DETR", "two-stage", "DINO")


def small_model(kind: str) -> ConfigDict:
    if kind not in BASES:
        return model_config(kind)
    model = load_config(BASES[kind]).model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    if kind == "RetinaNet":
        model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
        return model
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(in_channels=16, fc_out_channels=16, num_classes=3)
    return model


def detector(
    kind: str, plugin: str = "no plugin", box_head: str = "plain", **methods: Any
) -> Config:
    """The config of a small detector with methods; the stages' one is in the last."""
    model = small_model(kind)
    layers = [{**layer, "warm_start": True} for layer in STAGE_PLUGINS[plugin]]
    place = {"position": "after_conv2", "blocks": "all", "stages": (False, False, False, True)}
    model.backbone.update(type="PluginResNet", plugins=[{"cfg": one, **place} for one in layers])
    if "roi_head" in model:
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.update(copy.deepcopy(BOX_HEADS[box_head]))
    if methods:
        model.update(type=f"Plugin{model.type}", **copy.deepcopy(methods))
    return Config({"model": model})


BOTH = "triplet attention and IDA"
EACH = ("SE", BOTH)
BATCHFORMER = {"batchformer": {"batchformer": {"dropout": 0.0}}}
WITH_AMC = {"attention_mask_consistency": AMC}
# What trains in three or four holds for each two of them.
PAIRS = [
    pytest.param(kind, plugin, head, methods, id="-".join((kind, plugin, f"{head} head", *methods)))
    for kind, plugin, head, methods in (
        *product(["Faster R-CNN"], EACH, BOX_HEADS, [WITH_AMC]),
        *product(["Cascade R-CNN"], [BOTH], ["IDA", "BatchFormer"], [WITH_AMC]),
        *product(["RetinaNet"], EACH, ["plain"], [WITH_AMC]),
        *product(["DETR"], ["SE"], ["plain"], [BATCHFORMER]),
        *product(DETRS, [BOTH], ["plain"], [BATCHFORMER | WITH_AMC]),
    )
]


@pytest.mark.parametrize(("kind", "plugin", "box_head", "methods"), PAIRS)
def test_methods_train_a_step_together(kind, plugin, box_head, methods):
    settings = {name: value for method in methods.values() for name, value in method.items()}
    cfg = detector(kind, plugin, box_head, **settings)
    check_config(cfg, train=True, resumes=False)
    model = MODELS.build(cfg.model).train()
    if hasattr(model, "level_embed"):  # MMDetection leaves it as the memory was
        nn.init.normal_(model.level_embed)
    for module in model.modules():
        if isinstance(module, BlockPlugin):
            nn.init.constant_(module.alpha, 0.5)  # 0 lets nothing but itself learn
    shapes = [[3, 64, 64]] * 2
    inputs = demo_mm_inputs(2, shapes, num_items=[2, 1], num_classes=3)
    losses = model(**model.data_preprocessor(inputs, True), mode="loss")
    assert {name for name in losses if "amc" in name} == (
        {"loss_amc_mean", "loss_amc_max"} if "attention_mask_consistency" in methods else set()
    )
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    loss.backward()
    kinds = (BlockPlugin, IDAClassifier, BatchFormer)
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    assert {type(m) for m in found.values() if not isinstance(m, BlockPlugin)} == (
        {"IDA": {IDAClassifier}, "BatchFormer": {BatchFormer}}.get(box_head, set())
        | ({BatchFormer} if "batchformer" in methods else set())
    )
    assert sum(isinstance(m, BlockPlugin) for m in found.values()) == 2 * len(STAGE_PLUGINS[plugin])
    for where, module in found.items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"{where}.{name}"
            assert torch.isfinite(parameter.grad).all(), f"{where}.{name}"
            # A bias of all keys alike moves no softmax.
            assert parameter.grad.any() or name.endswith(("k_proj.bias", "k.bias")), name


@pytest.mark.parametrize(
    ("kind", "methods", "message"),
    [
        (
            "Faster R-CNN",
            {"batchformer": {}},
            "batchformer: is for .* PluginFasterRCNN is none",
        ),
        (
            "RetinaNet",
            {"batchformer": {}},
            "batchformer: is for .* PluginRetinaNet is none",
        ),
        ("RetinaNet", {"functional_entropy": {}}, r"model.functional_entropy: .*text"),
        ("DETR", {"functional_entropy": {}}, r"model.functional_entropy: .*text"),
        (
            "DETR",
            {"batchformer": {"gather": True}, "attention_mask_consistency": {}},
            "batchformer.gather: must be False with attention_mask_consistency, got True",
        ),
        (
            "RetinaNet",
            {"roi_head": {"bbox_head": {"type": "IDABBoxHead"}}},
            "model.roi_head: is no argument; there are",
        ),
        (
            "Mask2Former",
            AMC,
            "model.attention_mask_consistency: is for .* PluginMask2Former is none",
        ),
    ],
)
def test_methods_that_cannot_meet_are_refused_in_one_line(kind, methods, message):
    with pytest.raises(ValueError) as error:
        check_config(detector(kind, **methods), train=True, resumes=False)
    assert str(error.value).startswith("model")
    assert re.search(message, str(error.value)), error.value
    assert "\n" not in str(error.value)
