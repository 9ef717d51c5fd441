"""Heads with plugins, and a head that MMDetection's own lacks something for."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from mmdet.models.dense_heads import SSDHead
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.registry import MODELS
from torch import Tensor

from plugin_core import IDAClassifier

# Any other value would take the classifier's map away, or leave parameters without a gradient.
_FIXED = MappingProxyType(
    {
        "num_cls_fcs": 0,
        "with_avg_pool": False,
        "with_cls": True,
        "with_reg": True,
        "cls_predictor_cfg": {"type": "Linear"},
    }
)


@MODELS.register_module()
class IDABBoxHead(ConvFCBBoxHead):
    """``Shared2FCBBoxHead`` that classifies a region's feature map by IDA.

    In place of a ``Shared4Conv1FCBBoxHead`` it takes ``num_shared_convs=4, num_shared_fcs=1``.

    Boxes are regressed as the framework does it, under the same names; fully connected layers
    serve regression alone:

        shared convs -> cls convs -> :class:`plugin_core.IDAClassifier`
                     -> reg convs or shared fcs -> reg fcs -> reg

    The classifier keeps its own initial weights. With the deviation of 0.01 that MMDetection gives
    to a linear one, the norms that its scores are divided by would come near beta, a step would
    turn the weights some 35 times as far, and the scales of a heavy one's norms would start at 0.

    Args:
        num_shared_fcs: as in ``ConvFCBBoxHead``, which has 0 by default.
        num_cls_convs: the same, but together with shared fcs too.
        num_heads: of the classifier, by which the channels of the map can be divided.
        heavy: the classifier attends with two transformer layers and a projection.
        **kwargs: of ``ConvFCBBoxHead``.

    Raises:
        ValueError: if ``num_heads`` does not divide the channels, or an argument contradicts the
            classification of a map.
    """

    def __init__(
        self,
        *,
        num_shared_fcs: int = 2,
        num_cls_convs: int = 0,
        num_heads: int = 4,
        heavy: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value in _FIXED.items():
            if (given := kwargs.pop(name, value)) != value:
                raise ValueError(
                    f"{name} must be {value!r}, as IDABBoxHead classifies a region's feature map "
                    f"by IDA and regresses boxes, got {given!r}"
                )
        if num_shared_fcs > 0 and kwargs.get("num_reg_convs", 0) > 0:
            raise ValueError(
                f"num_shared_fcs must be 0 where num_reg_convs is not, as fully connected layers "
                f"leave no map, got {num_shared_fcs}"
            )
        # Without a classifier, not to build a linear one that is thrown away
        super().__init__(num_shared_fcs=num_shared_fcs, with_cls=False, **kwargs)
        self.with_cls = True
        self.num_cls_convs = num_cls_convs
        channels = self.conv_out_channels if self.num_shared_convs else self.in_channels
        self.cls_convs, _, channels = self._add_conv_fc_branch(num_cls_convs, 0, channels)
        if self.custom_cls_channels:
            num_scores = self.loss_cls.get_cls_channels(self.num_classes)
        else:
            num_scores = self.num_classes + 1  # the background
        self.fc_cls = IDAClassifier(channels, num_scores, num_heads, heavy=heavy)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (M, K + 1) and deltas of boxes for the maps (M, C, H, W) of M regions."""
        for conv in self.shared_convs:
            x = conv(x)
        x_cls = x_reg = x
        for conv in self.cls_convs:
            x_cls = conv(x_cls)
        for conv in self.reg_convs:
            x_reg = conv(x_reg)
        x_reg = x_reg.flatten(1)
        for fc in (*self.shared_fcs, *self.reg_fcs):
            x_reg = self.relu(fc(x_reg))
        return self.fc_cls(x_cls), self.fc_reg(x_reg)


@MODELS.register_module()
class PredictingSSDHead(SSDHead):
    """``SSDHead`` that evaluates.

    MMDetection 3.3's stops at its first prediction, where every dense head is asked for its
    ``loss_cls``: this one computes its loss without a module.
    """

    loss_cls = None
