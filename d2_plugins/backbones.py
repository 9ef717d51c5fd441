"""Detectron2's ResNet backbones with plugin modules in their blocks.

The builders call Detectron2's own and then insert the modules, so that every setting of
``MODEL.RESNETS`` and ``MODEL.FPN`` means what it means there.
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

from d2_plugins.block_plugins import (
    check_lazy_plugins,
    check_resnet_plugins,
    in_order,
    insert_plugins,
    plugins_of_stage,
)


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
    *,
    triplet_attention: Mapping[str, Any] | None = None,
    ida: Mapping[str, Any] | None = None,
    plugin_order: Sequence[str] = ("triplet_attention", "ida"),
    **resnet: Any,
) -> ResNet:
    """Detectron2's ``ResNet`` with plugins, for a LazyConfig.

    In a config whose backbone is an FPN, ``model.backbone.bottom_up`` takes it as ``_target_``.

    Args:
        triplet_attention: ``stages``, a list of "res2" … "res5", and what
            :class:`plugin_core.TripletAttention` takes.
        ida: ``stages``, and what :class:`plugin_core.IDABlock` takes besides its channels.
        plugin_order: in which a block that has both applies them; one not named comes last.
        resnet: what ``ResNet`` takes.

    Raises:
        ValueError: if a stage does not exist or an argument of a plugin is wrong.
        TypeError: if a plugin has no such argument.
    """
    model = ResNet(**resnet)
    plugins = {"triplet_attention": triplet_attention, "ida": ida}
    channels = {stage: getattr(model, stage)[0].out_channels for stage in model.stage_names}
    check_lazy_plugins(plugins, plugin_order, channels)
    for stage in model.stage_names:
        wanted = {}
        for name in in_order(plugin_order):
            arguments = dict(plugins[name] or {})
            if stage in arguments.pop("stages", ()):
                wanted[name] = arguments
        insert_plugins(getattr(model, stage), stage, wanted)
    return model


def _build_with_plugins(
    build: Callable[[CfgNode, ShapeSpec], Backbone], cfg: CfgNode, input_shape: ShapeSpec
) -> Any:
    check_resnet_plugins(cfg)
    backbone = build(cfg, input_shape)
    resnet = backbone.bottom_up if isinstance(backbone, FPN) else backbone
    for stage in resnet.stage_names:
        insert_plugins(getattr(resnet, stage), stage, plugins_of_stage(cfg, stage))
    return backbone
