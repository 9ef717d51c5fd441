"""A small R-CNN of Detectron2's on an FPN, with the plugins' RoI heads, and an image for it."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from torch import nn


def shrink(cfg: CfgNode, kind: str) -> CfgNode:
    """Make ``cfg`` that of a small detector; ``kind`` of RoI heads is Standard or Cascade."""
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64]]
    cfg.MODEL.RPN.IN_FEATURES = ["p4", "p5", "p6"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 30
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 10
    cfg.MODEL.ROI_HEADS.NAME = f"{kind}PluginROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    head = cfg.MODEL.ROI_BOX_HEAD
    head.NAME = "FastRCNNConvFCHead"
    head.NUM_FC, head.FC_DIM, head.POOLER_RESOLUTION = 2, 32, 7
    head.CLS_AGNOSTIC_BBOX_REG = kind == "Cascade"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [8]
    return cfg


def predictors(model: nn.Module) -> list[Any]:
    """The box predictor of each stage."""
    predictor = model.roi_heads.box_predictor
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]


def example() -> dict[str, Any]:
    """A random image with two objects, their masks and keypoints."""
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 36], [20, 30, 60, 62]]))
    instances.gt_classes = torch.tensor([0, 2])
    instances.gt_masks = BitMasks(torch.ones(2, 64, 64, dtype=torch.bool))
    instances.gt_keypoints = Keypoints(torch.full((2, 17, 3), 30.0))
    return {"image": torch.randint(256, (3, 64, 64)).float(), "instances": instances}
