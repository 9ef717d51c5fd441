"""Evaluators of datasets, chosen by a dataset's metadata."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from d2_plugins.mmdet_bridge import is_bridge
from d2_plugins.panoptic_quality import PanopticQualityEvaluator


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a registered dataset.

    Args:
        cfg: the whole config; gives the model's tasks and the keypoints' sigmas.
        dataset_name: a registered dataset with ``evaluator_type`` in its metadata.
        output_dir: for predictions in the dataset's format; ``OUTPUT_DIR/inference`` by default.

    Raises:
        ValueError: if the dataset's ``evaluator_type`` is missing or unknown.
    """
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = check_evaluator(dataset_name)
    if kind in _WITHOUT_OUTPUT:
        return _WITHOUT_OUTPUT[kind](dataset_name)
    coco = partial(COCOEvaluator, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    builders = _WITH_OUTPUT[kind]
    if is_bridge(cfg) and kind == "coco_panoptic_seg":
        # MMDetection's panoptic detectors score no pixels by class.
        builders = tuple(build for build in builders if build is not SemSegEvaluator)
    evaluators = [
        (coco if build is COCOEvaluator else build)(dataset_name, output_dir=output_dir)
        for build in builders
    ]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_evaluator(dataset_name: str) -> str:
    """Read and check the ``evaluator_type`` of a registered dataset.

    Raises:
        ValueError: if the type is missing or unknown.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _WITH_OUTPUT and kind not in _WITHOUT_OUTPUT:
        raise ValueError(
            f"dataset {dataset_name!r}: no evaluator for evaluator_type {kind!r} of its metadata; "
            f"there are {', '.join(sorted([*_WITH_OUTPUT, *_WITHOUT_OUTPUT]))}"
        )
    return kind


class _NumpyLVISEvaluator(LVISEvaluator):
    """``LVISEvaluator`` on any NumPy: the last release of lvis, 0.5, is older than 1.24."""

    def evaluate(self) -> Any:
        if hasattr(np, "float"):
            return super().evaluate()
        np.float = float  # type: ignore[attr-defined]  # lvis looks up this alias
        try:
            return super().evaluate()
        finally:
            del np.float  # type: ignore[attr-defined]


_WITH_OUTPUT: dict[str, tuple[Callable[..., DatasetEvaluator], ...]] = {
    "coco": (COCOEvaluator,),
    "coco_panoptic_seg": (SemSegEvaluator, COCOEvaluator, PanopticQualityEvaluator),
    "sem_seg": (SemSegEvaluator,),
    "lvis": (_NumpyLVISEvaluator,),
}
_WITHOUT_OUTPUT: dict[str, type[DatasetEvaluator]] = {
    "pascal_voc": PascalVOCDetectionEvaluator,
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
}
