"""Backbones with plugins where MMDetection's own take none: ResNet-18, ResNet-34, MobileNetV2."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmdet.models.backbones import MobileNetV2
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class PluginBasicBlock(BasicBlock):
    """``BasicBlock`` with plugins after its second norm, before the shortcut is added.

    Args:
        inplanes, planes: channels of the input and of the output.
        plugins: as :class:`Bottleneck` takes them, at the position ``after_conv2``.

    Raises:
        ValueError: if a plugin's position is another one.
    """

    make_block_plugins = Bottleneck.make_block_plugins
    forward_plugin = Bottleneck.forward_plugin

    def __init__(
        self, inplanes: int, planes: int, plugins: list[dict] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, planes, **kwargs)
        plugins = plugins or []
        for plugin in plugins:
            if plugin["position"] != "after_conv2":
                raise ValueError(
                    f"plugins: position must be 'after_conv2' in a ResNet-18 or ResNet-34, whose "
                    f"blocks end in conv2, got {plugin['position']!r}"
                )
        self.after_conv2_plugin_names = self.make_block_plugins(
            planes, [plugin["cfg"] for plugin in plugins]
        )

    def forward(self, x: Tensor) -> Tensor:
        def residual_sum(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            out = self.forward_plugin(out, self.after_conv2_plugin_names)
            return out + (x if self.downsample is None else self.downsample(x))

        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint(residual_sum, x, use_reentrant=False))
        return self.relu(residual_sum(x))


@MODELS.register_module()
class PluginResNet(ResNet):
    """``ResNet`` that takes plugins at every depth; for 50 and more layers it is ``ResNet``."""

    def make_res_layer(self, block: type[nn.Module], **kwargs: Any) -> nn.Module:
        if block is BasicBlock:
            block = PluginBasicBlock
        return super().make_res_layer(block=block, **kwargs)


@MODELS.register_module()
class PluginMobileNetV2(MobileNetV2):
    """``MobileNetV2`` with plugins after its blocks' last norm, before a shortcut is added.

    Args:
        plugins: as :class:`ResNet` takes them, at the position ``after_linear_conv``, with seven
            ``stages`` (layer1 to layer7). Blocks without a shortcut get them too.
        **kwargs: of ``MobileNetV2``.

    Raises:
        ValueError: if a plugin's position is another one, or its stages are not seven.
    """

    def __init__(self, *, plugins: list[dict] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        num_stages = len(self.arch_settings)
        for plugin in plugins or []:
            stages = plugin.get("stages")
            if stages is None:
                stages = (True,) * num_stages
            if plugin["position"] != "after_linear_conv":
                raise ValueError(
                    "plugins: position must be 'after_linear_conv' in a MobileNetV2, whose blocks "
                    f"end in linear_conv, got {plugin['position']!r}"
                )
            if len(stages) != num_stages:
                raise ValueError(
                    f"plugins: stages must be {num_stages} times True or False in a MobileNetV2, "
                    f"got {stages!r}"
                )
            for index, wanted in enumerate(stages, start=1):
                for block in getattr(self, f"layer{index}") if wanted else ():
                    _insert_after_linear_conv(block, plugin["cfg"])
        # As ResNet does. MobileNetV2 freezes when the training starts, which is after a distributed
        # one has been told to wait for these parameters' gradients.
        self._freeze_stages()


def _insert_after_linear_conv(block: InvertedResidual, cfg: dict) -> None:
    conv = block.linear_conv
    (name,) = Bottleneck.make_block_plugins(block, conv.out_channels, [cfg])
    # A hook, as the block has no method between this convolution and the sum.
    conv.register_forward_hook(partial(_apply_plugin, block, name))


def _apply_plugin(
    block: InvertedResidual, name: str, conv: nn.Module, inputs: Any, out: Tensor
) -> Tensor:
    return getattr(block, name)(out)
