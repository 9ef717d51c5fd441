"""Detectron2's RoI heads with plugin modules in their blocks."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

from d2_plugins.backbone import insert_triplet_attention, triplet_attention_arguments


@ROI_HEADS_REGISTRY.register()
class Res5PluginROIHeads(Res5ROIHeads):
    """``Res5ROIHeads``, a C4 detector's, with triplet attention where its STAGES name res5."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        if "res5" in cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES:
            insert_triplet_attention(arguments["res5"], "res5", **triplet_attention_arguments(cfg))
        return arguments
