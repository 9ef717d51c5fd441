"""Faster R-CNN with IDA in stages and head, on real photographs: trains, resumes, is measured."""

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

D2_CONFIG = "configs/d2/COCO-Detection/faster_rcnn_R_50_IDA_FPN_IDA_head_1x.yaml"
MM_CONFIG = Path(__file__).parent / "faster-rcnn_r50-ida_fpn_ida-head_coco-sample.py"


@dataclass
class Side:
    """What differs between the frameworks: a command line, and the files that it leaves.

    Without weight decay, which would move weights that have no gradient.
    """

    tool: str
    arguments: Callable[..., list[str]]
    halfway: str  # checkpoint of step 10 of 20
    final: str
    weights: str  # key of a checkpoint
    results: str


SIDES = {
    "detectron2": Side(
        "train_net.py",
        lambda sample, output, *flags: detectron2_sample.arguments(
            sample, output, *flags, config=D2_CONFIG, **{"SOLVER.WEIGHT_DECAY": "0.0"}
        ),
        "model_0000009.pth",
        "model_final.pth",
        "model",
        "inference/coco_instances_results.json",
    ),
    "mmdetection": Side(
        "train_mmdet.py",
        lambda sample, output, *flags: [
            str(MM_CONFIG),
            *flags,
            *mmdet_sample.options(sample, output, "optim_wrapper.optimizer.weight_decay=0.0"),
        ],
        "iter_10.pth",
        "iter_20.pth",
        "state_dict",
        "results.bbox.json",
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


def test_training_moves_every_part_of_ida(trained):
    side, output = trained
    assert losses(output) and all(map(math.isfinite, losses(output)))
    first, last = (torch.load(output / name)[side.weights] for name in (side.halfway, side.final))
    gammas = [name for name in last if name.endswith(".ida.gamma")]
    assert len(gammas) == 9 and all(first[name] != 0 for name in gammas)
    # Not the queries: their gradient has gamma as a factor, which is near 0 yet.
    moved = [name for name in last if name.endswith(".ida.proj.weight")]
    moved += [
        name for name in last if name.endswith(("cls_score.head.0.weight", "fc_cls.head.0.weight"))
    ]
    assert len(moved) == 9 + 1
    assert all(not torch.equal(first[name], last[name]) for name in moved)


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


def test_contextual_bias_is_measured_from_the_results(trained, coco_sample, run_tool, tmp_path):
    side, output = trained
    annotations = coco_sample / "annotations"
    result = run_tool(
        "evaluate_context_bias.py",
        *("--annotations", annotations / "instances_val2017.json"),
        *("--train-annotations", annotations / "instances_train2017.json"),
        *("--results", output / side.results, "--out", tmp_path / "bias"),
    )
    assert "| person " in result.stdout
    assert {f.name for f in (tmp_path / "bias").iterdir()} == {
        f"context_bias.{kind}" for kind in ("json", "md", "png")
    }
