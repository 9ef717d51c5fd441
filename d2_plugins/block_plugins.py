"""Block plugins in Detectron2's ResNets: their settings, and insertion into the blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d
from torch import nn

from plugin_core.block_plugins import ApplyChildren, blocks_of, build_block_plugin, child_name
from plugin_core.errors import ArgumentError
from plugin_core.published_names import read_published_children

logger = logging.getLogger(__name__)

RESNET_STAGES = ("res2", "res3", "res4", "res5")
SETTING = "MODEL.RESNETS.PLUGINS"


@dataclass(frozen=True)
class PluginSettings:
    """A config's entry for a block plugin.

    Args:
        setting: path of the entry, such as "MODEL.RESNETS.PLUGINS[0]".
        name: of the block plugin.
        stages: "res2" … "res5", whose blocks get it.
        blocks: "all" blocks of a stage, or the "last" one.
        warm_start: whether the plugin starts as the identity.
        arguments: of the plugin's module.
        is_upper: whether the config spells keys in capitals, for messages.
    """

    setting: str
    name: str
    stages: tuple[str, ...]
    blocks: str
    warm_start: bool
    arguments: Mapping[str, Any]
    is_upper: bool

    def build(self, channels: int) -> nn.Module:
        """Build the plugin for a block with this number of output channels.

        Raises:
            ValueError: if an argument is wrong; it names the setting.
        """
        try:
            return build_block_plugin(self.name, channels, self.warm_start, **self.arguments)
        except ArgumentError as error:
            key = error.argument.upper() if self.is_upper else error.argument
            raise ValueError(f"{self.setting}.{key}: {error.reason}") from error


def read_plugins(
    plugins: Any, setting: str, stages: Sequence[str], why_these: str = ""
) -> list[PluginSettings]:
    """Read a list of block plugins, in the order in which a block applies them.

    Args:
        plugins: mappings, each with NAME, STAGES, maybe BLOCKS and WARM_START, and the module's
            arguments; in capitals or, in a LazyConfig, in lower case.
        setting: path of the list in the config.
        stages: stages of the network.
        why_these: ends the sentence that names them.

    Raises:
        ValueError: if an entry is no such mapping, names an unknown stage, or repeats a child of a
            stage. The message names the setting.
    """
    if isinstance(plugins, (str, Mapping)) or not isinstance(plugins, Iterable):
        raise ValueError(
            f"{setting}: must be a list such as [{{'NAME': 'triplet_attention', 'STAGES': "
            f"['res4', 'res5']}}], got {plugins!r}"
        )
    read: list[PluginSettings] = []
    for i, entry in enumerate(plugins):
        where = f"{setting}[{i}]"
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{where}: must be a mapping with NAME and STAGES such as {{'NAME': "
                f"'triplet_attention', 'STAGES': ['res4', 'res5']}}, got {entry!r}"
            )
        is_upper = any(str(key).isupper() for key in entry)
        arguments = {str(key).lower(): value for key, value in entry.items()}
        if len(arguments) < len(entry):
            raise ValueError(f"{where}: a key is given twice, in capitals and not: {dict(entry)}")
        for key in ("name", "stages"):
            if key not in arguments:
                shown = key.upper() if is_upper else key
                raise ValueError(f"{where}.{shown}: is missing; got {dict(entry)}")
        name, chosen = arguments.pop("name"), arguments.pop("stages")
        shown = "STAGES" if is_upper else "stages"
        if isinstance(chosen, str) or not isinstance(chosen, Iterable):
            raise ValueError(
                f"{where}.{shown}: must be a list such as ['res4', 'res5'], got {chosen!r}"
            )
        for stage in chosen:
            if stage not in stages:
                raise ValueError(
                    f"{where}.{shown}: unknown stage {stage!r}; there are {', '.join(stages)}"
                    f"{why_these}"
                )
        warm_start = arguments.pop("warm_start", False)
        try:
            blocks = blocks_of(name, arguments.pop("blocks", None))
        except ArgumentError as error:
            key = error.argument.upper() if is_upper else error.argument
            raise ValueError(f"{where}.{key}: {error.reason}") from error
        one = PluginSettings(where, name, tuple(chosen), blocks, warm_start, arguments, is_upper)
        for other in read:
            both = [stage for stage in one.stages if stage in other.stages]
            if both and child_name(str(name)) == child_name(other.name):
                raise ValueError(
                    f"{where}: {name!r} is in {both[0]} already, by {other.setting}; name it once"
                )
        read.append(one)
    return read


def plugins_of(cfg: CfgNode) -> list[PluginSettings]:
    """Read the block plugins of a whole config.

    Raises:
        ValueError: if an entry of ``MODEL.RESNETS.PLUGINS`` is wrong.
    """
    # Detectron2 builds the stages up to the last one that is asked for.
    out_features = [f for f in cfg.MODEL.RESNETS.OUT_FEATURES if f in RESNET_STAGES]
    last = max(map(RESNET_STAGES.index, out_features), default=-1)
    stages, why_these = [*RESNET_STAGES[: last + 1]], ""
    if cfg.MODEL.ROI_HEADS.NAME == "Res5PluginROIHeads":
        stages.append("res5")  # of a C4 detector
    elif len(stages) < len(RESNET_STAGES):
        why_these = f", as MODEL.RESNETS.OUT_FEATURES is {list(cfg.MODEL.RESNETS.OUT_FEATURES)}"
        if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
            why_these += (
                "; the res5 of a C4 detector takes plugins with MODEL.ROI_HEADS.NAME "
                "'Res5PluginROIHeads'"
            )
    return read_plugins(cfg.MODEL.RESNETS.PLUGINS, SETTING, stages, why_these)


def insert_plugins(
    blocks: Iterable[CNNBlockBase], stage: str, plugins: Sequence[PluginSettings]
) -> None:
    """Insert a stage's plugins after the residual branch of its blocks.

    Args:
        blocks: of the stage. A plugin may be for the last alone. In a frozen block the plugins are
            frozen too, with a warning.
        stage: name of the stage.
        plugins: of all stages, in the order in which a block applies them.

    Raises:
        ValueError: if an argument of a plugin is wrong; it names the setting.
    """
    plugins = [plugin for plugin in plugins if stage in plugin.stages]
    if not plugins:
        return
    blocks = list(blocks)
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in blocks]
    for block, is_frozen in zip(blocks, frozen, strict=True):
        for plugin in plugins:
            if plugin.blocks == "last" and block is not blocks[-1]:
                continue
            module = plugin.build(block.out_channels)
            child = child_name(plugin.name)
            if hasattr(block, child):
                raise ValueError(
                    f"{plugin.setting}: {plugin.name!r} would be the block's child {child!r}, and "
                    "the block has one already; rename the class"
                )
            insert_after_residual_branch(block, child, module)
        if is_frozen:
            block.freeze()  # again, for the inserted plugins
    if any(frozen):
        names = " and ".join(plugin.name for plugin in plugins)
        logger.warning(
            f"{stage} is frozen, so its {names} stays as it is loaded. With weights that hold "
            f"none, lower MODEL.BACKBONE.FREEZE_AT (in a LazyConfig: freeze_at) or take {stage} "
            f"out of the plugin's stages ({', '.join(plugin.setting for plugin in plugins)})."
        )


def insert_after_residual_branch(block: CNNBlockBase, name: str, module: nn.Module) -> None:
    """Make ``module`` the child ``name`` of ``block`` and apply it to the residual branch.

    The module works after the branch's last norm, before the shortcut is added. Several modules are
    applied in the order of their insertion. The block keeps its class, its forward and the names
    of its parameters.

    Args:
        block: a ``BasicBlock``, ``BottleneckBlock`` or ``DeformBottleneckBlock``.
        name: name of the child; in a checkpoint its parameters begin with it.
        module: (B, C, H, W) → (B, C, H, W), C being ``block.out_channels``.

    Raises:
        ValueError: if ``block`` has a child of this name, or is of another kind.
    """
    if hasattr(block, name):
        raise ValueError(f"block already has a {name!r}")
    conv = getattr(block, "conv3", getattr(block, "conv2", None))
    if not isinstance(conv, Conv2d) or not isinstance(conv.activation, (type(None), ApplyChildren)):
        raise ValueError(
            "expected a residual block that ends in a convolution without activation, "
            f"got {type(block).__name__}"
        )
    # Detectron2's Conv2d applies its `activation` after its norm. The last convolution of a
    # residual branch has no activation, as ReLU comes after the sum. So the place is free.
    if conv.activation is None:
        conv.activation = ApplyChildren(block)
        read_published_children(block)
    block.add_module(name, module)
    conv.activation.names.append(name)
