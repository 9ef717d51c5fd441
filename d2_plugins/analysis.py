"""Cost of a detector of Detectron2, counted from its config without weights and data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.export import TracingAdapter
from detectron2.modeling import ROIHeads, build_model
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from omegaconf import DictConfig
from torch import nn

from d2_plugins.config import add_plugin_config, load_lazy_config, merge_config
from d2_plugins.mmdet_bridge import count_cost, is_bridge
from plugin_core.inspection.cost import Report, make_report, prepare_model

_LAZY_IMAGE_SIZE = (800, 1333)  # a LazyConfig has no key for the size that it tests at


def load_config(config_file: str) -> CfgNode | DictConfig:
    """Read a yaml file with the plugins' nodes, or a LazyConfig (.py).

    Args:
        config_file: path, or ``model_zoo://`` or ``d2_plugins://`` and a name there.

    Raises:
        ValueError: if the file is missing or wrong, or a LazyConfig defines no model.
    """
    if not config_file.endswith(".py"):
        cfg = get_cfg()
        add_plugin_config(cfg)
        merge_config(cfg, config_file)
        return cfg
    lazy = load_lazy_config(config_file)
    if "model" not in lazy:
        raise ValueError("it defines no `model`, which a LazyConfig does")
    return lazy


def analyze(
    cfg: CfgNode | DictConfig,
    image_size: tuple[int, int] | None = None,
    *,
    activations: bool = True,
) -> Report:
    """Count a detector's parameters, FLOPs and activations for one image, on the CPU.

    The heads work on as many proposals and detections as the config lets through at most.

    Args:
        cfg: of the detector; it is not changed.
        image_size: (height, width) in pixels; the config's test size by default.
        activations: count these as well, which takes longer; otherwise they are 0.

    Raises:
        ValueError: if the config does not say at which size it tests, or a plugin's setting is
            wrong.
    """
    height, width = image_size or _test_size(cfg)
    if isinstance(cfg, CfgNode) and is_bridge(cfg):
        return count_cost(cfg, (height, width), activations=activations)
    if isinstance(cfg, CfgNode):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        model = build_model(cfg)
    else:
        model = instantiate(cfg.model)
    prepare_model(model)
    regions = _let_all_through(model)
    inputs = [{"image": torch.zeros(3, height, width)}]
    flops = _by_module(FlopCountAnalysis(model, inputs))
    counted: Mapping[str, float] = Counter()
    if activations:
        adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
        counted = _by_module(ActivationCountAnalysis(adapter, adapter.flattened_inputs))
    return make_report(model, flops, counted, (height, width), regions)


def _test_size(cfg: CfgNode | DictConfig) -> tuple[int, int]:
    if not isinstance(cfg, CfgNode):
        return _LAZY_IMAGE_SIZE
    if cfg.INPUT.MIN_SIZE_TEST <= 0:
        raise ValueError(
            "INPUT.MIN_SIZE_TEST is 0, which is to test images at the size that they have; "
            "say for which size to count"
        )
    return cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST


def _let_all_through(model: nn.Module) -> dict[str, int]:
    """Switch off NMS and score thresholds, and keep the limits on the number of boxes.

    Returns:
        The numbers of proposals and detections, filled in when the model runs.
    """
    regions: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, RPN):
            module.nms_thresh = 1.0
            module.register_forward_hook(
                lambda _module, _args, output: regions.update(proposals=int(len(output[0][0])))
            )
        elif isinstance(module, ROIHeads):
            module.register_forward_hook(
                lambda _module, _args, output: regions.update(detections=int(len(output[0][0])))
            )
        elif isinstance(module, FastRCNNOutputLayers):
            module.test_score_thresh = 0.0
            module.test_nms_thresh = 1.0
    return regions


def _by_module(analysis: Any) -> dict[str, float]:
    """Get counts by the names of the model's modules; the analysis calls the model "model"."""
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.tracer_warnings("none").by_module()
    return {name.removeprefix("model."): n for name, n in counts.items() if name != "model"}
