"""A small Grounding DINO with BatchFormerV2 and auxiliary losses on drawn captions.

It trains, resumes and is evaluated under MMDetection's trainer.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

import mm_plugins  # noqa: F401  # lets torch.load read mmengine's checkpoints

CONFIGS = Path("configs/mm/synthetic")
BOTH = CONFIGS / "grounding-dino_r50-amc-functional-entropy_synthetic.py"
PLAIN = CONFIGS / "grounding-dino_r50_synthetic.py"
METHODS = ("model.batchformer.insert_after=(0,)", "model.functional_entropy.samples=1")
LAST = 2


@pytest.fixture(scope="module")
def scenes(run_tool, tmp_path_factory) -> Path:
    """A folder with drawn scenes and a text model, as the README makes them."""
    folder = tmp_path_factory.mktemp("grounding")
    size = ("--train", 8, "--val", 2, "--size", 64)
    run_tool("make_synthetic_coco.py", folder / "coco", *size)
    captions = sorted((folder / "coco" / "annotations").glob("grounding_*_odvg.jsonl"))
    run_tool("make_tiny_text_model.py", folder / "bert", "--texts", *captions)
    return folder


def options(scenes: Path, out: Path, *settings: str) -> list[str]:
    data = scenes / "coco"
    phrases = data / "annotations" / "grounding_val2017_flickr30k.json"
    return [
        "--work-dir",
        str(out),
        "--cfg-options",
        f"model.language_model.name={scenes / 'bert'}",
        f"train_dataloader.dataset.pipeline.3.tokenizer_name={scenes / 'bert'}",
        f"train_dataloader.dataset.data_root={data}/",
        f"val_dataloader.dataset.data_root={data}/",
        f"test_dataloader.dataset.data_root={data}/",
        f"val_evaluator.1.ann_file={phrases}",
        f"val_evaluator.1.out_file={out / 'pointing_game.json'}",
        f"test_evaluator.1.ann_file={phrases}",
        f"test_evaluator.1.out_file={out / 'pointing_game.json'}",
        "model.backbone.base_channels=8",
        "model.neck.in_channels=[64,128,256]",
        "train_dataloader.batch_size=2",
        f"train_cfg.max_iters={LAST}",
        f"train_cfg.val_interval={LAST}",
        f"default_hooks.checkpoint.interval={LAST // 2}",
        "default_hooks.logger.interval=1",
        *settings,
    ]


def scalars(folder: Path) -> list[dict]:
    (file,) = folder.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(scenes, run_tool, tmp_path_factory) -> tuple[Path, str]:
    """Work folder of a training that was not interrupted, and what it printed."""
    out = tmp_path_factory.mktemp("trained") / "whole"
    return out, run_tool("train_mmdet.py", BOTH, *options(scenes, out, *METHODS)).stdout


def test_training_moves_the_batchformer(trained):
    first, last = (
        torch.load(trained[0] / f"iter_{step}.pth")["state_dict"] for step in (LAST // 2, LAST)
    )
    moved = [name for name in last if name.startswith("encoder.batchformer.0.layers.0.")]
    assert len(moved) == 12
    assert all(not torch.equal(first[name], last[name]) for name in moved)


def test_losses_and_information_are_logged_by_name(trained):
    steps = [record for record in scalars(trained[0]) if "loss" in record]
    assert len(steps) == LAST
    names = ("loss_amc_mean", "loss_amc_max", "loss_functional_entropy")
    for step in steps:
        assert all(math.isfinite(step[name]) for name in names)
        assert step["information_image"] > 0 and step["information_text"] > 0


def test_pointing_game_and_recall_are_evaluated(trained, scenes):
    out, printed = trained
    results = json.loads((out / "pointing_game.json").read_text())
    file = scenes / "coco" / "annotations" / "grounding_val2017_flickr30k.json"
    spans = [len(image["tokens_positive_eval"]) for image in json.loads(file.read_text())["images"]]
    assert (
        results["phrases"]
        == sum(spans)
        == sum(category["phrases"] for category in results["categories"].values())
    )
    assert 0 <= results["accuracy"] <= 1 and 0 < results["chance"] < 1
    assert f"pointing_game/accuracy: {results['accuracy']:.4f}" in printed
    assert re.search(r"recall/5: {'all': [\d.]+}", printed)


def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    trained, scenes, run_tool, kill_tool_when, assert_same_weights, tmp_path
):
    out = tmp_path / "killed"
    kill_tool_when(out / "last_checkpoint", "train_mmdet.py", BOTH, *options(scenes, out, *METHODS))
    assert (out / "last_checkpoint").read_text().endswith(f"iter_{LAST // 2}.pth")
    run_tool("train_mmdet.py", BOTH, "--resume", *options(scenes, out, *METHODS))
    whole, resumed = (torch.load(folder / f"iter_{LAST}.pth") for folder in (trained[0], out))
    assert_same_weights(resumed["state_dict"], whole["state_dict"])


def test_a_checkpoint_is_evaluated_to_the_same_numbers_and_by_the_plain_config(
    trained, scenes, run_tool, tmp_path
):
    weights = trained[0] / f"iter_{LAST}.pth"
    run_tool("test_mmdet.py", PLAIN, weights, *options(scenes, tmp_path))  # no BatchFormer
    again, before = (
        json.loads((folder / "pointing_game.json").read_text()) for folder in (tmp_path, trained[0])
    )
    assert again == before


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "model.attention_mask_consistency.max_margin=1.5",
            ["model.attention_mask_consistency", "max_margin", "from 0 to 1", "1.5"],
        ),
        (
            "model.batchformer.insert_after=(9,)",
            ["model.batchformer.insert_after", "layer 9", "0 to 1"],
        ),
        (
            "model.language_model.name=nowhere",
            ["model.language_model.name", "'nowhere'", "hf download"],
        ),
    ],
    ids=["margin", "layer", "text-model"],
)
def test_a_wrong_setting_is_one_clear_line(
    setting, expected, scenes, run_tool, earlier_run, assert_refused
):
    line = options(scenes, earlier_run, setting)
    assert_refused(run_tool("train_mmdet.py", BOTH, *line, check=False), expected)
