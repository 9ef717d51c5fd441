"""Triplet attention in few passes over its input, which PyTorch's autograd knows.

The passes are operators (:mod:`plugin_core.kernels.triplet_operators`). Between them the gates are
ordinary modules on small maps, with PyTorch's autograd.

A link is an output of ``z_pool`` and an input of ``scale`` without values: it only carries a
gradient. The backward of ``scale`` does not multiply g by the gates. It sends g and the gates
through the links to the backward of ``z_pool``. This runs last, so it adds up the gradient of x in
one pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from plugin_core.kernels import is_compiling
from plugin_core.kernels.triplet_operators import HAS_FAKES
from plugin_core.kernels.triplet_torch import convolution_backward


def is_offered() -> bool:
    """Tell whether the operators serve, or the plain formula has to.

    TorchScript and ONNX have no operators of ours. Ours have no forward derivatives.
    """
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    if is_compiling():
        return HAS_FAKES
    return getattr(forward_ad, "_current_level", -1) < 0  # no dual numbers


def z_pool(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Pool x (B, C, H, W) over H, W and C: maps (B, 2, C, W), (B, 2, H, C) and (B, 2, H, W).

    Returns:
        The maps, maximum and mean, and the links for :func:`scale`.
    """
    if torch.is_grad_enabled():
        found = _ZPool.apply(x, _dtype_of_indices(x) if x.requires_grad else None)
    else:
        found = torch.ops.plugin_core.z_pool(x, None)
    return list(found[:3]), list(found[6:])


def _dtype_of_indices(x: Tensor) -> torch.dtype:
    # They wait for the backward, and no axis of a detector's features is longer. A compiled model
    # must not be bound to such sizes.
    is_short = not is_compiling() and max(x.shape[1:]) < 2**15
    return torch.int16 if is_short else torch.int32


def scale(
    x: Tensor, gates: list[Tensor], links: list[Tensor], weight: Tensor, offset: Tensor
) -> Tensor:
    """Compute ``x * (weight * sum(gates) + offset)``.

    The gates are kept as they are, so that memory is shared with what made them.

    Args:
        x: (B, C, H, W).
        gates: (B, 1, C, W), (B, 1, H, C) and (B, 1, H, W).
        links: of :func:`z_pool`.
        weight: scalar.
        offset: scalar.
    """
    wide = links[1].dtype
    inputs = [*(gate.to(wide) for gate in gates), weight.to(wide), offset.to(wide)]
    if torch.is_grad_enabled():
        scaled: Tensor = _Scale.apply(x, *inputs, *links)
    else:
        scaled = torch.ops.plugin_core.scale(x, *_weighted(*inputs))
    return scaled


def _weighted(*inputs: Tensor) -> list[Tensor]:
    """Give three maps whose sum is what x is multiplied by, of three gates, weight and offset."""
    cw, hc, hw, weight, offset = inputs
    return [cw * weight + offset, hc * weight, hw * weight]


