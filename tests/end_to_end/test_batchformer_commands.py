"""A small DETR of MMDetection with BatchFormerV2 under Detectron2's trainer, on photographs.

``test_grounding.py`` trains a BatchFormerV2 under MMDetection's.
"""

from __future__ import annotations

import math

import pytest
import torch
from detectron2_sample import arguments, losses, results, weights

CONFIG = "configs/d2/BatchFormer-Detection/detr_R_50_batchformer_50ep.yaml"
# Narrow, two layers each in encoder and decoder, few queries, and random weights
OVERRIDES = {
    "model.type": "PluginDETR",
    "model.batchformer.insert_after": "(0,)",
    "model.backbone.depth": 18,
    "model.backbone.base_channels": 8,
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": "[64]",
    "model.encoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
    "model.encoder.num_layers": 2,
    "model.decoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
    "model.decoder.num_layers": 2,
    "model.num_queries": 20,
    "model.test_cfg.max_per_img": 10,
}
OPTIONS = {
    "MODEL.MMDET.OVERRIDES": str([f"{key}={value}" for key, value in OVERRIDES.items()]),
    "SOLVER.WEIGHT_DECAY_NORM": "0.0",
    "SOLVER.WARMUP_ITERS": "0",
    "SOLVER.BASE_LR": "0.0001",
    "SOLVER.MAX_ITER": "4",
    "SOLVER.CHECKPOINT_PERIOD": "2",
}


@pytest.fixture(scope="module")
def trained(photographs, run_tool, tmp_path_factory):
    """Folder of a training that was not interrupted."""
    output = tmp_path_factory.mktemp("detr") / "whole"
    run_tool("train_net.py", *arguments(photographs, output, config=CONFIG, **OPTIONS))
    return output


def test_training_moves_the_batchformer_and_evaluates(trained):
    assert losses(trained) and all(map(math.isfinite, losses(trained)))
    first, last = weights(trained, "model_0000001.pth"), weights(trained)
    moved = [name for name in last if name.startswith("encoder.batchformer.0.layers.0.")]
    assert len(moved) == 12
    assert all(not torch.equal(first[name], last[name]) for name in moved)
    assert results(trained)


def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    trained, photographs, run_tool, kill_tool_when, assert_same_weights, tmp_path
):
    output = tmp_path / "killed"
    line = arguments(photographs, output, config=CONFIG, **OPTIONS)
    kill_tool_when(output / "last_checkpoint", "train_net.py", *line)
    assert (output / "last_checkpoint").read_text() == "model_0000001.pth"
    run_tool("train_net.py", *line[:2], "--resume", *line[2:])
    assert_same_weights(weights(output), weights(trained))
