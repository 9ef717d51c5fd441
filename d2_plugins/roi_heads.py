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
    """``Res5ROIHeads`` of a C4 detector, with the plugins of ``MODEL.RESNETS`` in res5.

    The predictor may have a BatchFormer.
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
    """``StandardROIHeads`` that may have an :class:`IDABoxHead` or a BatchFormer."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        box_head, predictor = arguments["box_head"], arguments["box_predictor"]
        arguments["box_predictor"] = _predictor_for(box_head, predictor, cfg)
        return arguments


@ROI_HEADS_REGISTRY.register()
class CascadePluginROIHeads(CascadeROIHeads):
    """``CascadeROIHeads`` that may have :class:`IDABoxHead` or BatchFormers."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        pairs = zip(arguments["box_heads"], arguments["box_predictors"], strict=True)
        arguments["box_predictors"] = [_predictor_for(*pair, cfg) for pair in pairs]
        return arguments


@ROI_BOX_HEAD_REGISTRY.register()
class IDABoxHead(FastRCNNConvFCHead):
    """``FastRCNNConvFCHead`` that also hands on a feature map, for IDA to classify.

    The map is the last convolution's, or the pooled map if ``MODEL.ROI_BOX_HEAD.NUM_CONV`` is 0.
    Parameters are named as in ``FastRCNNConvFCHead``.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_dims: list[int], **layers: Any) -> None:
        super().__init__(input_shape, conv_dims=conv_dims, **layers)
        self.map_channels = conv_dims[-1] if conv_dims else input_shape.channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the output of ``FastRCNNConvFCHead`` and maps (R, C', H, W) for (R, C, H, W)."""
        layers, num_convs = list(self), len(self.conv_norm_relus)
        for conv in layers[:num_convs]:
            x = conv(x)
        feature_map = x
        for layer in layers[num_convs:]:
            x = layer(x)
        return x, feature_map


class IDAOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that classifies by IDA; boxes are regressed as before.

    Args:
        input_shape: shape of the regression's input.
        map_channels: channels of the map to classify.
        num_heads: as :class:`plugin_core.IDAClassifier` takes it; it divides ``map_channels``.
        beta: as there.
        heavy: as there.
        sample_order: as there.
        last_head_norm: as there.
        num_mixers: as there.
        output_layers: arguments of ``FastRCNNOutputLayers``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``map_channels``, or an argument of IDA is out
            of its range.
    """

    cls_score: nn.Module

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        map_channels: int,
        num_heads: int = 4,
        beta: float = 1 / 32,
        heavy: bool = False,
        sample_order: str = "heads",
        last_head_norm: bool = False,
        num_mixers: int = 2,
        **output_layers: Any,
    ) -> None:
        super().__init__(input_shape, **output_layers)
        num_scores = self.num_classes + 1
        self.cls_score = IDAClassifier(
            map_channels,
            num_scores,
            num_heads,
            beta,
            heavy,
            sample_order,
            last_head_norm,
            num_mixers,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        ida: Any = cfg.MODEL.ROI_BOX_HEAD.IDA
        return {**arguments, **{key.lower(): value for key, value in ida.items()}}

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Predict scores (R, K + 1) and deltas from the output of :class:`IDABoxHead`."""
        features, feature_map = x
        return self.cls_score(feature_map), self.bbox_pred(features.flatten(1))


class BatchFormerOutputLayers(FastRCNNOutputLayers):
    """``FastRCNNOutputLayers`` that in training also predict from regions after a BatchFormer.

    All M regions of a batch are one sequence. In training the layers get two streams, (2M, C): the
    plain regions first, then the BatchFormer's. Losses are means over both. Boxes predicted in
    training, as for the next stage of a cascade, are the plain stream's. Evaluation has only the
    plain stream, as in ``FastRCNNOutputLayers``.

    Args:
        input_shape: shape of the box head's output.
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
        output_layers: arguments of ``FastRCNNOutputLayers``.

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
        """Predict scores (M, K + 1) and deltas from (M, ...); for 2M regions in training."""
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
        """Take the predictions of the plain stream."""
        if not self.training:
            return predictions
        scores, deltas = predictions
        count = len(scores) // 2
        return scores[:count], deltas[:count]


def batchformer_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Read the module's arguments from ``MODEL.ROI_BOX_HEAD.BATCHFORMER``."""
    node: Any = cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER
    return {key.lower(): value for key, value in node.items() if key != "ENABLED"}


def check_batchformer(cfg: CfgNode) -> None:
    """Check that a config does not combine a BatchFormer with IDA.

    Raises:
        ValueError: if it does.
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
    """Replace a predictor by the config's, with the same transform of boxes.

    Args:
        before: module before the predictor.
        predictor: the framework's predictor.
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
