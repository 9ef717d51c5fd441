"""tools/train_mmpretrain.py on a drawn long tail: train, evaluate many, medium and few, resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/mmpretrain/synthetic/resnet10-batchformer_long-tail_synthetic.py"


@pytest.fixture(scope="module")
def drawn(run_tool, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "data"
    counts = ("--train", 40, "--val", 28, "--size", 64, "--classification", "--imbalance", 20)
    run_tool("make_synthetic_coco.py", out, *counts)
    return out / "classification"


def options(data, output, *more):
    settings = [f"{part}_dataloader.dataset.data_root={data}" for part in ("train", "val", "test")]
    settings += [
        "model.backbone.stem_channels=8",
        "model.backbone.base_channels=8",
        "model.head.in_channels=64",
        "train_dataloader.batch_size=10",
        "train_cfg.max_epochs=2",
        "train_cfg.val_interval=1",
        "default_hooks.checkpoint.interval=1",
        "default_hooks.logger.interval=1",
        "randomness.seed=0",
    ]
    return ["--work-dir", output, "--cfg-options", *settings, *more]


@pytest.fixture(scope="module")
def exact(drawn):
    """The config with the hook that repeats random numbers after resuming."""
    path = drawn.parent / "exact.py"
    hooks = [{"type": "ClassCountsHook"}, {"type": "mmdet.ExactResumeHook"}]
    path.write_text(f"_base_ = {str(ROOT / CONFIG)!r}\ncustom_hooks = {hooks}\n")
    return path


@pytest.fixture(scope="module")
def trained(drawn, exact, run_tool, tmp_path_factory):
    """Work folder of a training with the balanced softmax, of which no count was typed."""
    output = tmp_path_factory.mktemp("long_tail") / "run"
    balanced = "model.head.loss.type=BalancedSoftmaxLoss"
    run_tool("train_mmpretrain.py", exact, *options(drawn, output, balanced))
    return output


def accuracies(output):
    (path,) = output.glob("*/vis_data/scalars.json")
    found = [json.loads(line) for line in path.read_text().splitlines() if "long-tail/all" in line]
    return [{k: v for k, v in line.items() if k.startswith("long-tail/")} for line in found]


def test_training_ends_with_the_accuracies_of_the_groups(trained, drawn):
    found = accuracies(trained)[-1]
    counts = [len(list(folder.iterdir())) for folder in (drawn / "train").iterdir()]
    assert min(counts) < 20  # so that there is a class with few images
    assert 0 <= found["long-tail/few"] <= 100
    assert "long-tail/many" not in found  # none has more than 100
    weights = torch.load(trained / "epoch_2.pth", weights_only=False)["state_dict"]
    assert any(name.startswith("head.batchformer.") for name in weights)


def test_the_plain_head_evaluates_the_checkpoint_the_same(trained, drawn, run_tool, tmp_path):
    plain = "model.head.type=LinearClsHead"
    printed = []
    for name, more in (("own", ()), ("plain", (plain,))):
        line = options(drawn, tmp_path / name, *more)
        checkpoint = trained / "epoch_2.pth"
        run = run_tool("test_mmpretrain.py", CONFIG, checkpoint, *line)
        printed.append(re.findall(r"(long-tail/\w+): ([\d.]+)", run.stdout + run.stderr))
    assert printed[0] == printed[1] != []
    assert float(dict(printed[0])["long-tail/all"]) == pytest.approx(
        accuracies(trained)[-1]["long-tail/all"], abs=1e-3
    )


def test_a_resumed_training_ends_with_the_same_weights(
    trained, drawn, exact, run_tool, assert_same_weights, tmp_path
):
    line = options(drawn, tmp_path / "run", "model.head.loss.type=BalancedSoftmaxLoss")
    run_tool("train_mmpretrain.py", exact, "--resume", trained / "epoch_1.pth", *line)
    ends = [
        torch.load(folder / "epoch_2.pth", weights_only=False)["state_dict"]
        for folder in (trained, tmp_path / "run")
    ]
    assert_same_weights(*ends)
    assert accuracies(tmp_path / "run") == accuracies(trained)[1:]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "model.head.loss.type=AsymmetricLoss",
            r"error: model\.head\.loss: must be for one label in an image",
        ),
        ("model.head.batchformer.num_heads=3", r"error: model\.head\.batchformer\.num_heads"),
        (
            "custom_hooks=[] val_evaluator.0.counts=[9] model.head.loss.type=BalancedSoftmaxLoss",
            r"error: model\.head\.loss\.counts: must be .*; add dict\(type='ClassCountsHook'\)",
        ),
        (
            "val_evaluator.0.counts=[5]",
            r"error: val_evaluator\.counts: must be the training images of each of the 7 classes",
        ),
        ("val_evaluator.0.counts=abc", r"error: val_evaluator\[0\]: counts must be the training"),
        ("custom_hooks=[]", r"error: val_evaluator\[0\]\.counts: must be the training images"),
        ("val_evaluator.0.many=-1", r"error: val_evaluator\[0\]: many must be a number of images"),
    ],
)
def test_a_wrong_setting_is_one_line_before_training(setting, told, drawn, run_tool, tmp_path):
    output = tmp_path / "run"
    line = options(drawn, output, *setting.split())
    run = run_tool("train_mmpretrain.py", CONFIG, *line, check=False)
    assert run.returncode == 1
    assert re.search(told, run.stderr), run.stderr[-2000:]
    assert not output.exists()
