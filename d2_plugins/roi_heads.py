"""Detectron2's RoI heads with plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Instances
from torch import Tensor, nn

from d2_plugins.block_plugins import insert_plugins, plugins_of
from d2_plugins.config import naming
from plugin_core import BatchFormer, IDAClassifier


@ROI_HEADS_REGISTRY.register()
class Res5PluginROIHeads(Res5ROIHeads):
    """``Res5ROIHeads``, a C4 detector's, with the plugins of ``MODEL.RESNETS`` for res5.

    Its predictor may have a BatchFormer.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        res5, predictor = arguments["res5"], arguments["box_predictor"]
        insert_plugins(res5, "res5", plugins_of(cfg))
        arguments["box_predictor"] = _predictor_for(res5, predictor, cfg)
        return arguments


@ROI_HEADS_REGISTRY.register()
class StandardPluginROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose box head may be an :class:`IDABoxHead`, or have a BatchFormer."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        box_head, predictor = arguments["box_head"], arguments["box_predictor"]
        arguments["box_predictor"] = _predictor_for(box_head, predictor, cfg)
        return arguments


@ROI_HEADS_REGISTRY.register()
class CascadePluginROIHeads(CascadeROIHeads):
    """``CascadeROIHeads`` whose box heads may be :class:`IDABoxHead`, or have a BatchFormer."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        pairs = zip(arguments["box_heads"], arguments["box_predictors"], strict=True)
        arguments["box_predictors"] = [_predictor_for(*pair, cfg) for pair in pairs]
        return arguments


@ROI_BOX_HEAD_REGISTRY.register()
class IDABoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` that also hands on the map that it flattens, for IDA to classify.

    It is the pooled map, or where ``MODEL.ROI_BOX_HEAD.NUM_CONV`` is not 0 the last convolution's.
    Parameters are named as in ``FastRCNNConvFCHead``.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_dims: list[int], **layers: Any) -> None:
        super().__init__(input_shape, conv_dims=conv_dims, **layers)
        self.map_channels = conv_dims[-1] if conv_dims else input_shape.channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, H, W) of R regions → what ``FastRCNNConvFCHead`` gives, and (R, C', H, W)."""
        layers, num_convs = list(self), len(self.conv_norm_relus)
        for conv in layers[:num_convs]:
            x = conv(x)
        feature_map = x
        for layer in layers[num_convs:]:
            x = layer(x)
        return x, feature_map


class IDAOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that classifies by IDA, and regresses boxes as it does.

    Args:
        input_shape: of what the box head gives the regression.
        map_channels: of the map that it gives the classification.
        num_heads: of IDA; it divides ``map_channels``.
        heavy: whether IDA is of the heavy form.
        output_layers: what ``FastRCNNOutputLayers`` takes.

    Raises:
        ValueError: if ``num_heads`` does not divide ``map_channels``.
    """

    cls_score: nn.Module

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        map_channels: int,
        num_heads: int = 4,
        heavy: bool = False,
        **output_layers: Any,
    ) -> None:
        super().__init__(input_shape, **output_layers)
        self.cls_score = IDAClassifier(map_channels, self.num_classes + 1, num_heads, heavy=heavy)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        ida: Any = cfg.MODEL.ROI_BOX_HEAD.IDA
        return {**arguments, "num_heads": ida.NUM_HEADS, "heavy": ida.HEAVY}

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What :class:`IDABoxHead` gives → scores (R, K + 1), and deltas as without IDA."""
        features, feature_map = x
        return self.cls_score(feature_map), self.bbox_pred(features.flatten(1))


class BatchFormerOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that in training also predict from regions after a BatchFormer.

    All M regions of a batch are one sequence. In training the layers get both streams, (2M, C), the
    plain one first, and losses are means over both. Boxes that are predicted in training, for the
    next stage of a cascade and the like, are the plain stream's. In evaluation there is no other,
    and all is as in ``FastRCNNOutputLayers``.

    Args:
        input_shape: of what the box head gives.
        batchformer: arguments of :class:`plugin_core.BatchFormer`, but for its ``embed_dims``.
        output_layers: what ``FastRCNNOutputLayers`` takes.

    Raises:
        ValueError: if an argument of the BatchFormer is wrong.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        batchformer: Mapping[str, Any] | None = None,
        **output_layers: Any,
    ) -> None:
        super().__init__(input_shape, **output_layers)
        self.batchformer = BatchFormer(self.cls_score.in_features, **(batchformer or {}))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        return {**arguments, "batchformer": batchformer_arguments(cfg)}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (M, K + 1) and deltas of (M, ...); of 2M regions in training."""
        if self.training:
            x = x.flatten(1)
            x = torch.cat((x, self.batchformer(x[:, None])[:, 0]))
        return super().forward(x)

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        if self.training:
            proposals = [*proposals, *proposals]
        return super().losses(predictions, proposals)

    def predict_boxes(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        return super().predict_boxes(self._plain(predictions), proposals)

    def predict_boxes_for_gt_classes(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        return super().predict_boxes_for_gt_classes(self._plain(predictions), proposals)

    def predict_probs(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> list[Tensor]:
        return super().predict_probs(self._plain(predictions), proposals)

    def _plain(self, predictions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Predictions of the plain stream."""
        if not self.training:
            return predictions
        scores, deltas = predictions
        count = len(scores) // 2
        return scores[:count], deltas[:count]


def batchformer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What ``MODEL.ROI_BOX_HEAD.BATCHFORMER`` says of the module itself."""
    node: Any = cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER
    return {key.lower(): value for key, value in node.items() if key != "ENABLED"}


def check_batchformer(cfg: CfgNode) -> None:
    """Check that a BatchFormer is not asked for together with IDA.

    Raises:
        ValueError: if it is.
    """
    box_head: Any = cfg.MODEL.ROI_BOX_HEAD
    if box_head.BATCHFORMER.ENABLED and box_head.NAME == "IDABoxHead":
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED: True, but 'IDABoxHead' classifies a map of "
            "each region, and a BatchFormer relates vectors; set it to False, or "
            "MODEL.ROI_BOX_HEAD.NAME to 'FastRCNNConvFCHead'"
        )


def _predictor_for(
    before: nn.Module, predictor: FastRCNNOutputLayers, cfg: CfgNode
) -> FastRCNNOutputLayers:
    """Give the predictor that a config wants, with the transform of the one that there is.

    Args:
        before: the module whose output it predicts from.
        predictor: that the framework has built for it.
        cfg: the whole config.
    """
    check_batchformer(cfg)
    transform = predictor.box2box_transform
    if isinstance(before, IDABoxHead):
        with naming("MODEL.ROI_BOX_HEAD.IDA"):
            return IDAOutputLayers(
                cfg,
                before.output_shape,
                map_channels=before.map_channels,
                box2box_transform=transform,
            )
    if cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED:
        shape = ShapeSpec(channels=predictor.cls_score.in_features)
        with naming("MODEL.ROI_BOX_HEAD.BATCHFORMER"):
            return BatchFormerOutputLayers(cfg, shape, box2box_transform=transform)
    return predictor
