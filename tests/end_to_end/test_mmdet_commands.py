"""tools/train_mmdet.py and test_mmdet.py on real photographs: train, resume exactly, evaluate."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from mmdet_sample import CONFIG, options, results, scalars

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints


@pytest.fixture(scope="module")
def trained(coco_sample, run_tool, tmp_path_factory):
    """Work folder of a training that was not interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("mmdetection") / "whole"
    printed = run_tool("train_mmdet.py", CONFIG, *options(coco_sample, output))
    return output, printed.stdout


def test_training_lowers_the_loss(trained):
    losses = [record["loss"] for record in scalars(trained[0]) if "loss" in record]
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_evaluation_writes_results_for_every_image(trained, coco_sample):
    annotations = json.loads((coco_sample / "annotations/instances_val2017.json").read_text())
    assert {r["image_id"] for r in results(trained[0])} == {i["id"] for i in annotations["images"]}


def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    trained, coco_sample, run_tool, kill_tool_when, assert_same_weights, tmp_path
):
    output = tmp_path / "killed"
    kill_tool_when(
        output / "last_checkpoint", "train_mmdet.py", CONFIG, *options(coco_sample, output)
    )
    assert (output / "last_checkpoint").read_text().endswith("iter_10.pth")
    run_tool("train_mmdet.py", CONFIG, "--resume", *options(coco_sample, output))
    whole, resumed = (torch.load(folder / "iter_20.pth") for folder in (trained[0], output))
    assert_same_weights(resumed["state_dict"], whole["state_dict"])


def test_evaluating_the_checkpoint_gives_the_same_numbers(trained, coco_sample, run_tool, tmp_path):
    output, printed = trained
    again = run_tool(
        "test_mmdet.py", CONFIG, output / "iter_20.pth", *options(coco_sample, tmp_path)
    ).stdout
    numbers = re.compile(r"bbox_mAP_copypaste: (.*)")
    assert numbers.findall(again) == numbers.findall(printed) != []
    assert results(tmp_path) == results(output)


@pytest.fixture
def earlier_run(tmp_path):
    """A work folder with something in it that must stay as it is."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / CONFIG.name).write_text("kept")
    return folder


def assert_refused(result, expected: list[str], folder: Path) -> None:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert [text for text in expected if text not in line] == []
    assert [file.name for file in folder.iterdir()] == [CONFIG.name]
    assert (folder / CONFIG.name).read_text() == "kept"


PLUGIN = "model.backbone.plugins.0"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (f"{PLUGIN}.stages=[True,True]", ["model.backbone.plugins[0].stages", "4 times", "[True"]),
        (f"{PLUGIN}.position=after_conv4", ["position", "'after_conv4'", "after_conv3"]),
        (f"{PLUGIN}.cfg.kernal_size=7", ["'kernal_size'", "kernel_size"]),
        (f"{PLUGIN}.cfg.kernel_size=4", ["kernel_size", "odd", "4"]),
        (f"{PLUGIN}.cfg.type=TripletAtention", ["'TripletAtention'", "did you mean Triplet"]),
        ("model.backbone.depth=42", ["model.backbone.depth", "42", "50"]),
        ("model.backbone.depth=18", ["model.backbone.type", "PluginResNet"]),
        ("load_from=resnet101.pth", ["load_from", "no checkpoint", "resnet101.pth"]),
    ],
    ids=["stages", "position", "key", "value", "type", "depth", "basic-block", "weights"],
)
def test_a_wrong_setting_is_one_clear_line(setting, expected, coco_sample, run_tool, earlier_run):
    arguments = options(coco_sample, earlier_run, setting)
    assert_refused(
        run_tool("train_mmdet.py", CONFIG, *arguments, check=False), expected, earlier_run
    )


@pytest.mark.parametrize("content", [None, "", '{"images": [], "annotations": []}'])
def test_missing_and_empty_annotations_are_one_clear_line(content, run_tool, earlier_run, tmp_path):
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    if content is not None:
        file.write_text(content)
    result = run_tool("train_mmdet.py", CONFIG, *options(tmp_path, earlier_run), check=False)
    assert_refused(result, [str(file), "train_dataloader.dataset.ann_file"], earlier_run)


def test_a_checkpoint_of_another_depth_is_refused(trained, coco_sample, run_tool, earlier_run):
    weights = trained[0] / "iter_20.pth"
    arguments = options(coco_sample, earlier_run, "model.backbone.depth=101")
    result = run_tool("test_mmdet.py", CONFIG, weights, *arguments, check=False)
    assert_refused(result, ["ResNet-50", "model.backbone.depth", "101"], earlier_run)


def test_an_image_that_does_not_decode_is_named(broken_sample, run_tool, tmp_path):
    result = run_tool(
        "train_mmdet.py", CONFIG, *options(broken_sample, tmp_path / "out"), check=False
    )
    assert result.returncode != 0
    assert f"failed to load image: {broken_sample / 'train2017'}" in result.stderr
