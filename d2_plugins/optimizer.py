"""AdamW, the optimizer of DETRs, which Detectron2's own settings do not offer.

``SOLVER.OPTIMIZER`` chooses AdamW, and ``SOLVER.LR_FACTORS`` slows down parts of the model.
``SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model"`` clips the norm of all gradients together; "norm"
clips each parameter's gradient by itself. All other settings are Detectron2's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from plugin_core.errors import did_you_mean

_FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build SGD as Detectron2 does, or AdamW.

    Args:
        cfg: only ``SOLVER`` is read.
        model: its trainable parameters are optimized.

    Raises:
        ValueError: if ``SOLVER.OPTIMIZER`` is unknown, or ``SOLVER.LR_FACTORS`` is wrong, is set
            with SGD or names no parameter of the model.
    """
    solver: Any = cfg.SOLVER
    check_solver(cfg)
    if solver.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    groups = reduce_param_groups(list(_with_factors(groups, model, solver.LR_FACTORS)))
    full_model = solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_TYPE == _FULL_MODEL
    kind: Any = torch.optim.AdamW
    if not full_model:
        kind = maybe_add_gradient_clipping(cfg, kind)
    optimizer = kind(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    if full_model:
        optimizer.register_step_pre_hook(_Clipper(cfg))
    return optimizer


def check_solver(cfg: CfgNode) -> None:
    """Check the settings that are not Detectron2's own.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    solver: Any = cfg.SOLVER
    if solver.OPTIMIZER not in ("SGD", "ADAMW"):
        hint = did_you_mean(solver.OPTIMIZER, ("SGD", "ADAMW"))
        raise ValueError(f"SOLVER.OPTIMIZER: expected SGD or ADAMW, got {solver.OPTIMIZER!r}{hint}")
    for pair in solver.LR_FACTORS:
        if not (
            isinstance(pair, (list, tuple))
            and [type(part) for part in pair] in ([str, float], [str, int])
            and 0 <= pair[1] < math.inf
        ):
            raise ValueError(
                "SOLVER.LR_FACTORS: expected pairs of a part of a parameter's name and a factor, "
                f"such as ['backbone', 0.1], got {pair!r}"
            )
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in ("value", "norm", _FULL_MODEL):
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE: expected value, norm or full_model, "
            f"got {clip.CLIP_TYPE!r}"
        )
    if solver.OPTIMIZER == "SGD":
        for setting, used in (
            ("SOLVER.LR_FACTORS", bool(solver.LR_FACTORS)),
            ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.ENABLED and clip.CLIP_TYPE == _FULL_MODEL),
        ):
            if used:
                raise ValueError(f"{setting}: is for SOLVER.OPTIMIZER ADAMW, not for SGD")


class _Clipper:
    def __init__(self, cfg: CfgNode) -> None:
        clip: Any = cfg.SOLVER.CLIP_GRADIENTS
        self.max_norm, self.norm_type = clip.CLIP_VALUE, clip.NORM_TYPE

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.max_norm, self.norm_type)


def _with_factors(
    groups: list[dict[str, Any]], model: nn.Module, factors: Sequence[tuple[str, float]]
) -> Iterator[dict[str, Any]]:
    """Give each parameter a group, slowed down by the first factor that fits its name."""
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter] = f"{names.get(parameter, '')} {name}"  # a shared parameter has several
    for text, _ in factors:
        if not any(text in all_names for all_names in names.values()):
            raise ValueError(
                f"SOLVER.LR_FACTORS: no parameter of the model has {text!r} in its name"
            )
    for group in groups:
        for parameter in group["params"]:
            factor = next((f for text, f in factors if text in names[parameter]), 1.0)
            yield {**group, "params": [parameter], "lr": group["lr"] * factor}
