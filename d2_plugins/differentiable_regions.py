"""Regions of interest that are differentiated twice, as AMC needs it.

Regions whose logits depend on no other region can be computed once more by themselves, which is
much less to differentiate than all of them. RoIAlign has no second derivative: a pooler that has
takes the place of a detector's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from plugin_core.kernels.sampling import linear_operator

# Modules that see each region of interest alone
_ROW_WISE = {
    *(FastRCNNConvFCHead, FastRCNNOutputLayers, BottleneckBlock, nn.ModuleList, nn.Sequential),
    *(Conv2d, FrozenBatchNorm2d, nn.GroupNorm, nn.Conv2d, nn.Linear, nn.Flatten),
    *(nn.ReLU, nn.Identity),
}


def is_row_wise(heads: Any) -> bool:
    """Tell whether a region's logits are known to depend on no other region.

    Args:
        heads: RoI heads of a detector.
    """
    kind = type(heads)
    if isinstance(heads, Res5ROIHeads):
        is_known = kind.forward is Res5ROIHeads.forward
        parts = [heads.res5, heads.box_predictor]
    else:
        is_known = getattr(kind, "_forward_box", None) in (
            StandardROIHeads._forward_box,
            CascadeROIHeads._forward_box,
        )
        parts = [heads.box_head, heads.box_predictor] if is_known else []
    return is_known and all(type(m) in _ROW_WISE for part in parts for m in part.modules())


def region_logits(heads: Any, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
    """Compute the logits of each image's boxes as row-wise heads do.

    Args:
        heads: RoI heads, of which :func:`is_row_wise` is true.
        maps: the pooler's feature maps, each (B, C, H, W).
        boxes: of each of the B images.

    Returns:
        (R, classes + 1) for the R boxes of all images.
    """
    if isinstance(heads, CascadeROIHeads):
        proposals = [Instances((0, 0), proposal_boxes=of_image) for of_image in boxes]
        scores, _ = heads._run_stage(maps, proposals, heads.num_cascade_stages - 1)
    elif isinstance(heads, Res5ROIHeads):
        pooled = heads._shared_roi_transform(maps, boxes)
        scores, _ = heads.box_predictor(pooled.mean(dim=[2, 3]))
    else:
        scores, _ = heads.box_predictor(heads.box_head(heads.box_pooler(maps, boxes)))
    return scores


class TwiceDifferentiablePooler(ROIPooler):
    """``ROIPooler`` with second derivatives; a detector's own pooler takes this class in a step."""

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        pooled: Tensor = super().forward(x, box_lists)
        if not pooled.requires_grad:
            return pooled
        dtype, kind = x[0].dtype, x[0].device.type
        lowered = dtype in (torch.float16, torch.bfloat16)

        def pool(maps: Sequence[Tensor]) -> Tensor:
            # The backward pass may run outside of the forward pass's autocast.
            with torch.autocast(kind, dtype=dtype if lowered else None, enabled=lowered):
                again: Tensor = ROIPooler.forward(self, list(maps), box_lists)
            return again

        return linear_operator(pool, pooled, x)
