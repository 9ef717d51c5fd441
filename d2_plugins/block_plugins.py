"""Plugin modules in the residual blocks of Detectron2's ResNets: settings, checks, insertion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d
from torch import Tensor, nn

from plugin_core import IDABlock, TripletAttention

logger = logging.getLogger(__name__)

_DEPTHS = (18, 34, 50, 101, 152)
RESNET_STAGES = ("res2", "res3", "res4", "res5")

# What makes each plugin, from the channels of a block and the plugin's own arguments. The name is
# that of the block's child and of a LazyConfig's argument; MODEL.RESNETS has it in capitals.
PLUGINS: Mapping[str, Callable[..., nn.Module]] = {
    "triplet_attention": lambda channels, **arguments: TripletAttention(**arguments),
    "ida": IDABlock,
}


def insert_plugins(
    blocks: Iterable[CNNBlockBase], stage_name: str, plugins: Mapping[str, Mapping[str, Any]]
) -> None:
    """Insert plugins after the residual branch of each block.

    Args:
        blocks: of a stage. In one that is frozen the plugins are frozen too, with a warning.
        stage_name: for the warning.
        plugins: arguments by names of :data:`PLUGINS`, in the order in which they are applied.
    """
    if not plugins:
        return
    blocks = list(blocks)
    frozen = [not any(p.requires_grad for p in block.parameters()) for block in blocks]
    for block, is_frozen in zip(blocks, frozen, strict=True):
        for name, arguments in plugins.items():
            module = PLUGINS[name](block.out_channels, **arguments)
            insert_after_residual_branch(block, name, module)
        if is_frozen:
            block.freeze()  # once more, for what was inserted
    if any(frozen):
        nodes = " and ".join(f"MODEL.RESNETS.{name.upper()}.STAGES" for name in plugins)
        logger.warning(
            f"{stage_name} is frozen, so its {' and '.join(plugins)} stays as it is loaded. With "
            "weights that hold no attention, lower MODEL.BACKBONE.FREEZE_AT or take "
            f"{stage_name} out of {nodes} (in a LazyConfig: freeze_at and the plugin's stages)."
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


def plugins_of_stage(cfg: CfgNode, stage_name: str) -> dict[str, dict[str, Any]]:
    """What ``MODEL.RESNETS`` puts into the blocks of a stage.

    Returns:
        Arguments by names of :data:`PLUGINS`, in the order of ``MODEL.RESNETS.PLUGIN_ORDER``.
    """
    order = in_order([name.lower() for name in cfg.MODEL.RESNETS.PLUGIN_ORDER])
    return {
        name: _arguments(cfg, name) for name in order if stage_name in _node(cfg, name)["STAGES"]
    }


def in_order(first: Sequence[str]) -> list[str]:
    """All names of :data:`PLUGINS`: some first, and the others as they are there."""
    return list(dict.fromkeys([*first, *PLUGINS]))


def all_stages(cfg: CfgNode) -> dict[str, tuple[str, ...]]:
    """Stages of each plugin that has some, by the setting that names them."""
    return {
        f"MODEL.RESNETS.{name.upper()}.STAGES": tuple(_node(cfg, name)["STAGES"])
        for name in PLUGINS
        if _node(cfg, name)["STAGES"]
    }


def stage_channels(res2: int) -> dict[str, int]:
    """Channels that the stages of a ResNet put out, from those of its first one."""
    return {stage: res2 * 2**i for i, stage in enumerate(RESNET_STAGES)}


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
    _check_order("MODEL.RESNETS.PLUGIN_ORDER", cfg.MODEL.RESNETS.PLUGIN_ORDER, str.upper)
    out_features = cfg.MODEL.RESNETS.OUT_FEATURES
    # Detectron2 builds the stages up to the last one that is asked for.
    last = max((RESNET_STAGES.index(f) for f in out_features if f in RESNET_STAGES), default=-1)
    built = list(RESNET_STAGES[: last + 1])
    has_roi_heads = cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "AMCGeneralizedRCNN")
    roi_heads = cfg.MODEL.ROI_HEADS.NAME if has_roi_heads else None
    if roi_heads == "Res5PluginROIHeads":
        built.append("res5")
    for setting, stages in all_stages(cfg).items():
        for stage in stages:
            if stage not in built:
                c4 = stage == "res5" and roi_heads == "Res5ROIHeads"
                hint = "; the RoI head's takes it by 'Res5PluginROIHeads' as MODEL.ROI_HEADS.NAME"
                raise ValueError(
                    f"{setting}: unknown stage {stage!r}; ResNet-{depth} with "
                    f"MODEL.RESNETS.OUT_FEATURES {list(out_features)} has {', '.join(built)}"
                    + (hint if c4 else "")
                )
    for stage, channels in stage_channels(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS).items():
        for name, arguments in plugins_of_stage(cfg, stage).items():
            try:
                _try(name, channels, arguments)
            except ValueError as error:
                argument = str(error).partition(" ")[0]
                raise ValueError(
                    f"MODEL.RESNETS.{name.upper()}.{argument.upper()}: {error}"
                ) from error


def check_lazy_plugins(
    plugins: Mapping[str, Mapping[str, Any] | None],
    order: Sequence[str],
    channels: Mapping[str, int],
) -> None:
    """Check what a LazyConfig says of plugins.

    Args:
        plugins: of each, ``stages`` and the arguments of its module; None for none.
        order: which come first in a block that has several.
        channels: that each stage of the ResNet puts out, by its name.

    Raises:
        ValueError: if a stage does not exist or an argument of a module is wrong.
        TypeError: if a module has no such argument.
    """
    _check_order("plugin_order", order, str)
    for name, node in plugins.items():
        if node is None:
            continue
        if not isinstance(node, Mapping):
            raise ValueError(f"{name}: expected dict(stages=['res4', 'res5'], …), got {node!r}")
        arguments = dict(node)
        stages = arguments.pop("stages", ())
        if isinstance(stages, str) or not isinstance(stages, Iterable):
            raise ValueError(
                f"{name}.stages: expected a list such as ['res4', 'res5'], got {stages!r}"
            )
        for stage in stages:
            if stage not in channels:
                raise ValueError(
                    f"{name}.stages: unknown stage {stage!r}; this ResNet has {', '.join(channels)}"
                )
            try:
                _try(name, channels[stage], arguments)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error


def _try(name: str, channels: int, arguments: Mapping[str, Any]) -> None:
    with torch.device("meta"):  # no memory and no random numbers
        PLUGINS[name](channels, **arguments)


def _check_order(setting: str, order: Sequence[str], spell: Callable[[str], str]) -> None:
    names = [spell(name) for name in PLUGINS]
    if len(set(order)) < len(order) or not set(order) <= set(names):
        raise ValueError(
            f"{setting}: expected some of {', '.join(names)}, each once, got {list(order)}"
        )


def _node(cfg: CfgNode, name: str) -> dict[str, Any]:
    return cfg.MODEL.RESNETS[name.upper()]


def _arguments(cfg: CfgNode, name: str) -> dict[str, Any]:
    """What the node of a plugin says of the module itself."""
    return {key.lower(): value for key, value in _node(cfg, name).items() if key != "STAGES"}
