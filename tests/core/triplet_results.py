"""Triplet attention's results in a step, by our operators and by the formula without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from plugin_core import BlockPlugin, TripletAttention
from plugin_core.kernels import triplet

FORMATS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def attention(
    kernel_size: int = 3, no_spatial: bool = False, warm_start: bool = False
) -> nn.Module:
    """Triplet attention by itself, or with a warm start that is under way."""
    module = TripletAttention(kernel_size=kernel_size, no_spatial=no_spatial)
    if not warm_start:
        return module
    plugin = BlockPlugin(module, "triplet_attention", warm_start=True)
    nn.init.constant_(plugin.get_parameter("alpha"), 0.7)
    return plugin


FORMULA = "formula"


def results(module: nn.Module, x: Tensor, kernels: str) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step in training.

    Args:
        module: is left as it is.
        x: its input.
        kernels: one of PLUGIN_KERNELS, or FORMULA for the formula without our operators.
    """
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        take(kernels, patch)
        y = module(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weight).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **dict(module.named_buffers())}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def take(kernels: str, patch: pytest.MonkeyPatch) -> None:
    if kernels == FORMULA:
        patch.setattr(triplet, "is_offered", lambda: False)
    else:
        patch.setenv("PLUGIN_KERNELS", kernels)