def correlate(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``F.conv2d(x, weight, padding=k // 2)`` for a weight (1, I, k, k), in x's dtype."""
    operator = _Correlate.apply if torch.is_grad_enabled() else torch.ops.plugin_core.correlate
    made: Tensor = operator(x, weight.to(x.dtype))
    return made


# ---------------------------------------------------------------------------------------- gradients


def _signed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the signature, which PyTorch would find out anew in each call, for 50 µs."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class _ZPool(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_signed
    def forward(x: Tensor, indices: torch.dtype | None) -> tuple[Tensor, ...]:
        return tuple(torch.ops.plugin_core.z_pool(x, indices))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (x, dtype), indices = inputs, output[3:6]
        ctx.outputs = [(made.shape, made.dtype, made.device) for made in output]
        ctx.mark_non_differentiable(*indices)
        # x may need a gradient in an outer transform of torch.func alone, or after an export.
        ctx.save_for_backward(*([x] if dtype is None else indices))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if all(grad is None for grad in grads):
            return None, None
        # A map that no gate used has no gradient. In second order the links have none.
        pooled, (g, *gates) = (
            [
                torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
                for grad, (shape, dtype, device) in zip(grads[part], ctx.outputs[part], strict=True)
            ]
            for part in (slice(3), slice(6, None))
        )
        indices = ctx.saved_tensors
        if len(indices) == 1:
            x = indices[0].detach()
            indices = torch.ops.plugin_core.z_pool(x, torch.int32)[3:6]
        # PyTorch's operators have derivatives, for create_graph.
        if torch.is_grad_enabled():
            return _input_gradient_with_derivatives(g, gates, pooled, indices), None
        maps = (*gates, *pooled, *indices)
        return torch.ops.plugin_core.input_gradient(g, *maps), None


class _Scale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_signed
    def forward(x: Tensor, *inputs: Tensor) -> Tensor:
        scaled: Tensor = torch.ops.plugin_core.scale(x, *_weighted(*inputs[:5]))  # links follow
        return scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *gates, weight, offset = ctx.saved_tensors
        if torch.is_grad_enabled():
            product = (g * x).to(gates[0].dtype)
            sums = [product.sum(2), product.sum(3).mT, product.sum(1)]
            sums = [s.unsqueeze(1) for s in sums]
        else:
            sums = torch.ops.plugin_core.product(g, x)
        for_weight = for_offset = None
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            of_gates = [(gate * s).sum() for gate, s in zip(gates, sums, strict=True)]
            for_weight, for_offset = torch.stack(of_gates).sum(), sums[0].sum()
        # The first gradient of x goes through the links. Higher ones go through the saved x.
        links = _weighted(*gates, weight, offset)
        return None, *(s * weight for s in sums), for_weight, for_offset, g, *links


class _ScaleByMaps:
    """Gradient of the operator ``scale`` by itself, in a program that was exported."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *maps = ctx.saved_tensors
        ops = torch.ops.plugin_core
        gx = ops.scale(g, *maps) if ctx.needs_input_grad[0] else None
        return gx, *ops.product(g, x)


class _Product(_ScaleByMaps):
    @staticmethod
    def backward(ctx: Any, *maps: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        ops = torch.ops.plugin_core
        return ops.scale(x, *maps), ops.scale(g, *maps)


class _Correlate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @_signed
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        made: Tensor = torch.ops.plugin_core.correlate(x, weight)
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return convolution_backward(g, x, weight, for_x, for_weight)
        ops = torch.ops.plugin_core
        gx = ops.correlate(g, weight.flip(2, 3).transpose(0, 1)) if for_x else None
        gw = ops.correlate_weight_gradient(g, x, weight.shape[2]) if for_weight else None
        return gx, gw


def _input_gradient_with_derivatives(
    g: Tensor, gates: Sequence[Tensor], pooled: Sequence[Tensor], indices: Sequence[Tensor]
) -> Tensor:
    """Compute ``input_gradient`` by PyTorch's operators, out of place."""
    # Lay each map along the axes of g, with size 1 on the pooled axis.
    axes = {2: (0, 2, 1, 3), 3: (0, 3, 2, 1), 1: (0, 1, 2, 3)}
    cw, hc, hw = (gate.permute(order) for gate, order in zip(gates, axes.values(), strict=True))
    grad = g * (cw + hc + hw)
    for p, at, (axis, order) in zip(pooled, indices, axes.items(), strict=True):
        maximum, mean = (p[:, i : i + 1].permute(order) for i in (0, 1))
        index = at.unsqueeze(1).permute(order).long()
        grad = grad + mean / g.shape[axis]
        grad = grad + torch.zeros_like(grad).scatter(axis, index, maximum)
    return grad.to(g.dtype)


if HAS_FAKES:
    # For the operators by themselves, as in an exported program that is trained
    _GRADIENTS: dict[str, Any] = {
        "z_pool": _ZPool, "scale": _ScaleByMaps, "product": _Product, "correlate": _Correlate,
    }  # fmt: skip
    for _name, _gradient in _GRADIENTS.items():
        torch.library.register_autograd(
            f"plugin_core::{_name}", _gradient.backward, setup_context=_gradient.setup_context
        )
