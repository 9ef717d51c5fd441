"""MMDetection's ResNets with plugins, whose checkpoints are detectors' backbones, in MMPretrain."""

from __future__ import annotations

from typing import Any

from mmpretrain.registry import MODELS

from mm_plugins import backbones, block_plugins


@MODELS.register_module()
class PluginResNet(backbones.PluginResNet):
    """:class:`mm_plugins.backbones.PluginResNet` whose norms train unless they are told not to.

    Args:
        *arguments: of that class.
        norm_eval: keep the norms' statistics, as MMDetection does by default.
        **keywords: of that class.
    """

    def __init__(self, *arguments: Any, norm_eval: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, norm_eval=norm_eval, **keywords)


for _kind in (backbones.PluginMobileNetV2, *block_plugins.LAYERS):
    MODELS.register_module(module=_kind)
