"""Detectron2's ResNet backbones with plugin modules in their blocks.

The builders call Detectron2's own and then insert the modules, so that every setting of
``MODEL.RESNETS`` and ``MODEL.FPN`` means what it means there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    ResNet,
    build_resnet_backbone,
)
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from torch import Tensor, nn

from plugin_core import TripletAttention

logger = logging.getLogger(__name__)

_DEPTHS = (18, 34, 50, 101, 152)
_STAGES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
def build_resnet_plugin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """``build_resnet_backbone`` with the plugins of ``MODEL.RESNETS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_resnet_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_resnet_plugin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_resnet_fpn_backbone`` with the plugins of ``MODEL.RESNETS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_plugin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``build_retinanet_resnet_fpn_backbone`` with the plugins of ``MODEL.RESNETS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


def insert_after_residual_branch(block: CNNBlockBase, name: str, module: nn.Module) -> None:
    """Make ``module`` the child ``name`` of ``block`` and apply it to the residual branch.

    It is applied after the branch's last norm, before the shortcut is added. Several modules are
    applied in the order of their insertion. The block keeps its class, its forward and the names
    of its parameters.

    Args:
        block: a ``BasicBlock``, ``BottleneckBlock`` or ``DeformBottleneckBlock``.
        name: of the child, and so of its parameters in a checkpoint.
        module: (B, C, H, W) → (B, C, H, W), C being ``block.out_channels``.

    Raises:
        ValueError: if ``block`` has a child of this name, or is of another kind.
    """
    if hasattr(block, name):
        raise ValueError(f"block already has a {name!r}")
    conv = getattr(block, "conv3", getattr(block, "conv2", None))
    if not isinstance(conv, Conv2d) or not isinstance(
        conv.activation, (type(None), _ResidualPlugins)
    ):
        raise ValueError(
            "expected a residual block that ends in a convolution without activation, "
            f"got {type(block).__name__}"
        )
    # Detectron2's Conv2d applies its `activation` after its norm. The last one of a residual
    # branch has none, as ReLU comes after the sum: so that is the place.
    if conv.activation is None:
        conv.activation = _ResidualPlugins(block)
    block.add_module(name, module)
    conv.activation.names.append(name)


class _ResidualPlugins:
    """Applies the children ``names`` of ``block`` in turn.

    Not an ``nn.Module``: the modules are children of the block and must not be registered twice.
    They are looked up by name, so that replacing a child (FSDP, quantization) takes effect.
    """

    def __init__(self, block: CNNBlockBase) -> None:
        self.block = block
        self.names: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self.block, name)(x)
        return x


def check_resnet_plugins(cfg: CfgNode) -> None:
    """Check the plugins' settings and those that they depend on.

    Raises:
        ValueError: if one is wrong; it names the setting, its value and what would be right.
    """
    depth = cfg.MODEL.RESNETS.DEPTH
    if depth not in _DEPTHS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH: no ResNet of depth {depth}; "
            f"there are {', '.join(map(str, _DEPTHS))}"
        )
    out_features = cfg.MODEL.RESNETS.OUT_FEATURES
    # Detectron2 builds the stages up to the last one that is asked for.
    last = max((_STAGES.index(f) for f in out_features if f in _STAGES), default=-1)
    built = _STAGES[: last + 1]
    for stage in cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES:
        if stage not in built:
            raise ValueError(
                f"MODEL.RESNETS.TRIPLET_ATTENTION.STAGES: unknown stage {stage!r}; ResNet-{depth} "
                f"with MODEL.RESNETS.OUT_FEATURES {list(out_features)} has {', '.join(built)}"
            )
    try:
        _build_triplet_attention(cfg)
    except ValueError as error:
        raise ValueError(f"MODEL.RESNETS.TRIPLET_ATTENTION.KERNEL_SIZE: {error}") from error


def _build_with_plugins(
    build: Callable[[CfgNode, ShapeSpec], Backbone], cfg: CfgNode, input_shape: ShapeSpec
) -> Any:
    check_resnet_plugins(cfg)
    backbone = build(cfg, input_shape)
    _insert_resnet_plugins(cfg, backbone.bottom_up if isinstance(backbone, FPN) else backbone)
    return backbone


def _insert_resnet_plugins(cfg: CfgNode, resnet: ResNet) -> None:
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    for index, stage_name in enumerate(resnet.stage_names, start=2):
        if stage_name not in cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES:
            continue
        for block in getattr(resnet, stage_name):
            insert_after_residual_branch(block, "triplet_attention", _build_triplet_attention(cfg))
            if index <= freeze_at:
                block.freeze()  # once more: Detectron2 froze it before the insertion
        if index <= freeze_at:
            logger.warning(
                f"{stage_name} is frozen (MODEL.BACKBONE.FREEZE_AT {freeze_at}), so its attention "
                "stays as it is loaded. With weights that hold no attention, lower FREEZE_AT or "
                f"take {stage_name} out of MODEL.RESNETS.TRIPLET_ATTENTION.STAGES."
            )


def _build_triplet_attention(cfg: CfgNode) -> TripletAttention:
    node: Any = cfg.MODEL.RESNETS.TRIPLET_ATTENTION
    return TripletAttention(
        kernel_size=node.KERNEL_SIZE, no_spatial=node.NO_SPATIAL, warm_start=node.WARM_START
    )
