"""tools/train_mmdet.py and test_mmdet.py on real photographs: train, resume exactly, evaluate.

The detector has triplet attention and IDA in its stages, and IDA as its classifier.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from mmdet_sample import CONFIG, TWO_STAGES, options, results, scalars, weights


@pytest.fixture(scope="module")
def trained(photographs, run_tool, tmp_path_factory):
    """Work folder of a training that was not interrupted, and what it printed."""
    output = tmp_path_factory.mktemp("mmdetection") / "whole"
    line = options(photographs, output)
    return output, run_tool("train_mmdet.py", CONFIG, *line, anew=True).stdout


def test_training_lowers_the_loss(trained):
    losses = [record["loss"] for record in scalars(trained[0]) if "loss" in record]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])


def test_training_moves_every_part_of_the_plugins(trained):
    output, _ = trained
    first, last = weights(output, "iter_5.pth"), weights(output)
    alphas = [name for name in last if name.endswith(".alpha")]
    assert sum(name.endswith(".triplet_attention.alpha") for name in alphas) == 8
    assert sum(name.endswith(".ida.alpha") for name in alphas) == 2
    assert all(first[name] != 0 for name in alphas)
    # Not IDA's queries: their gradient has alpha as a factor, which is near 0 yet.
    moved = [name for name in last if name.endswith(".ida.proj.weight")]
    moved += [name for name in last if name.endswith("fc_cls.head.0.weight")]
    assert len(moved) == 2 + 1
    assert all(not torch.equal(first[name], last[name]) for name in moved)


def test_evaluation_writes_results_for_every_image(trained, photographs):
    annotations = json.loads((photographs / "annotations/instances_val2017.json").read_text())
    assert {r["image_id"] for r in results(trained[0])} == {i["id"] for i in annotations["images"]}


def test_evaluating_the_checkpoint_gives_the_same_numbers(trained, photographs, run_tool, tmp_path):
    output, printed = trained
    line = options(photographs, tmp_path)
    again = run_tool("test_mmdet.py", CONFIG, output / "iter_10.pth", *line).stdout
    numbers = re.compile(r"bbox_mAP_copypaste: (.*)")
    assert numbers.findall(again) == numbers.findall(printed) != []
    assert results(tmp_path) == results(output)


BACKBONE = "model.backbone"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            f"{BACKBONE}.plugins.1.stages=[True,True]",
            [f"{BACKBONE}.plugins[1].stages", "4 times", "[True"],
        ),
        (f"{BACKBONE}.type=ResNet", [f"{BACKBONE}.type", "PluginResNet"]),
        ("load_from=resnet101.pth", ["load_from", "no checkpoint", "resnet101.pth"]),
    ],
    ids=["stages", "basic-block", "weights"],
)
def test_a_wrong_setting_is_one_clear_line(
    setting, expected, photographs, run_tool, earlier_run, assert_refused
):
    line = options(photographs, earlier_run, setting)
    assert_refused(run_tool("train_mmdet.py", CONFIG, *line, check=False), expected)


@pytest.mark.parametrize("content", [None, "", '{"images": [], "annotations": []}'])
def test_missing_and_empty_annotations_are_one_clear_line(
    content, run_tool, earlier_run, assert_refused, tmp_path
):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    file = tmp_path / "annotations" / "instances_train2017.json"
    if content is not None:
        file.write_text(content)
    result = run_tool("train_mmdet.py", CONFIG, *options(tmp_path, earlier_run), check=False)
    assert_refused(result, [str(file), "train_dataloader.dataset.ann_file"])


def test_a_checkpoint_of_another_depth_is_refused(
    trained, photographs, run_tool, earlier_run, assert_refused
):
    config = "configs/mm/triplet_attention/faster-rcnn_r101-triplet_fpn_1x_coco.py"
    line = options(photographs, earlier_run)
    result = run_tool("test_mmdet.py", config, trained[0] / "iter_10.pth", *line, check=False)
    assert_refused(result, ["ResNet-18", "model.backbone.depth", "101"])


def test_an_image_that_does_not_decode_is_named(broken_photographs, run_tool, tmp_path):
    line = options(broken_photographs, tmp_path / "out")
    result = run_tool("train_mmdet.py", CONFIG, *line, check=False)
    assert result.returncode != 0
    error = result.stderr[result.stderr.index("error: train_dataloader.dataset.ann_file: ") :]
    assert "images that cannot be read: image " in " ".join(error.split())
    assert not (tmp_path / "out").exists()


# Mask R-CNN
FEW = [
    "train_cfg.max_iters=3",
    "train_cfg.val_interval=3",
    "train_dataloader.batch_size=1",
    "default_hooks.checkpoint=None",
]
MASKS = {
    **TWO_STAGES,
    "model.roi_head.mask_roi_extractor.out_channels": 64,
    "model.roi_head.mask_head.in_channels": 64,
    "model.roi_head.mask_head.conv_out_channels": 32,
}


def test_mask_rcnn_trains_and_reports_all_metrics(photographs, run_tool, tmp_path):
    config = "configs/mm/triplet_attention/mask-rcnn_r18-triplet_fpn_1x_coco.py"
    run_tool("train_mmdet.py", config, *options(photographs, tmp_path, *FEW, model=MASKS))
    *steps, evaluation = scalars(tmp_path)
    assert [record["step"] for record in steps] == [1, 2, 3]
    losses = [v for record in steps for name, v in record.items() if "loss" in name]
    assert all(math.isfinite(loss) for loss in losses) and len(losses) > len(steps)
    for task, key in {"bbox": "bbox", "segm": "segmentation"}.items():
        sizes = ("", "_50", "_75", "_s", "_m", "_l")
        assert evaluation.keys() >= {f"coco/{task}_mAP{size}" for size in sizes}
        found = results(tmp_path, task)
        assert found and all(key in result for result in found)
