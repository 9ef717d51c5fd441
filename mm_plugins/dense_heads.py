"""A dense head of MMDetection that lacks something."""

from __future__ import annotations

from mmdet.models.dense_heads import SSDHead
from mmdet.registry import MODELS


@MODELS.register_module()
class PredictingSSDHead(SSDHead):
    """``SSDHead`` that evaluates.

    MMDetection 3.3's stops at its first prediction, where every dense head is asked for its
    ``loss_cls``: this one computes its loss without a module.
    """

    loss_cls = None
