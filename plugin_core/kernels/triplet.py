"""Triplet attention in few passes over its input, as operators that PyTorch's dispatcher knows.

A backend offers passes over tensors (B, P, Q, R). P, Q, R are C, H, W, or H, W, C in channels_last.
The map PQ reduces x over R, PR over Q, and QR over P:

    pool            maximum and mean of x over each axis, and the index of the first maximum
    scale           x * (PQ + PR + QR)
    product         sums of g * x over each axis
    input_gradient  g * (PQ + PR + QR), plus the gradient that goes through ``pool``

Each is an operator ``torch.ops.plugin_core.…`` with an implementation for fake tensors, so that
``torch.compile``, ``torch.export`` and FLOP counters know it. Its implementation chooses the
backend when it runs. Operators take and give maps by what they pool: ``cw`` (B, ·, C, W), ``hc``
(B, ·, H, C) and ``hw`` (B, ·, H, W). In memory, rows and columns of one of them are exchanged.

Between the passes the gates are ordinary modules on small maps, with PyTorch's autograd.

A link is an output of ``z_pool`` and an input of ``scale`` without values: it only carries a
gradient. The backward of ``scale`` does not multiply g by the gates. It sends g and the gates
through the links to the backward of ``z_pool``. This runs last, so it adds up the gradient of x in
one pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import flop_counter

from plugin_core.kernels import choice, is_compiling
from plugin_core.kernels.triplet_cpu import CpuPasses
from plugin_core.kernels.triplet_torch import TorchPasses, convolution_backward


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


def is_offered() -> bool:
    """Tell whether the operators serve, or the plain formula has to.

    TorchScript and ONNX have no operators of ours. Ours have no forward derivatives.
    """
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return False
    if is_compiling():
        return _HAS_FAKES
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


def is_exchanged(pooled: Tensor) -> bool:
    """Tell whether a map lies in memory with rows and columns exchanged."""
    return not pooled.is_contiguous() and pooled.mT.is_contiguous()


# --------------------------------------------------------------------------------- implementations
# ``passes`` gives the backend for a tensor (B, P, Q, R).

_Backend = Callable[[Tensor], Passes]


def backend(x: Tensor) -> Passes:
    """Choose the backend for x (B, P, Q, R).

    Raises:
        RuntimeError: if ``PLUGIN_KERNELS=fast`` and this machine lacks what the backend needs.
        ValueError: if ``PLUGIN_KERNELS`` has an unknown value.
    """
    found: Passes | None = None
    if choice() != "plain" and x.is_contiguous() and x.numel():
        if x.device.type == "cuda":
            from plugin_core.kernels.triplet_cuda import CudaPasses  # imports Triton

            found = CudaPasses.of(x)
        else:
            found = CpuPasses.of(x)
    return TorchPasses() if found is None else found


def _z_pool(passes: _Backend, x: Tensor, indices: torch.dtype | None) -> tuple[Tensor, ...]:
    layout = _Layout.of(x)
    pqr = layout.to_pqr(x)
    pooled, at = passes(pqr).pool(pqr, indices is not None)
    maps = layout.to_named(pooled)
    if indices is None:
        found = [x.new_empty(0, dtype=torch.int16) for _ in maps]
    else:
        found = [index.to(indices) for index in layout.to_named(at)]
    # Gradients need links of their shapes; nobody reads the links' values.
    links = [x.new_zeros(()).expand(x.shape)]
    links += [m.new_zeros(()).expand(m[:, :1].shape) for m in maps]
    return *maps, *found, *links


def _scale(passes: _Backend, x: Tensor, *maps: Tensor) -> Tensor:
    layout, y = _Layout.of(x), torch.empty_like(x)
    pqr, gates = layout.to_pqr(x), layout.from_named(maps)
    passes(pqr).scale(pqr, [gate[:, 0] for gate in gates], layout.to_pqr(y))
    return y


def _product(passes: _Backend, g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    layout = _Layout.of(x)
    pqr = layout.to_pqr(x)
    sums = passes(pqr).product(layout.to_pqr(g, pqr), pqr)
    return tuple(layout.to_named([s.unsqueeze(1) for s in sums]))


def _input_gradient(passes: _Backend, g: Tensor, *maps: Tensor) -> Tensor:
    layout = _Layout(is_exchanged(maps[6]))  # as x was, of whose pooling these are the indices
    pqr = layout.to_pqr(g).contiguous()
    gates, pooled, at = (layout.from_named(maps[i : i + 3]) for i in (0, 3, 6))
    gates, at = [gate[:, 0] for gate in gates], [index.int() for index in at]
    gx = passes(pqr).input_gradient(pqr, gates, pooled, at)
    return layout.from_pqr(gx)


def _correlate(passes: _Backend, x: Tensor, weight: Tensor) -> Tensor:
    x = x.contiguous()
    return passes(x).correlate(x, weight)


def _correlate_weight_gradient(passes: _Backend, g: Tensor, x: Tensor, k: int) -> Tensor:
    x = x.contiguous()
    return passes(x).correlate_weight_gradient(g.contiguous(), x, k)


class _Layout:
    """Translate between (B, C, H, W) with maps cw, hc, hw and (B, P, Q, R) with PQ, PR, QR."""

    def __init__(self, channels_last: bool) -> None:
        self.channels_last = channels_last

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return cls(channels_last and not x.is_contiguous())

    def to_pqr(self, x: Tensor, like: Tensor | None = None) -> Tensor:
        """View (B, C, H, W) as (B, P, Q, R), contiguous if ``like`` is."""
        pqr = x.permute(0, 2, 3, 1) if self.channels_last else x
        return pqr.contiguous() if like is not None and like.is_contiguous() else pqr

    def from_pqr(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self.channels_last else x

    def to_named(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Sort PQ, PR and QR as cw, hc, hw, with their rows and columns."""
        pq, pr, qr = maps
        return [qr.mT, pr, pq] if self.channels_last else [pr, pq.mT, qr]

    def from_named(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Sort cw, hc and hw as PQ, PR, QR, contiguous."""
        cw, hc, hw = maps
        sorted_maps = [hw, hc, cw.mT] if self.channels_last else [hc.mT, cw, hw]
        return [m.contiguous() for m in sorted_maps]


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


# ------------------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("plugin_core", "FRAGMENT")
_HAS_FAKES = hasattr(torch.library, "register_fake")  # since PyTorch 2.4
_TAGS: dict[str, Any] = {}
if _HAS_FAKES:
    # A compiled model must not change how inputs lie in memory: the outputs' strides depend on it.
    _STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    _TAGS = {"tags": (torch.Tag.pt2_compliant_tag, _STRIDES)}
_MAPS = "Tensor {0}cw, Tensor {0}hc, Tensor {0}hw"
_GATES, _POOLED, _INDICES = map(_MAPS.format, ("", "pooled_", "index_"))


def _register(schema: str, implementation: Callable[..., Any], is_folded: bool = True) -> None:
    """Define an operator for every device, for fake tensors and for vmap.

    Args:
        schema: of the operator.
        implementation: takes what chooses a backend, and the operator's arguments.
        is_folded: under vmap, join the further axis with the batch's; otherwise take turns.
    """
    name = schema.partition("(")[0]
    operator = f"plugin_core::{name}"
    _LIBRARY.define(schema, **_TAGS)
    # By its name, so that a test can choose another
    real = functools.partial(implementation, lambda x: backend(x))
    _LIBRARY.impl(name, real, "CompositeExplicitAutograd")
    if _HAS_FAKES:
        fake = functools.partial(implementation, lambda x: TorchPasses())
        torch.library.register_fake(operator, fake)
    if hasattr(torch.library, "register_vmap"):  # since PyTorch 2.5
        overload = getattr(torch.ops.plugin_core, name).default
        rule = functools.partial(_in_one_batch if is_folded else _in_turns, overload)
        torch.library.register_vmap(operator, rule)


def _in_one_batch(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    count = info.batch_size
    folded = [
        (arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)).flatten(0, 1)
        if isinstance(arg, Tensor)
        else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    made = operator(*folded)
    if isinstance(made, Tensor):
        return made.unflatten(0, (count, -1)), 0
    return tuple(m.unflatten(0, (count, -1)) for m in made), (0,) * len(made)


def _in_turns(operator: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    turns = [
        [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
    return torch.stack([operator(*turn) for turn in turns]), 0


_register(f"z_pool(Tensor x, ScalarType? indices) -> ({', '.join(['Tensor'] * 10)})", _z_pool)
_register(f"scale(Tensor x, {_GATES}) -> Tensor", _scale)
_register("product(Tensor g, Tensor x) -> (Tensor, Tensor, Tensor)", _product)
_register(
    f"input_gradient(Tensor g, {_GATES}, {_POOLED}, {_INDICES}) -> Tensor",
    _input_gradient,
)
_register("correlate(Tensor x, Tensor weight) -> Tensor", _correlate, is_folded=False)
_register(
    "correlate_weight_gradient(Tensor g, Tensor x, int k) -> Tensor",
    _correlate_weight_gradient,
    is_folded=False,
)

if _HAS_FAKES:
    # For the operators by themselves, as in an exported program that is trained
    gradients: dict[str, Any] = {
        "z_pool": _ZPool, "scale": _ScaleByMaps, "product": _Product, "correlate": _Correlate,
    }  # fmt: skip
    for name, gradient in gradients.items():
        torch.library.register_autograd(
            f"plugin_core::{name}", gradient.backward, setup_context=gradient.setup_context
        )


def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return flop_counter.conv_flop_count(x, weight, out_shape)


def _weight_gradients_flops(
    g: Any, x: Any, k: int, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return flop_counter.conv_flop_count(x, out_shape, g)


if hasattr(flop_counter, "register_flop_formula"):  # since PyTorch 2.2
    ops = torch.ops.plugin_core
    flop_counter.register_flop_formula(ops.correlate)(_flops)
    flop_counter.register_flop_formula(ops.correlate_weight_gradient)(_weight_gradients_flops)
