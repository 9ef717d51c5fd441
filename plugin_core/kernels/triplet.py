"""Triplet attention in few passes over its input: three forward, four back.

A backend offers passes over tensors (B, P, Q, R) that are contiguous. P, Q, R are C, H, W, or
H, W, C in channels_last. The map PQ reduces x over R, PR over Q, and QR over P:

    pool            maximum and mean of x over each axis, and the index of the first maximum
    scale           x * (PQ + PR + QR)
    product         sums of g * x over each axis
    input_gradient  g * (PQ + PR + QR), plus the gradient that goes through ``pool``

Between the passes the gates are ordinary modules on small maps, with PyTorch's autograd.

A link is an output of ``pool`` and an input of ``scale`` without values: it only carries a
gradient. The backward of ``scale`` does not multiply g by the gates. It sends g and the gates
through the links to the backward of ``pool``. This runs last, so it adds up the gradient of x in
one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from plugin_core.kernels import choice, is_plain_tensor
from plugin_core.kernels.triplet_cpu import CpuPasses


class Passes(Protocol):
    """A backend. Maps are in float32, or in float64 for such an x."""

    def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Give maps (B, 2, rows, columns), maximum and mean, and indices (B, rows, columns)."""

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        """Write y, laid out as x."""

    def product(self, g: Tensor, x: Tensor) -> list[Tensor]: ...

    def input_gradient(
        self, g: Tensor, gates: list[Tensor], pooled: list[Tensor], indices: list[Tensor]
    ) -> Tensor: ...

    def correlate(self, x: Tensor, weight: Tensor) -> Tensor: ...

    def correlate_weight_gradient(self, g: Tensor, x: Tensor, k: int) -> Tensor: ...


def passes_for(x: Tensor) -> Passes | None:
    """Choose the backend for x (B, C, H, W), or None for the plain formula.

    Raises:
        RuntimeError: if ``PLUGIN_KERNELS=fast`` and this machine lacks what the backend needs.
        ValueError: if ``PLUGIN_KERNELS`` has an unknown value.
    """
    if choice() == "plain" or not is_plain_tensor(x) or x.numel() == 0:
        return None
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return None
    # Only on demand, as no GPU has run them yet.
    if x.device.type == "cuda" and choice() == "fast":
        from plugin_core.kernels.triplet_cuda import CudaPasses  # imports Triton

        return CudaPasses.of(x)
    return CpuPasses.of(x)


def z_pool(x: Tensor, passes: Passes) -> tuple[list[Tensor], list[Tensor], tuple[bool, ...]]:
    """Pool x over H, W and C: maps (B, 2, C, W), (B, 2, H, C) and (B, 2, H, W).

    Returns:
        The maps, maximum and mean, as the backend lays them out; the links for :func:`scale`; and
        for each map whether its rows and columns are exchanged.
    """
    maps = _ZPool.apply(x, passes, torch.is_grad_enabled() and x.requires_grad)
    return list(maps[:3]), list(maps[3:]), _Layout(x).exchanged


def scale(x: Tensor, gates: list[Tensor], links: list[Tensor], passes: Passes) -> Tensor:
    """Compute ``x * sum(gates)`` for gates of one channel, laid out as the maps of ``z_pool``."""
    wide = links[1].dtype
    return _Scale.apply(passes, x, *(gate.to(wide) for gate in gates), *links)


def correlate(x: Tensor, weight: Tensor, passes: Passes) -> Tensor:
    """Compute ``F.conv2d(x, weight, padding=k // 2)`` for a weight (1, I, k, k), in x's dtype."""
    return _Correlate.apply(x, weight.to(x.dtype), passes)


