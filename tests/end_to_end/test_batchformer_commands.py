"""A small DETR with BatchFormerV2 on real photographs, by both command lines: trains, resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import detectron2_sample
import mmdet_sample
import pytest
import torch

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

D2_CONFIG = "configs/d2/BatchFormer-Detection/detr_R_50_batchformer_50ep.yaml"
MM_CONFIG = Path(__file__).parent / "detr_r50-batchformer_coco-sample.py"
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
BATCHFORMER = {
    "model.type": "BatchFormerDetector",
    "model.detector": "DETR",
    "model.batchformer.insert_after": "(0,)",
}
# Without weight decay, which would move weights that have no gradient
D2_OPTIONS = {
    "MODEL.MMDET.OVERRIDES": str([f"{k}={v}" for k, v in {**BATCHFORMER, **SMALL}.items()]),
    "SOLVER.WEIGHT_DECAY": "0.0",
    "SOLVER.WEIGHT_DECAY_NORM": "0.0",
    "SOLVER.WARMUP_ITERS": "0",
    "SOLVER.BASE_LR": "0.0001",
}


@dataclass
class Side:
    """What differs between the frameworks: a command line, and the files that it leaves."""

    tool: str
    arguments: Callable[..., list[str]]
    halfway: str  # checkpoint of step 10 of 20
    final: str
    weights: str  # key of a checkpoint
    results: Callable[[Path], list[dict]]


SIDES = {
    "detectron2": Side(
        "train_net.py",
        lambda sample, output, *flags: detectron2_sample.arguments(
            sample, output, *flags, config=D2_CONFIG, **D2_OPTIONS
        ),
        "model_0000009.pth",
        "model_final.pth",
        "model",
        detectron2_sample.results,
    ),
    "mmdetection": Side(
        "train_mmdet.py",
        lambda sample, output, *flags: [
            str(MM_CONFIG),
            *flags,
            *mmdet_sample.options(
                sample, output, "optim_wrapper.optimizer.weight_decay=0.0", model=SMALL
            ),
        ],
        "iter_10.pth",
        "iter_20.pth",
        "state_dict",
        mmdet_sample.results,
    ),
}


@pytest.fixture(scope="module", params=SIDES)
def trained(request, coco_sample, run_tool, tmp_path_factory):
    """A framework, and the folder of its training."""
    side = SIDES[request.param]
    output = tmp_path_factory.mktemp(request.param) / "whole"
    run_tool(side.tool, *side.arguments(coco_sample, output))
    return side, output


def losses(output: Path) -> list[float]:
    if (output / "metrics.json").exists():
        lines = (output / "metrics.json").read_text().splitlines()
        return [r["total_loss"] for r in map(json.loads, lines) if "total_loss" in r]
    return [record["loss"] for record in mmdet_sample.scalars(output) if "loss" in record]


def test_training_moves_the_batchformer_and_evaluates(trained):
    side, output = trained
    assert losses(output) and all(map(math.isfinite, losses(output)))
    first, last = (torch.load(output / name)[side.weights] for name in (side.halfway, side.final))
    moved = [name for name in last if name.startswith("encoder.batchformer.0.layers.0.")]
    assert len(moved) == 12
    assert all(not torch.equal(first[name], last[name]) for name in moved)
    assert side.results(output)


def test_a_training_resumed_halfway_ends_with_the_same_weights(
    trained, coco_sample, run_tool, assert_same_weights, tmp_path
):
    side, whole = trained
    output = tmp_path / "resumed"
    output.mkdir()
    shutil.copy(whole / side.halfway, output)
    last = (whole / "last_checkpoint").read_text()  # a name in Detectron2, else a path
    last = last.replace(side.final, side.halfway).replace(str(whole), str(output))
    (output / "last_checkpoint").write_text(last)
    run_tool(side.tool, *side.arguments(coco_sample, output, "--resume"))
    final, expected = (torch.load(folder / side.final)[side.weights] for folder in (output, whole))
    assert_same_weights(final, expected)
