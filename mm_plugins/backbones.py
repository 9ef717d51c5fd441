"""ResNets and MobileNetV2 with plugins in places where MMDetection's own take none.

These are the blocks of ResNet-18, ResNet-34 and MobileNetV2, and the last block of a stage alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from mmdet.models.backbones import MobileNetV2
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.models.layers import InvertedResidual
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_plugins.block_plugins import BlockPlugin, is_for_last_block
from mm_plugins.init_cfgs import pretrained
from plugin_core.block_plugins import ApplyChildren
from plugin_core.errors import ArgumentError
from plugin_core.published_names import read_published_children


class PluginBasicBlock(BasicBlock):
    """``BasicBlock`` with plugins after its second norm, before the shortcut is added.

    Args:
        inplanes, planes: channels of the input and of the output.
        plugins: as :class:`Bottleneck` takes them, at the position ``after_conv2``.

    Raises:
        ArgumentError: if a plugin has another position.
    """

    make_block_plugins = Bottleneck.make_block_plugins
    forward_plugin = Bottleneck.forward_plugin

    def __init__(
        self, inplanes: int, planes: int, plugins: list[dict] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, planes, **kwargs)
        plugins = plugins or []
        _check_position(plugins, "after_conv2", "a ResNet-18 or ResNet-34, whose blocks end there")
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
    """``ResNet`` that takes plugins at every depth, and where they say so in one block of a stage.

    An entry of ``plugins`` may have ``blocks``, "all" or "last" of a stage. The class of the plugin
    may have a default of its own; otherwise it is "all", as in ``ResNet``.

    A ResNet-10 has one block of ResNet-18's in each stage, as long-tailed recognition uses it.

    Args:
        contract_dilation: halve the dilation of a stage's first block, as torchvision does. The DC5
            models of DETR's authors need it.
        *arguments: of ``ResNet``.
        **keywords: likewise.
    """

    arch_settings: ClassVar[dict] = {10: (BasicBlock, (1, 1, 1, 1)), **ResNet.arch_settings}

    def __init__(self, *arguments: Any, contract_dilation: bool = False, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.contract_dilation = contract_dilation
        for name in self.res_layers if contract_dilation else ():
            block = getattr(self, name)[0]
            for conv in (block.conv1, block.conv2):
                dilation = tuple(d // 2 for d in conv.dilation)
                if dilation > (0, 0):  # the one of 3×3, with as much padding
                    for module in conv.modules():  # of a deformable one the offsets', too
                        module.dilation = module.padding = dilation
        read_published_children(self)

    def make_res_layer(
        self, block: type[nn.Module], plugins: Sequence[dict] | None = None, **kwargs: Any
    ) -> nn.Module:
        if block is BasicBlock:
            block = PluginBasicBlock
        layer: Any = super().make_res_layer(block=block, plugins=plugins, **kwargs)
        for other in list(layer)[:-1]:
            _remove_plugins_of_last_block(other, plugins or ())
        return layer


@MODELS.register_module()
class PluginMobileNetV2(MobileNetV2):
    """``MobileNetV2`` with plugins after its blocks' last norm, before a shortcut is added.

    Args:
        plugins: as :class:`ResNet` takes them, at the position ``after_linear_conv``, with seven
            ``stages`` (layer1 to layer7), and maybe ``blocks`` as in :class:`PluginResNet`. Blocks
            without a shortcut get them too.
        **kwargs: of ``MobileNetV2``.

    Raises:
        ArgumentError: if a plugin has another position, or its stages are not seven.
    """

    def __init__(self, *, plugins: list[dict] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        plugins = plugins or []
        _check_position(plugins, "after_linear_conv", "a MobileNetV2, whose blocks end there")
        num_stages = len(self.arch_settings)
        for plugin in plugins:
            stages = plugin.get("stages")
            if stages is None:
                stages = (True,) * num_stages
            if not isinstance(stages, (list, tuple)) or len(stages) != num_stages:
                raise ArgumentError(
                    "plugins",
                    f"must have {num_stages} times True or False as stages in a MobileNetV2, "
                    f"got {stages!r}",
                )
            for index, wanted in enumerate(stages, start=1):
                layer = getattr(self, f"layer{index}")
                blocks = layer[-1:] if is_for_last_block(plugin) else layer
                for block in blocks if wanted else ():
                    _insert_after_linear_conv(block, plugin["cfg"])
        # Freeze at once, as ResNet does. MobileNetV2 freezes when the training starts. By then a
        # distributed training waits for these parameters' gradients.
        self._freeze_stages()

    def init_weights(self) -> None:
        is_first = not self.is_init
        super().init_weights()
        if is_first and not pretrained(self.init_cfg):
            # These drew the plugins' weights, too. mmengine does not ask modules below a plain
            # nn.Sequential for theirs, which MobileNetV2's layers are.
            for module in self.modules():
                if isinstance(module, BlockPlugin):
                    module.init_weights()


def _remove_plugins_of_last_block(block: nn.Module, plugins: Sequence[dict]) -> None:
    for position in {plugin["position"] for plugin in plugins}:
        names = getattr(block, f"{position}_plugin_names")
        here = [plugin for plugin in plugins if plugin["position"] == position]
        for name, plugin in zip(list(names), here, strict=True):
            if is_for_last_block(plugin):
                delattr(block, name)
                names.remove(name)


def _insert_after_linear_conv(block: InvertedResidual, cfg: dict) -> None:
    conv = block.linear_conv
    names = Bottleneck.make_block_plugins(block, conv.out_channels, [cfg])
    # ConvModule applies `activate` after its norm. The last one before the shortcut has no
    # activation. So the place is free.
    if not conv.with_activation:
        conv.with_activation, conv.activate = True, ApplyChildren(block)
        read_published_children(block)
    conv.activate.names += names


def _check_position(plugins: Sequence[dict], position: str, backbone: str) -> None:
    for plugin in plugins:
        if plugin.get("position") != position:
            raise ArgumentError(
                "plugins",
                f"must have the position {position!r} in {backbone}, "
                f"got {plugin.get('position')!r}",
            )