class _ZPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, passes: Passes, indices: bool) -> tuple[Tensor, ...]:
        ctx.passes, ctx.layout = passes, _Layout(x)
        pooled, found = passes.pool(ctx.layout.to_pqr(x), indices)
        ctx.save_for_backward(*found)
        ctx.set_materialize_grads(False)
        maps = ctx.layout.to_named(pooled)
        # Gradients need links of their shapes; nobody reads the links' values.
        slots = [m.new_empty(()).expand(m[:, :1].shape) for m in maps]
        outputs = (*maps, x.new_empty(()).expand(x.shape), *slots)
        ctx.outputs = [(output.shape, output.dtype, output.device) for output in outputs]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if all(grad is None for grad in grads):
            return None, None, None
        # A map that no gate used has no gradient. In second order the links have none.
        pooled_and_links = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.outputs, strict=True)
        ]
        pooled, g, gates = pooled_and_links[:3], pooled_and_links[3], pooled_and_links[4:]
        # PyTorch's operators have derivatives, for create_graph, and take batches of gradients.
        if torch.is_grad_enabled() or not is_plain_tensor(g):
            upright = ctx.layout.upright
            indices = ctx.layout.to_named(ctx.saved_tensors)
            return _input_gradient(g, *map(upright, (gates, pooled, indices))), None, None
        gx = ctx.passes.input_gradient(
            ctx.layout.to_pqr(g),
            ctx.layout.from_named(gates),
            ctx.layout.from_named(pooled),
            list(ctx.saved_tensors),
        )
        return ctx.layout.from_pqr(gx), None, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, x: Tensor, *maps: Tensor) -> Tensor:
        gates = maps[:3]  # the links follow
        ctx.passes, ctx.layout = passes, _Layout(x)
        ctx.save_for_backward(x, *gates)
        y = torch.empty_like(x)  # no view, as the shortcut may be added in place
        gates_of_pqr = ctx.layout.from_named(gates)
        passes.scale(ctx.layout.to_pqr(x), gates_of_pqr, ctx.layout.to_pqr(y))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *gates = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_tensor(g):
            product = (g * x).to(gates[0].dtype)
            upright = [product.sum(2), product.sum(3).transpose(1, 2), product.sum(1)]
            sums = ctx.layout.upright(upright)  # or the other way round
        else:
            pqr = ctx.layout.to_pqr(g), ctx.layout.to_pqr(x)
            sums = ctx.layout.to_named(ctx.passes.product(*pqr))
        # The first gradient of x goes through the links. Higher ones go through the saved x.
        return None, None, *(s.unsqueeze(1) for s in sums), g, *gates


def _input_gradient(
    g: Tensor, gates: Sequence[Tensor], pooled: Sequence[Tensor], indices: Sequence[Tensor]
) -> Tensor:
    """Compute ``Passes.input_gradient`` by PyTorch's operators."""
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


class _Correlate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, passes: Passes) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(x, weight)
        return passes.correlate(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, _ = ctx.needs_input_grad
        k = weight.shape[2]
        if torch.is_grad_enabled() or not is_plain_tensor(g):
            half, which = [k // 2] * 2, [for_x, for_weight, False]
            gx, gw, _ = torch.ops.aten.convolution_backward(
                g, x, weight, None, [1, 1], half, [1, 1], False, [0, 0], 1, which
            )
            return gx, gw, None
        gx = ctx.passes.correlate(g, weight.flip(2, 3).transpose(0, 1)) if for_x else None
        gw = ctx.passes.correlate_weight_gradient(g, x, k) if for_weight else None
        return gx, gw, None


class _Layout:
    """Translate between (B, C, H, W) with maps cw, hc, hw and (B, P, Q, R) with PQ, PR, QR."""

    def __init__(self, x: Tensor) -> None:
        self._channels_last = not x.is_contiguous()

    def to_pqr(self, x: Tensor) -> Tensor:
        """View (B, C, H, W) as contiguous (B, P, Q, R)."""
        return (x.permute(0, 2, 3, 1) if self._channels_last else x).contiguous()

    def from_pqr(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._channels_last else x

    def to_named(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Sort PQ, PR and QR as cw, hc, hw."""
        pq, pr, qr = maps
        return [qr, pr, pq] if self._channels_last else [pr, pq, qr]

    def from_named(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Sort cw, hc and hw as PQ, PR, QR, contiguous."""
        cw, hc, hw = (m.contiguous() for m in maps)
        return [hw, hc, cw] if self._channels_last else [hc, cw, hw]

    @property
    def exchanged(self) -> tuple[bool, ...]:
        """Tell whether rows and columns of cw, hc and hw are exchanged."""
        return (True, False, False) if self._channels_last else (False, True, False)

    def upright(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Exchange rows and columns back, as the names cw, hc and hw have them."""
        return [m.mT if x else m for m, x in zip(maps, self.exchanged, strict=True)]
