"""The passes of triplet attention, as operators ``torch.ops.plugin_core.…``.

A backend offers passes over tensors (B, P, Q, R). P, Q, R are C, H, W, or H, W, C in channels_last.
The map PQ reduces x over R, PR over Q, and QR over P:

    pool            maximum and mean of x over each axis, and the index of the first maximum
    scale           x * (PQ + PR + QR)
    product         sums of g * x over each axis
    input_gradient  g * (PQ + PR + QR), plus the gradient that goes through ``pool``

Each is an operator with an implementation for fake tensors, so that ``torch.compile``,
``torch.export`` and FLOP counters know it. Its implementation chooses the backend when it runs.
Operators take and give maps by what they pool: ``cw`` (B, ·, C, W), ``hc`` (B, ·, H, C) and ``hw``
(B, ·, H, W). In memory, rows and columns of one of them are exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import flop_counter

from plugin_core.kernels import choice
from plugin_core.kernels.triplet_cpu import CpuPasses
from plugin_core.kernels.triplet_torch import TorchPasses


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


_Backend = Callable[[Tensor], Passes]  # gives the one for a tensor (B, P, Q, R)


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


def is_exchanged(pooled: Tensor) -> bool:
    """Tell whether a map lies in memory with rows and columns exchanged."""
    return not pooled.is_contiguous() and pooled.mT.is_contiguous()


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


# ------------------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("plugin_core", "FRAGMENT")
HAS_FAKES = hasattr(torch.library, "register_fake")  # since PyTorch 2.4
_TAGS: dict[str, Any] = {}
if HAS_FAKES:
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
    if HAS_FAKES:
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


def _flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return flop_counter.conv_flop_count(x, weight, out_shape)


def _weight_gradients_flops(
    g: Any, x: Any, k: int, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return flop_counter.conv_flop_count(x, out_shape, g)


if hasattr(flop_counter, "register_flop_formula"):  # since PyTorch 2.2
    for _operator, _formula in (
        (torch.ops.plugin_core.correlate, _flops),
        (torch.ops.plugin_core.correlate_weight_gradient, _weight_gradients_flops),
    ):
        flop_counter.register_flop_formula(_operator)(_formula)
