"""RoI heads with plugins."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mm_plugins.batchformer import repeat
from mm_plugins.settings import build_from
from plugin_core import BatchFormer, IDAClassifier
from plugin_core.errors import ArgumentError
from plugin_core.stand_ins import view

# Any other value would deny the classifier its map, or leave parameters without a gradient.
_FIXED = MappingProxyType(
    {
        "with_avg_pool": False,
        "with_cls": True,
        "with_reg": True,
        "num_cls_fcs": 0,  # num_mixers are the classifier's layers
        "cls_predictor_cfg": {"type": "Linear"},
    }
)


@MODELS.register_module()
class IDABBoxHead(ConvFCBBoxHead):
    """``Shared2FCBBoxHead`` that classifies a region's feature map by IDA.

    To replace a ``Shared4Conv1FCBBoxHead``, set ``num_shared_convs=4, num_shared_fcs=1``.

    Boxes are regressed as in MMDetection, under the same names. Fully connected layers serve
    regression alone:

        shared convs -> cls convs -> :class:`plugin_core.IDAClassifier`
                     -> reg convs or shared fcs -> reg fcs -> reg

    The classifier keeps its own initial weights. MMDetection would draw them with a deviation of
    0.01, as for a linear classifier. Then the norms that divide scores would come near beta, and a
    step would turn the weights some 35 times as far. The norms' scales of the heavy form would
    start at 0.

    Args:
        num_shared_fcs: as in ``ConvFCBBoxHead``, where the default is 0.
        num_cls_convs: as in ``ConvFCBBoxHead``, but also allowed with shared fcs.
        num_heads: as :class:`plugin_core.IDAClassifier` takes it; it divides the channels of the
            map.
        beta: as there.
        heavy: as there.
        sample_order: as there.
        last_head_norm: as there.
        num_mixers: as there.
        **kwargs: of ``ConvFCBBoxHead``.

    Raises:
        ArgumentError: if ``num_heads`` does not divide the channels, an argument of the classifier
            is out of its range, or another one contradicts the classification of a map.
    """

    def __init__(
        self,
        *,
        num_shared_fcs: int = 2,
        num_cls_convs: int = 0,
        num_heads: int = 4,
        beta: float = 1 / 32,
        heavy: bool = False,
        sample_order: str = "heads",
        last_head_norm: bool = False,
        num_mixers: int = 2,
        **kwargs: Any,
    ) -> None:
        for name, value in _FIXED.items():
            if (given := kwargs.pop(name, value)) != value:
                raise ArgumentError(
                    name,
                    f"must be {value!r}, as IDABBoxHead classifies a region's feature map by IDA "
                    f"and regresses boxes, got {given!r}",
                )
        if num_shared_fcs > 0 and kwargs.get("num_reg_convs", 0) > 0:
            raise ArgumentError(
                "num_shared_fcs",
                "must be 0 where num_reg_convs is not, as fully connected layers leave no map, "
                f"got {num_shared_fcs}",
            )
        # No classifier, as a linear one would be thrown away
        super().__init__(num_shared_fcs=num_shared_fcs, with_cls=False, **kwargs)
        self.with_cls = True
        self.num_cls_convs = num_cls_convs
        channels = self.conv_out_channels if self.num_shared_convs else self.in_channels
        self.cls_convs, _, channels = self._add_conv_fc_branch(num_cls_convs, 0, channels)
        if self.custom_cls_channels:
            num_scores = self.loss_cls.get_cls_channels(self.num_classes)
        else:
            num_scores = self.num_classes + 1  # the background
        self.fc_cls = IDAClassifier(
            channels,
            num_scores,
            num_heads,
            beta,
            heavy,
            sample_order,
            last_head_norm,
            num_mixers,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict scores (M, K + 1) and deltas of boxes for the maps (M, C, H, W) of M regions."""
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
class BatchFormerBBoxHead(ConvFCBBoxHead):
    """``Shared2FCBBoxHead`` that in training also predicts from regions after a BatchFormer.

    To replace a ``Shared4Conv1FCBBoxHead``, set ``num_shared_convs=4, num_shared_fcs=1``.

    After the shared layers, all M regions of a batch are one sequence. In training the later layers
    get two streams, (2M, C): the plain regions first, then the BatchFormer's. Losses are means over
    both. Boxes for the next stage of a cascade are the plain stream's. Evaluation has only the
    plain stream, as in ``ConvFCBBoxHead``.

    Args:
        num_shared_fcs: as in ``ConvFCBBoxHead``, where the default is 0.
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
            MMDetection's default initialization leaves its parameters as they are.
        **kwargs: of ``ConvFCBBoxHead``.

    Raises:
        ArgumentError: if an argument of the BatchFormer is wrong, or another argument leaves it
            no vectors.
    """

    def __init__(
        self,
        *,
        num_shared_fcs: int = 2,
        batchformer: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if num_shared_fcs < 1:
            raise ArgumentError(
                "num_shared_fcs",
                "must be at least 1, as the BatchFormer relates the vectors that shared fully "
                f"connected layers give, got {num_shared_fcs}",
            )
        for name in ("num_cls_convs", "num_reg_convs"):
            if kwargs.get(name, 0) != 0:
                raise ArgumentError(
                    name,
                    f"must be 0, as shared fully connected layers leave no map, got {kwargs[name]}",
                )
        super().__init__(num_shared_fcs=num_shared_fcs, **kwargs)
        self.batchformer = build_from(
            "batchformer", BatchFormer, batchformer or {}, embed_dims=self.shared_out_channels
        )

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Predict scores and deltas for maps (M, C, H, W) of M regions; for 2M in training."""
        # Without gradients there is no training: a teacher's predictions are plain.
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        # MMDetection's own forward runs twice: up to the branches on M regions, and from there on
        # 2M. A view of the head replaces the parts that shall not run.
        branches = {"cls_fcs": nn.ModuleList(), "reg_fcs": nn.ModuleList()}
        predictors = {"fc_cls": nn.Identity(), "fc_reg": nn.Identity()}
        until = view(self, **branches, **predictors)
        cls_features, reg_features = super(BatchFormerBBoxHead, until).forward(x)
        features = cls_features if reg_features is None else reg_features
        both = torch.cat((features, self.batchformer(features[:, None])[:, 0]))
        shared = {"shared_convs": nn.ModuleList(), "shared_fcs": nn.ModuleList()}
        behind = view(self, **shared, avg_pool=nn.Identity())
        return super(BatchFormerBBoxHead, behind).forward(both)

    def loss(
        self,
        cls_score: Tensor | None,
        bbox_pred: Tensor | None,
        rois: Tensor,
        *targets: Tensor,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compute the losses of both streams in training, from one stream's regions and targets."""
        predictions = bbox_pred if cls_score is None else cls_score
        if predictions is not None and len(predictions) == 2 * len(rois):
            rois, targets = repeat(rois), repeat(targets)
        return super().loss(cls_score, bbox_pred, rois, *targets, **kwargs)

    def refine_bboxes(
        self,
        sampling_results: list[Any],
        bbox_results: dict[str, Any],
        batch_img_metas: list[dict],
    ) -> list[InstanceData] | None:
        """Refine the plain stream's boxes for the next stage."""
        count = len(bbox_results["rois"])
        plain = {name: bbox_results[name][:count] for name in ("cls_score", "bbox_pred")}
        return super().refine_bboxes(sampling_results, {**bbox_results, **plain}, batch_img_metas)
