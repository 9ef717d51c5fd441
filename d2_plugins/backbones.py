"""Detectron2's ResNet backbones with block plugins.

The builders call Detectron2's own and then insert the modules. So every setting of
``MODEL.RESNETS`` and ``MODEL.FPN`` keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
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
from omegaconf import OmegaConf
from torch import nn

from d2_plugins.block_plugins import insert_plugins, plugins_of, read_plugins


@BACKBONE_REGISTRY.register()
def build_resnet_plugin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Call ``build_resnet_backbone`` and insert the block plugins of ``MODEL.RESNETS.PLUGINS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_resnet_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_resnet_plugin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Call ``build_resnet_fpn_backbone`` and insert ``MODEL.RESNETS.PLUGINS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_plugin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Call ``build_retinanet_resnet_fpn_backbone`` and insert ``MODEL.RESNETS.PLUGINS``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    return _build_with_plugins(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


def build_resnet_with_plugins(
    *, plugins: Sequence[Mapping[str, Any]] = (), **resnet: Any
) -> ResNet:
    """Build Detectron2's ``ResNet`` with block plugins, for a LazyConfig.

    With an FPN, make this function the ``_target_`` of ``model.backbone.bottom_up``.

    Args:
        plugins: entries of ``MODEL.RESNETS.PLUGINS`` in lower case, such as
            ``[dict(name="triplet_attention", stages=["res4", "res5"], warm_start=True)]``.
        resnet: arguments of ``ResNet``.

    Raises:
        ValueError: if a plugin's setting is wrong; it names the setting.
    """
    model = ResNet(**resnet)
    # Constructors are to get plain lists and mappings.
    plain: Any = OmegaConf.to_container(plugins) if OmegaConf.is_config(plugins) else plugins
    insert = read_plugins(plain, "model.backbone.bottom_up.plugins", model.stage_names)
    for stage in model.stage_names:
        insert_plugins(getattr(model, stage), stage, insert)
    return model


def _build_with_plugins(
    build: Callable[[CfgNode, ShapeSpec], Backbone], cfg: CfgNode, input_shape: ShapeSpec
) -> Any:
    plugins = plugins_of(cfg)
    backbone = build(cfg, input_shape)
    resnet = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    for stage in resnet.stage_names:
        insert_plugins(getattr(resnet, stage), stage, plugins)
    return backbone


def last_stage(backbone: nn.Module) -> str:
    """Name the last stage of a detector's backbone; raises ValueError if it has no stages."""
    name, stages_of = "backbone", backbone
    if isinstance(getattr(backbone, "bottom_up", None), nn.Module):  # of an FPN
        name, stages_of = "backbone.bottom_up", backbone.get_submodule("bottom_up")
    stages = getattr(stages_of, "stage_names", None)
    if not stages:
        kind = type(stages_of).__name__
        raise ValueError(f"{name} is a {kind}, which has no stages as a ResNet has")
    return f"{name}.{stages[-1]}"
