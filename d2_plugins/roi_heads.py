"""Detectron2's RoI heads with plugins."""

from __future__ import annotations

from typing import Any

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
from torch import Tensor, nn

from d2_plugins.resnet_plugins import insert_plugins, plugins_of_stage
from plugin_core import IDAClassifier


@ROI_HEADS_REGISTRY.register()
class Res5PluginROIHeads(Res5ROIHeads):
    """``Res5ROIHeads``, a C4 detector's, with the plugins that ``MODEL.RESNETS`` has for res5."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super().from_config(cfg, input_shape)
        insert_plugins(arguments["res5"], "res5", plugins_of_stage(cfg, "res5"))
        return arguments


@ROI_HEADS_REGISTRY.register()
class StandardPluginROIHeads(StandardROIHeads):
    """``StandardROIHeads`` whose box head may be an :class:`IDABoxHead`."""

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        box_head, predictor = arguments["box_head"], arguments["box_predictor"]
        arguments["box_predictor"] = _predictor_for(box_head, predictor, cfg)
        return arguments


@ROI_HEADS_REGISTRY.register()
class CascadePluginROIHeads(CascadeROIHeads):
    """``CascadeROIHeads`` whose box heads may be :class:`IDABoxHead` each."""

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


def _predictor_for(
    box_head: nn.Module, predictor: FastRCNNOutputLayers, cfg: CfgNode
) -> FastRCNNOutputLayers:
    """Give the predictor that belongs to a box head, with the transform of the one that it has."""
    if not isinstance(box_head, IDABoxHead):
        return predictor
    return IDAOutputLayers(
        cfg,
        box_head.output_shape,
        map_channels=box_head.map_channels,
        box2box_transform=predictor.box2box_transform,
    )
