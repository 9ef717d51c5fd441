"""What the tests of Detectron2's backbones share."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

ALL_STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = pytest.mark.parametrize("depth", [18, 50])  # of basic and of bottleneck blocks


def set_depth(cfg: CfgNode, depth: int) -> None:
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64  # Detectron2 asks for it


def without_plugins(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("_plugin", "")
    plain.MODEL.RESNETS.PLUGINS = []
    return plain


def is_attention(name: str) -> bool:
    return ".triplet_attention." in name


def attention_of(model: nn.Module) -> set[str]:
    """Names that a checkpoint has to hold for the attention (a count of batches is no loss)."""
    names = set(filter(is_attention, model.state_dict()))
    return {n for n in names if not n.endswith("num_batches_tracked")}


def by_state_dict(names: Iterable[str]) -> set[str]:
    """Names that PyTorch says are missing, as the state dict spells them."""
    return {name.replace(".triplet_attention.module.", ".triplet_attention.") for name in names}


def randomize(module: nn.Module) -> None:
    """Give norms and gates values that differ from their initial ones, as training does."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)
