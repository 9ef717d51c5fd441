"""ResNet-18 and ResNet-34 with plugins, which MMDetection's ``BasicBlock`` does not take."""

from __future__ import annotations

from typing import Any

from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
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
