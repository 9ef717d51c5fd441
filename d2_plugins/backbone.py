"""Detectron2's ResNet backbones with plugin modules in their blocks.

The builders call Detectron2's own and then insert the modules, so that every setting of
``MODEL.RESNETS`` and ``MODEL.FPN`` means what it means there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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
RESNET_STAGES = ("res2", "res3", "res4", "res5")


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


def build_resnet_with_plugins(
    *, triplet_attention: Mapping[str, Any] | None = None, **resnet: Any
) -> ResNet:
    """Detectron2's ``ResNet`` with plugins, for a LazyConfig.

    In a config whose backbone is an FPN, ``model.backbone.bottom_up`` takes it as ``_target_``.

    Args:
        triplet_attention: ``stages``, a list of "res2" … "res5", and what
            :class:`plugin_core.TripletAttention` takes.
        resnet: what ``ResNet`` takes.

    Raises:
        ValueError: if a stage does not exist or an argument of the attention is wrong.
        TypeError: if the attention has no such argument.
    """
    model = ResNet(**resnet)
    if triplet_attention is not None:
        check_triplet_attention(triplet_attention, model.stage_names)
        arguments = dict(triplet_attention)
        for name in arguments.pop("stages", ()):
            insert_triplet_attention(getattr(model, name), name, **arguments)
    return model


def check_triplet_attention(node: Mapping[str, Any], stage_names: Sequence[str]) -> None:
    """Check what a LazyConfig says of triplet attention.

    Args:
        node: ``stages`` and arguments of :class:`plugin_core.TripletAttention`.
        stage_names: that the ResNet may have.

    Raises:
        ValueError: if a stage does not exist or an argument of the attention is wrong.
        TypeError: if the attention has no such argument.
    """
    arguments = dict(node)
    stages = arguments.pop("stages", ())
    if isinstance(stages, str) or not isinstance(stages, Iterable):
        raise ValueError(
            f"triplet_attention.stages: expected a list such as ['res4', 'res5'], got {stages!r}"
        )
    for name in stages:
        if name not in stage_names:
            raise ValueError(
                f"triplet_attention.stages: unknown stage {name!r}; this ResNet has "
                f"{', '.join(stage_names)}"
            )
    try:
        TripletAttention(**arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"triplet_attention: {error}") from error


def insert_triplet_attention(
    blocks: Iterable[CNNBlockBase], stage_name: str, **arguments: Any
) -> None:
    """Insert triplet attention after the residual branch of each block.

    Args:
        blocks: of a stage. In one that is frozen the attention is frozen too, with a warning.
        stage_name: for the warning.
        arguments: of :class:`plugin_core.TripletAttention`.
    """
    blocks = list(blocks)
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in blocks]
    for block, is_frozen in zip(blocks, frozen, strict=True):
        insert_after_residual_branch(block, "triplet_attention", TripletAttention(**arguments))
        if is_frozen:
            block.freeze()  # once more, for what was inserted
    if any(frozen):
        logger.warning(
            f"{stage_name} is frozen, so its attention stays as it is loaded. With weights that "
            "hold no attention, lower MODEL.BACKBONE.FREEZE_AT or take "
            f"{stage_name} out of MODEL.RESNETS.TRIPLET_ATTENTION.STAGES (in a LazyConfig: "
            "freeze_at and triplet_attention.stages)."
        )


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
    last = max((RESNET_STAGES.index(f) for f in out_features if f in RESNET_STAGES), default=-1)
    built = list(RESNET_STAGES[: last + 1])
    has_roi_heads = cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    roi_heads = cfg.MODEL.ROI_HEADS.NAME if has_roi_heads else None
    if roi_heads == "Res5PluginROIHeads":
        built.append("res5")
    for stage in cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES:
        if stage not in built:
            c4 = stage == "res5" and roi_heads == "Res5ROIHeads"
            hint = "; the RoI head's takes it by 'Res5PluginROIHeads' as MODEL.ROI_HEADS.NAME"
            raise ValueError(
                f"MODEL.RESNETS.TRIPLET_ATTENTION.STAGES: unknown stage {stage!r}; ResNet-{depth} "
                f"with MODEL.RESNETS.OUT_FEATURES {list(out_features)} has {', '.join(built)}"
                + (hint if c4 else "")
            )
    try:
        TripletAttention(**triplet_attention_arguments(cfg))
    except ValueError as error:
        setting = str(error).partition(" ")[0].upper()
        raise ValueError(f"MODEL.RESNETS.TRIPLET_ATTENTION.{setting}: {error}") from error


def triplet_attention_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What ``MODEL.RESNETS.TRIPLET_ATTENTION`` says of the module itself."""
    node: Any = cfg.MODEL.RESNETS.TRIPLET_ATTENTION
    return {
        "kernel_size": node.KERNEL_SIZE,
        "no_spatial": node.NO_SPATIAL,
        "warm_start": node.WARM_START,
        "norm": node.NORM,
    }


def _build_with_plugins(
    build: Callable[[CfgNode, ShapeSpec], Backbone], cfg: CfgNode, input_shape: ShapeSpec
) -> Any:
    check_resnet_plugins(cfg)
    backbone = build(cfg, input_shape)
    resnet = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    for stage_name in resnet.stage_names:
        if stage_name in cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES:
            blocks = getattr(resnet, stage_name)
            insert_triplet_attention(blocks, stage_name, **triplet_attention_arguments(cfg))
    return backbone
