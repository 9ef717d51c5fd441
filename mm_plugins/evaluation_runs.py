"""MMDetection's own evaluation of a checkpoint on a COCO-format dataset, as a command."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric
from mmdet.registry import METRICS
from mmdet.utils import register_all_modules

from mm_plugins.analysis import load_config
from mm_plugins.dataset_nodes import find_datasets
from plugin_core.evaluation.comparison.evaluations import Checkpoint, Evaluation, GroundTruth
from plugin_core.shipped import TOOLS
from plugin_core.training.trials import digest


def prepare_evaluation(
    checkpoint: Checkpoint, truth: GroundTruth, folder: Path, iou_type: str
) -> Evaluation:
    """Say how a checkpoint is evaluated.

    The command reads a config in the folder, which is the user's with other data.
    ``--cfg-options`` would take paths with commas or spaces apart.

    Args:
        checkpoint: of a config of either style.
        truth: takes the place of ``test_dataloader``'s dataset.
        folder: of the evaluation; it is not made.
        iou_type: "bbox" or "segm".

    Raises:
        ValueError: if the config is wrong or tests on no one dataset in COCO's format, or for
            keypoints, which MMDetection does not evaluate.
    """
    if iou_type == "keypoints":
        raise ValueError("--iou-type keypoints: MMDetection evaluates no keypoints")
    try:
        cfg = copy.deepcopy(load_config(checkpoint.config))
    except ValueError:
        raise
    except Exception as error:  # of mmengine's reader, or of the config's own code
        raise ValueError(f"{type(error).__name__}: {error}") from error
    register_all_modules(init_default_scope=False)
    content = digest(cfg._cfg_dict.to_dict())
    loader = cfg.get("test_dataloader") or {}
    datasets = list(find_datasets(loader.get("dataset"), "test_dataloader.dataset", files=False))
    if len(datasets) != 1:
        raise ValueError(
            f"test_dataloader.dataset: must be one dataset in COCO's format, got {len(datasets)}"
        )
    annotations = os.path.abspath(truth.annotations)
    images = os.path.join(os.path.abspath(truth.images), "")
    datasets[0].node.update(data_root="", ann_file=annotations, data_prefix={"img": images})
    cfg.test_evaluator = coco_metric(cfg.get("test_evaluator"), "test_evaluator")
    cfg.test_evaluator.update(
        ann_file=annotations, outfile_prefix=results_prefix(folder), format_only=False
    )
    cfg.work_dir = str(folder)
    logger = (cfg.get("default_hooks") or {}).get("logger")
    if logger:
        logger.interval = 5  # for the progress
    config = folder / "config.py"
    command = [sys.executable, str(TOOLS / "test_mmdet.py"), str(config), checkpoint.weights]
    return Evaluation(
        command, results_file(folder, iou_type), content, {config: lambda: cfg.pretty_text}
    )


def results_prefix(folder: Path) -> str:
    """Give a CocoMetric's ``outfile_prefix`` for an evaluation in a folder."""
    return str((folder / "results").absolute())


def results_file(folder: Path, iou_type: str = "bbox") -> Path:
    """Name the file of detections that a CocoMetric writes with :func:`results_prefix`."""
    return Path(f"{results_prefix(folder)}.{iou_type}.json")


def coco_metric(evaluator: Any, setting: str) -> Any:
    """Find the evaluator in COCO's format among a config's; raises ValueError."""
    for metric in evaluator if isinstance(evaluator, Sequence) else [evaluator or {}]:
        name = metric.get("type")
        kind = METRICS.get(name) if isinstance(name, str) else name
        if kind is CocoMetric and metric.get("ann_file"):
            return metric
    raise ValueError(f"{setting}: must have a CocoMetric with an ann_file to compare by")
