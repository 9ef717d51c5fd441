"""Faster R-CNN with IDA in stages and head, on real photographs: trains, resumes, is measured."""

from __future__ import annotations

import math
from pathlib import Path

import both_frameworks
import pytest
import torch
from both_frameworks import losses

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

SIDES = {
    "detectron2": both_frameworks.detectron2(
        "configs/d2/COCO-Detection/faster_rcnn_R_50_IDA_FPN_IDA_head_1x.yaml"
    ),
    "mmdetection": both_frameworks.mmdetection(
        Path(__file__).parent / "faster-rcnn_r50-ida_fpn_ida-head_coco-sample.py"
    ),
}


@pytest.fixture(scope="module", params=SIDES)
def trained(request, coco_sample, run_tool, tmp_path_factory):
    """A framework, and the folder of its training."""
    side = SIDES[request.param]
    output = tmp_path_factory.mktemp(request.param) / "whole"
    run_tool(side.tool, *side.arguments(coco_sample, output))
    return side, output


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
    side.resume_from_halfway(whole, output)
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
