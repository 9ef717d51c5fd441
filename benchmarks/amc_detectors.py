"""Detectron2's detectors with and without attention mask consistency, with the same weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from auxiliary_losses import PLAIN
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import d2_plugins

CONFIGS = {
    "Faster R-CNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}
_SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.RETINANET.NUM_CONVS", "1"),
]


def build(kind: str, loss: str, device: torch.device, small: bool = False) -> nn.Module:
    """Build a detector.

    Args:
        kind: a key of CONFIGS.
        loss: PLAIN, or any other name for AMC of one class.
        device: of the detector.
        small: a few channels and regions only.
    """
    cfg = get_cfg()
    d2_plugins.add_plugin_config(cfg)
    logging.getLogger("fvcore.common.config").setLevel(logging.ERROR)  # Detectron2's files are safe
    cfg.merge_from_file(get_config_file(CONFIGS[kind]))
    options = ["MODEL.DEVICE", str(device), "MODEL.WEIGHTS", ""]
    if loss != PLAIN:
        options += ["MODEL.META_ARCHITECTURE", f"AMC{cfg.MODEL.META_ARCHITECTURE}"]
    cfg.merge_from_list([*options, *(_SMALL if small else [])])
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, norm in model.named_buffers():
        if name.endswith("conv3.norm.weight"):
            norm.fill_(0.2)  # random residual branches would add up to huge features
    return model


def build_alike(
    kind: str, names: Sequence[str], device: torch.device, small: bool = False
) -> dict[str, nn.Module]:
    """Build detectors with the first one's weights, by the names of their losses."""
    models = {name: build(kind, name, device, small) for name in names}
    first, *others = models.values()
    for other in others:
        other.load_state_dict(first.state_dict())
    return models


def losses(detector: nn.Module, batch: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """Compute the losses of this step by their names."""
    with EventStorage(step):  # heads write their statistics there
        return detector(batch)
