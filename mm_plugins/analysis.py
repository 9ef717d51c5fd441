"""Cost of MMDetection's detectors and MMPretrain's classifiers, counted from a config alone."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg, register_all_modules
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import nn

from plugin_core.inspection.cost import Report, make_report, prepare_model
from plugin_core.shipped import shipped_config


def load_config(config_file: str) -> Config:
    """Read a config.

    Args:
        config_file: path, or ``mmdet::``, ``mmpretrain::`` or ``mm_plugins::`` and a name there.

    Raises:
        FileNotFoundError: if this project has no such config.
        ValueError: if the config defines no model.
    """
    config_file = shipped_config(config_file)
    cfg = get_config(config_file) if "::" in config_file else Config.fromfile(config_file)
    if "model" not in cfg:
        raise ValueError("it defines no `model`")
    return cfg


def analyze(
    cfg: Config, image_size: tuple[int, int] | None = None, *, activations: bool = True
) -> Report:
    """Count the parameters, FLOPs and activations of a model for one image, on the CPU.

    Like MMDetection's own tool, this counts up to the heads' outputs. Unlike the tool, it takes as
    many proposals as the config lets through at most. A mask head gets the first 100 of these, or
    all in a cascade.

    Args:
        cfg: the whole config; it is not changed.
        image_size: (height, width) in pixels; the config's test size by default.
        activations: count these as well, which takes longer; otherwise they are 0.

    Raises:
        ValueError: if the config does not say at which size it tests.
    """
    height, width = image_size or _test_size(cfg)
    register_all_modules(init_default_scope=False)
    model_cfg = copy.deepcopy(cfg.model)
    rpn = (model_cfg.get("test_cfg") or {}).get("rpn")
    if rpn:
        rpn.nms = {"type": "nms", "iou_threshold": 1.0}  # drops none
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        model: Any = prepare_model(revert_sync_batchnorm(MODELS.build(model_cfg)))
        regions = _count_regions(model)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        data = {"inputs": [image]}
        if cfg.get("default_scope") != "mmpretrain":
            data["data_samples"] = [_sample(height, width)]
        data = model.data_preprocessor(data)
        # Bind all but the pixels beforehand, as MMDetection's own tool for FLOPs does.
        model.forward = partial(model.forward, data_samples=data.get("data_samples"))
        with torch.no_grad():
            flops = _by_module(FlopAnalyzer(model, data["inputs"]))
            counted: Mapping[str, float] = Counter()
            if activations:
                counted = _by_module(ActivationAnalyzer(model, data["inputs"]))
    return make_report(model, flops, counted, (height, width), regions)


def _sample(height: int, width: int) -> DetDataSample:
    shape = {"ori_shape": (height, width), "img_shape": (height, width)}
    sample = DetDataSample(metainfo={"img_id": 0, "scale_factor": (1.0, 1.0), **shape})
    # Some heads look for ground truth without using it.
    none = {"bboxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    sample.gt_instances = InstanceData(**none)
    return sample


def _test_size(cfg: Config) -> tuple[int, int]:
    try:
        pipeline = get_test_pipeline_cfg(cfg)
    except (AttributeError, RuntimeError):
        pipeline = []
    for transform in reversed(pipeline):
        if transform.get("type") == "CenterCrop":
            size = transform["crop_size"]  # of MMPretrain, (height, width)
            return (size, size) if isinstance(size, int) else tuple(size)
        if str(transform.get("type")).endswith("Resize") and "scale" in transform:
            scale = transform["scale"]
            width, height = (scale, scale) if isinstance(scale, int) else scale
            return height, width
    raise ValueError(
        "test_dataloader.dataset.pipeline has no Resize with a `scale`, so the size of test images "
        "is not known; say for which size to count"
    )


def _count_regions(model: nn.Module) -> dict[str, int]:
    """Note the numbers of boxes that the heads get when the model runs."""
    regions: dict[str, int] = {}

    def note(what: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        regions[what] = int(args[0].shape[0])

    for what, name in (("proposals", "bbox_head"), ("masks", "mask_head")):
        head = getattr(getattr(model, "roi_head", None), name, None)
        if isinstance(head, nn.ModuleList):  # of the stages of a cascade
            head = head[0]
        if head is not None:
            head.register_forward_pre_hook(partial(note, what))
    return regions


def _by_module(analysis: Any) -> dict[str, float]:
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none").by_module()
