"""Detectron2's own evaluation of a checkpoint on a COCO-format dataset, as a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from omegaconf import OmegaConf

from d2_plugins.analysis import load_config
from plugin_core.evaluation.comparison.evaluations import Checkpoint, Evaluation, GroundTruth
from plugin_core.shipped import TOOLS
from plugin_core.training.trials import digest

# In the folder of an evaluation: detections with what boxes, masks and keypoints they have
RESULTS = Path("inference") / "coco_instances_results.json"
_DATASET = "compared"


def prepare_evaluation(
    checkpoint: Checkpoint, truth: GroundTruth, folder: Path, iou_type: str
) -> Evaluation:
    """Say how a checkpoint is evaluated.

    Args:
        checkpoint: of a yaml config or a LazyConfig.
        truth: registered as the only dataset of the evaluation.
        folder: of the evaluation; it is not made.
        iou_type: "bbox", "segm" or "keypoints".

    Raises:
        ValueError: if the config is wrong, or has no COCOEvaluator's place.
    """
    cfg: Any = load_config(checkpoint.config)
    register = ["--register-coco", _DATASET, truth.annotations, truth.images]
    common = ["--eval-only", "--config-file", checkpoint.config, *register]
    results = folder / RESULTS
    if isinstance(cfg, CfgNode):
        settings = {
            "OUTPUT_DIR": folder,
            "MODEL.WEIGHTS": checkpoint.weights,
            "DATASETS.TEST": f"('{_DATASET}',)",
            # Of the config's own dataset
            "TEST.EXPECTED_RESULTS": "[]",
            "TEST.AUG.ENABLED": "False",
        }
        words = [str(word) for pair in settings.items() for word in pair]
        command = [str(TOOLS / "train_net.py"), *common, *words]
        return Evaluation([sys.executable, *command], results, digest(cfg))
    if OmegaConf.select(cfg, "dataloader.evaluator") is None:
        raise ValueError("dataloader.evaluator: is missing; a COCOEvaluator belongs there")
    settings = {
        "train.output_dir": folder,
        "train.init_checkpoint": checkpoint.weights,
        "dataloader.test.dataset.names": _DATASET,
        "+dataloader.evaluator.dataset_name": _DATASET,
        "+dataloader.evaluator.output_dir": results.parent,
    }
    words = [f"{key}={_quoted(str(value))}" for key, value in settings.items()]
    command = [str(TOOLS / "lazyconfig_train_net.py"), *common, *words]
    content = digest(_named(OmegaConf.to_container(cfg)))
    return Evaluation([sys.executable, *command], results, content)


def _named(node: Any) -> Any:
    """Put names in the place of a LazyConfig's functions and classes, whose texts vary."""
    if isinstance(node, dict):
        return {key: _named(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_named(value) for value in node]
    return f"{node.__module__}.{node.__qualname__}" if callable(node) else node


def _quoted(text: str) -> str:
    """Write a text as a value that Hydra takes as it is."""
    escaped = text.replace("'", r"\'")
    return f"'{escaped}'"
