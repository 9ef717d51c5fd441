"""Commands that evaluate Detectron2's checkpoints on a dataset of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2_plugins.config import load_lazy_config
from d2_plugins.evaluation_runs import prepare_evaluation
from plugin_core.evaluation.comparison.evaluations import Checkpoint, GroundTruth

LAZY = "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.py"
ROOT = Path(__file__).resolve().parents[2]
TRUTH = GroundTruth("val.json", "images")


def prepare(config: Path, folder: str = "out") -> Any:
    return prepare_evaluation(Checkpoint(str(config), "w's, 1.pth"), TRUTH, Path(folder), "bbox")


def test_lazy_config_is_evaluated_on_the_dataset_and_writes_its_detections():
    prepared = prepare(ROOT / LAZY, "a folder, of mine")
    assert prepared.command[1].endswith("tools/lazyconfig_train_net.py")
    assert prepared.results == Path("a folder, of mine/inference/coco_instances_results.json")
    cfg = load_lazy_config(str(ROOT / LAZY), prepared.command[9:])
    assert cfg.train.init_checkpoint == "w's, 1.pth"
    assert cfg.train.output_dir == "a folder, of mine"
    assert cfg.dataloader.test.dataset.names == "compared"
    assert cfg.dataloader.evaluator.dataset_name == "compared"
    assert cfg.dataloader.evaluator.output_dir == "a folder, of mine/inference"
    assert prepare(ROOT / LAZY).content == prepared.content


def test_lazy_config_without_an_evaluator_is_refused(tmp_path):
    (tmp_path / "lazy.py").write_text(
        "from detectron2.config import LazyCall\n"
        "from torch import nn\n"
        "model = LazyCall(nn.Identity)()\n"
        "dataloader = {}\n"
    )
    with pytest.raises(ValueError, match="dataloader.evaluator: is missing"):
        prepare(tmp_path / "lazy.py")


def test_other_settings_are_another_evaluation(tmp_path):
    config = tmp_path / "a.yaml"
    contents = []
    for threshold in (0.1, 0.2, 0.1):
        config.write_text(f"MODEL: {{ROI_HEADS: {{SCORE_THRESH_TEST: {threshold}}}}}")
        contents.append(prepare(config).content)
    assert contents[0] == contents[2] != contents[1]
