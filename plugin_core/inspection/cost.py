"""Cost of a detector, stage by stage, and the share of its attention.

The frameworks count by module, each with the modules below it. This file gives every count to one
stage, so that the stages add up to the whole model.

A stage has the name of its module: ``backbone.bottom_up.res3`` in Detectron2, ``backbone.layer2``
in MMDetection. Some stages have no module of their own: ``….stem`` is everything before the first
stage of a backbone, ``backbone.fpn`` is Detectron2's pyramid on top of one, and ``other`` is the
detector's own work outside of its modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from plugin_core.block_plugins import BlockPlugin
from plugin_core.methods.batchformer import BatchFormer
from plugin_core.methods.ida import IDAClassifier

_ATTENTION = (BlockPlugin, IDAClassifier, BatchFormer)
# Where Detectron2's pyramids keep the network that they are built on
_PYRAMID_BASES = ("bottom_up", "net")
_STEM = {"stem", "conv1", "bn1", "gn1", "norm1", "patch_embed"}
_NUMBERED = {"layers", "stages"}  # modules that hold the stages of a backbone
# Rows in the order in which an image passes the stages, as modules are often defined in another.
_BACKBONE, _FPN, _NECK, _ENCODER, _DECODER, _PROPOSALS, _HEADS, _OTHER = range(8)


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs and activations for one image.

    A norm that Detectron2 has frozen has buffers in place of parameters. FLOPs are multiply-adds,
    as in the papers. Activations are the output elements of convolutions and matrix products. The
    frameworks choose the counted operators: no pooling, no sum or product of maps, no deformable
    convolution.
    """

    parameters: int = 0
    flops: int = 0
    activations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.flops + other.flops,
            self.activations + other.activations,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters - other.parameters,
            self.flops - other.flops,
            self.activations - other.activations,
        )


@dataclass(frozen=True)
class Report:
    """Cost of a model for one image.

    Args:
        image_size: (height, width) in pixels, before the model pads the image.
        regions: numbers of boxes that the heads worked on, such as ``{"proposals": 1000}``.
        stages: cost of each stage, in the order in which an image passes them.
        attention_modules: number of modules of attention.
        attention: total cost of the attention; the stages' costs include it.
    """

    image_size: tuple[int, int]
    regions: Mapping[str, int]
    stages: Mapping[str, Cost]
    attention_modules: int
    attention: Cost

    @property
    def total(self) -> Cost:
        return sum(self.stages.values(), Cost())

    def as_dict(self) -> dict[str, Any]:
        """Make the report a dict for JSON, with the total."""
        return {
            "image_size": list(self.image_size),
            "regions": dict(self.regions),
            "stages": {name: asdict(cost) for name, cost in self.stages.items()},
            "attention": {"modules": self.attention_modules, **asdict(self.attention)},
            "total": asdict(self.total),
        }


def prepare_model(model: nn.Module) -> nn.Module:
    """Put ``model`` into evaluation mode and set its parameters to zero.

    The number of boxes depends on a detector's weights: random ones move boxes out of the image,
    where they are dropped. With zeros, every anchor stays in place and all scores are equal. The
    numbers of proposals and detections then depend on the config alone.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.eval()


def make_report(
    model: nn.Module,
    flops: Mapping[str, float],
    activations: Mapping[str, float],
    image_size: tuple[int, int],
    regions: Mapping[str, int],
) -> Report:
    """Give the costs of all modules to stages.

    Args:
        model: the counted model.
        flops: of each module with the modules below it, by its name in ``model``; "" for all.
        activations: likewise.
        image_size: for the report.
        regions: for the report.
    """
    costs = _own_costs(model, flops, activations)
    places = {name: _stage(name, model) for name in costs}
    stages: dict[str, Cost] = {}
    for name in sorted(costs, key=lambda name: places[name][0]):
        stage = places[name][1]
        stages[stage] = stages.get(stage, Cost()) + costs[name]
    attention = [
        Cost(sum(p.numel() for p in module.parameters()), int(flops[name]), int(activations[name]))
        for name, module in model.named_modules()
        if isinstance(module, _ATTENTION)
    ]
    return Report(
        image_size=image_size,
        regions=regions,
        stages={stage: cost for stage, cost in stages.items() if cost != Cost()},
        attention_modules=len(attention),
        attention=sum(attention, Cost()),
    )


def _own_costs(
    model: nn.Module, flops: Mapping[str, float], activations: Mapping[str, float]
) -> dict[str, Cost]:
    """Compute each module's cost without its children's, in the order of ``named_modules()``."""
    parameters: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # shared ones come once
        parameters[name.rpartition(".")[0]] += parameter.numel()
    own_flops, own_activations = _without_children(flops), _without_children(activations)
    return {
        name: Cost(parameters[name], own_flops[name], own_activations[name])
        for name, _ in model.named_modules()
    }


def _without_children(counts: Mapping[str, float]) -> Counter[str]:
    own: Counter[str] = Counter()
    for name, count in counts.items():
        own[name] += int(count)
        if name:
            own[name.rpartition(".")[0]] -= int(count)
    return own


def _stage(name: str, model: nn.Module) -> tuple[int, str]:
    """Find the stage of the module ``name``, and the stage's place in the order of rows."""
    parts = name.split(".")
    first = parts[0]
    if first == "backbone":
        bases = [base for base in _PYRAMID_BASES if hasattr(model.backbone, base)]
        base = ".".join(["backbone", *bases])
        if name == base or name.startswith(f"{base}."):
            return _BACKBONE, _backbone_stage(name, base)
        return _FPN, "backbone.fpn"
    for part, place in (("encoder", _ENCODER), ("decoder", _DECODER)):
        if part in parts:
            return place, ".".join(parts[: parts.index(part) + 1])
    if first in ("proposal_generator", "rpn_head"):
        return _PROPOSALS, first
    if first.endswith(("head", "heads")):
        return _HEADS, ".".join(parts[:2])
    return (_NECK if first == "neck" else _OTHER), first or "other"


def _backbone_stage(name: str, base: str) -> str:
    """Name the stage of the module ``name``, which is the network ``base`` or in it."""
    child, *rest = name.removeprefix(base).lstrip(".").split(".")
    if child in _STEM:
        child = "stem"
    elif child in _NUMBERED and rest:
        child = f"{child}.{rest[0]}"
    return f"{base}.{child}" if child else base
