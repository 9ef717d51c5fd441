"""A small DETR with BatchFormerV2 on real photographs, by both command lines: trains, resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import both_frameworks
import pytest
import torch
from both_frameworks import losses

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

# Two layers each in encoder and decoder, few queries, and random weights
SMALL = {
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.init_cfg": None,
    "model.encoder.num_layers": 2,
    "model.decoder.num_layers": 2,
    "model.num_queries": 20,
    "model.test_cfg.max_per_img": 10,
}
BATCHFORMER = {"model.type": "PluginDETR", "model.batchformer.insert_after": "(0,)"}
D2_OPTIONS = {
    "MODEL.MMDET.OVERRIDES": str([f"{k}={v}" for k, v in {**BATCHFORMER, **SMALL}.items()]),
    "SOLVER.WEIGHT_DECAY_NORM": "0.0",
    "SOLVER.WARMUP_ITERS": "0",
    "SOLVER.BASE_LR": "0.0001",
}
SIDES = {
    "detectron2": both_frameworks.detectron2(
        "configs/d2/BatchFormer-Detection/detr_R_50_batchformer_50ep.yaml", **D2_OPTIONS
    ),
    "mmdetection": both_frameworks.mmdetection(
        Path(__file__).parent / "detr_r50-batchformer_coco-sample.py", model=SMALL
    ),
}


@pytest.fixture(scope="module", params=SIDES)
def trained(request, coco_sample, run_tool, tmp_path_factory):
    """A framework, and the folder of its training."""
    side = SIDES[request.param]
    output = tmp_path_factory.mktemp(request.param) / "whole"
    run_tool(side.tool, *side.arguments(coco_sample, output))
    return side, output


def test_training_moves_the_batchformer_and_evaluates(trained):
    side, output = trained
    assert losses(output) and all(map(math.isfinite, losses(output)))
    first, last = (torch.load(output / name)[side.weights] for name in (side.halfway, side.final))
    moved = [name for name in last if name.startswith("encoder.batchformer.0.layers.0.")]
    assert len(moved) == 12
    assert all(not torch.equal(first[name], last[name]) for name in moved)
    assert json.loads((output / side.results).read_text())


def test_a_training_resumed_halfway_ends_with_the_same_weights(
    trained, coco_sample, run_tool, assert_same_weights, tmp_path
):
    side, whole = trained
    output = tmp_path / "resumed"
    side.resume_from_halfway(whole, output)
    run_tool(side.tool, *side.arguments(coco_sample, output, "--resume"))
    final, expected = (torch.load(folder / side.final)[side.weights] for folder in (output, whole))
    assert_same_weights(final, expected)
