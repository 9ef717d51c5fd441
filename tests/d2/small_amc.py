"""Small detectors of Detectron2's with attention mask consistency, and a batch for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_rcnn import shrink
from torch import Tensor, nn

MEAN, MAX = "loss_amc_mean", "loss_amc_max"
PLAIN = {"AMCGeneralizedRCNN": "GeneralizedRCNN", "AMCRetinaNet": "RetinaNet"}
KINDS = pytest.mark.parametrize("kind", ["Standard", "Cascade", "C4", "RetinaNet"])
SIZE = (96, 128)  # height and width of the images


def small(cfg: CfgNode, kind: str, **settings: Any) -> CfgNode:
    """Make ``cfg`` that of a small detector with AMC, of all classes and always with a loss."""
    shrink(cfg, "Cascade" if kind == "Cascade" else "Standard")
    cfg.MODEL.META_ARCHITECTURE = "AMCGeneralizedRCNN"
    if kind == "C4":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64]]
    elif kind == "RetinaNet":
        cfg.MODEL.META_ARCHITECTURE = "AMCRetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
        cfg.MODEL.RETINANET.IN_FEATURES = ["p4", "p5", "p6", "p7"]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    always = {"MEAN_MARGIN": 1.0, "MAX_MARGIN": 1.0, "MEAN_WEIGHT": 1.0, "MAX_WEIGHT": 1.0}
    settings = {"CLASSES": 0, **always, **settings}
    for key, value in settings.items():
        cfg.MODEL.AMC[key] = value
    return cfg


def build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    return build_model(cfg).train()


def plain_of(cfg: CfgNode) -> nn.Module:
    """Detectron2's own detector, with the same weights."""
    plain = cfg.clone()
    plain.MODEL.META_ARCHITECTURE = PLAIN[cfg.MODEL.META_ARCHITECTURE]
    return build(plain)


def image(boxes: list[list[float]], classes: list[int], size: tuple[int, int] = SIZE) -> dict:
    """An image with boxes, and proposals for a detector that wants them."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    proposals = Instances(size)
    corners = torch.rand(12, 2) * 50
    proposals.proposal_boxes = Boxes(torch.cat((corners, corners + 20 + torch.rand(12, 2) * 20), 1))
    proposals.objectness_logits = torch.zeros(12)
    pixels = torch.randint(256, (3, *size)).float()
    return {"image": pixels, "instances": instances, "proposals": proposals}


def batch() -> list[dict]:
    """Three classes in two images, of which the second is padded."""
    first = image([[4, 4, 60, 56], [70, 30, 120, 90], [66, 2, 100, 40]], [0, 2, 2])
    return [first, image([[10, 10, 90, 50]], [1], (64, 100))]


def losses(model: nn.Module, images: list[dict], step: int = 0) -> dict[str, Tensor]:
    """Losses of a step that draws the same regions for every model."""
    torch.manual_seed(3)
    with EventStorage(step):
        return model(images)


def amc(model: nn.Module, images: list[dict]) -> Tensor:
    found = losses(model, images)
    return found[MEAN] + found[MAX]
