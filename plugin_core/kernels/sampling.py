"""Bilinear sampling and deformable operators with second derivatives.

A loss on a gradient needs second derivatives. ``F.grid_sample`` and the CUDA operators for
deformable attention and convolution have none. Here a sample is a weighted sum of rows of a table,
which is linear in the weights and in the table, so that its derivatives are sums of the same kind.
No sampled value is kept for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugin_core.kernels.precision import in_float32


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Sum weighted rows of a table; all derivatives by the table and the weights exist.

    Args:
        table: (M, D).
        index: (R, n) of rows of the table.
        weights: (R, n), of the table's type.

    Returns:
        (R, D).
    """
    summed: Tensor = _Form.apply(_Places(index, len(table)), 2, weights, table)
    return summed


class _Places:
    """Where a form of three operands, linear in each, has its products.

    The form is the sum over r and k of weights[r, k] · <table[index[r, k]], sums[r]>. Each of its
    derivatives is computed without the (R, n, D) of all products.
    """

    def __init__(self, index: Tensor, rows: int) -> None:
        self.index, self.rows = index.int(), rows

    @cached_property
    def _by_rows_of_table(self) -> tuple[Tensor, Tensor]:
        """The products in the order of the table's rows, and where each row's begin."""
        dtype = torch.int16 if self.rows < 2**15 else torch.int32  # sorted faster
        row, order = self.index.flatten().to(dtype).sort()
        starts = torch.arange(self.rows, dtype=dtype, device=row.device)
        return order.int(), torch.searchsorted(row, starts, out_int32=True)

    def derivative(self, by: int, first: Tensor, second: Tensor) -> Tensor:
        """By the weights (0), the table (1) or the sums (2); the operands are the other two."""
        if by == 2:
            return F.embedding_bag(self.index, second, per_sample_weights=first, mode="sum")
        if by == 1:
            order, starts = self._by_rows_of_table
            of_sums = order // self.index.shape[1]
            weights = first.flatten().index_select(0, order)
            return F.embedding_bag(of_sums, second, starts, per_sample_weights=weights, mode="sum")
        count, each = self.index.shape
        # Several times as fast on a CPU; it takes no more products a row than the table has rows.
        if first.device.type == "cpu" and each <= self.rows:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that compressed rows are a beta feature
                ends = torch.arange(0, count * each + 1, each, dtype=torch.int32)
                nothing = first.new_zeros(count * each)
                size = (count, self.rows)
                places = torch.sparse_csr_tensor(ends, self.index.flatten(), nothing, size)
            products = torch.sparse.sampled_addmm(places, second, first.T, beta=0.0)
            return products.values().view(count, each)
        with torch.enable_grad():
            unknown = first.new_zeros(self.index.shape, requires_grad=True)
            summed = self.derivative(2, unknown, first)
            return torch.autograd.grad(summed, unknown, second)[0]


class _Form(torch.autograd.Function):
    """A derivative of the form, which is linear in the two operands that are left."""

    @staticmethod
    def forward(ctx: Any, places: _Places, by: int, first: Tensor, second: Tensor) -> Tensor:
        ctx.places, ctx.by = places, by
        ctx.save_for_backward(first, second)
        return places.derivative(by, first, second)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        operands = list(ctx.saved_tensors)
        operands.insert(ctx.by, gradient.contiguous())
        found = [
            _Form.apply(ctx.places, by, *operands[:by], *operands[by + 1 :]) if needed else None
            for by, needed in zip(
                [by for by in range(3) if by != ctx.by], ctx.needs_input_grad[2:], strict=True
            )
        ]
        return None, None, *found


def _corners(points: Tensor, width: Tensor | int, height: Tensor | int) -> tuple[Tensor, Tensor]:
    """The four cells around points, and their weights, 0 outside of the map.

    Args:
        points: (…, P, 2), x and y in cells.
        width: of the points' maps, (P,).
        height: of the points' maps, (P,).

    Returns:
        Cells y · width + x, of int32, and weights, both (…, 4, P).
    """
    axes = []
    for at, size in zip(points.unbind(-1), (width, height), strict=True):
        last = torch.as_tensor(size - 1, dtype=at.dtype, device=at.device)
        first = at.detach().floor()
        past = at - first  # in [0, 1); NaN stays in it, but is no index
        ends = []
        for cell, weight in ((first, 1 - past), (first + 1, past)):
            inside = cell.nan_to_num().clamp(min=0).minimum(last)
            ends.append((inside.int(), weight * (inside == cell)))
        axes.append(ends)
    pairs = [(y, x) for y in axes[1] for x in axes[0]]
    cells = torch.stack([y * width + x for (y, _), (x, _) in pairs], dim=-2)
    return cells, torch.stack([y * x for (_, y), (_, x) in pairs], dim=-2)


def bilinear_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate maps at points, with zeros around the maps.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2), x and y in cells; (0, 0) is the centre of the first cell.

    Returns:
        (N, C, P).
    """
    count, _, height, width = maps.shape
    # Half precision cannot tell the cells of a large map apart.
    cells, weights = _corners(in_float32(points), width, height)
    of_map = torch.arange(count, device=maps.device)[:, None, None] * (height * width)
    index = (cells + of_map).transpose(1, 2).flatten(0, 1)
    table = maps.permute(0, 2, 3, 1).flatten(0, 2)
    sampled = _summed(table, index, weights.transpose(1, 2).flatten(0, 1))
    return sampled.unflatten(0, points.shape[:2]).transpose(1, 2)


def _summed(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return weighted_rows(table.to(dtype), index, weights.to(dtype)).to(table.dtype)


def deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Attend to sampled points (Zhu et al., ICLR 2021, arXiv:2010.04159, section 4.1).

    Args:
        value: (B, K, heads, D); K is the sum of H · W over the levels.
        shapes: (H, W) of each of L levels.
        locations: (B, Q, heads, L, points, 2), x and y; a level is from 0 to 1.
        weights: (B, Q, heads, L, points), the attention.

    Returns:
        (B, Q, heads · D).
    """
    batch, positions, heads, channels = value.shape
    points, device = weights.shape[4], value.device
    sizes = torch.tensor(shapes, dtype=torch.int32, device=device)
    areas = sizes.prod(1)
    starts = (areas.cumsum(0) - areas).repeat_interleave(points)
    height, width = sizes.repeat_interleave(points, dim=0).unbind(1)  # of each level's points
    places = in_float32(locations).flatten(3, 4) * torch.stack((width, height), dim=1) - 0.5
    cells, shares = _corners(places, width, height)
    of_image = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1) * positions
    of_head = torch.arange(heads, device=device).view(-1, 1, 1)
    index = (cells + (starts + of_image).int()) * heads + of_head.int()
    shares = shares * weights.flatten(3)[..., None, :]
    attended = _summed(
        value.flatten(0, 2), index.flatten(0, 2).flatten(1), shares.flatten(0, 2).flatten(1)
    )
    return attended.view(batch, locations.shape[1], heads * channels)


def deformable_convolution(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int = 1,
) -> Tensor:
    """Convolve at moved points (Zhu et al., CVPR 2019, arXiv:1811.11168, section 3.2).

    Args:
        x: (B, C, H, W).
        offset: (B, G · kh · kw · 2, H', W') in cells, y before x, for G groups of channels.
        mask: (B, G · kh · kw, H', W'), factors of the sampled values.
        weight: (C', C / groups, kh, kw).
        bias: (C',) or None.
        stride: (vertical, horizontal), in cells.
        padding: (vertical, horizontal), in cells.
        dilation: (vertical, horizontal), in cells.
        groups: of the convolution.

    Returns:
        (B, C', H', W').
    """
    batch, channels = x.shape[:2]
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    rows, columns = offset.shape[2:]
    parts = offset.shape[1] // (2 * taps)
    grids = [
        torch.arange(n, device=x.device, dtype=torch.float32) * step - pad
        for n, step, pad in zip((rows, columns), stride, padding, strict=True)
    ]
    steps = [
        torch.arange(k, device=x.device, dtype=torch.float32) * d
        for k, d in zip(kernel, dilation, strict=True)
    ]
    y = (steps[0][:, None] + steps[1][None] * 0).reshape(-1, 1, 1) + grids[0][:, None]
    x_ = (steps[0][:, None] * 0 + steps[1][None]).reshape(-1, 1, 1) + grids[1][None, :]
    moved = offset.reshape(batch * parts, taps, 2, rows, columns)
    where = torch.stack((moved[:, :, 1] + x_, moved[:, :, 0] + y), dim=-1)
    maps = x.reshape(batch * parts, channels // parts, *x.shape[2:])
    sampled = bilinear_sample(maps, where.flatten(1, 3))
    sampled = sampled * mask.reshape(batch * parts, 1, -1)
    unfolded = sampled.reshape(batch, groups, channels // groups * taps, rows * columns)
    kernels = weight.reshape(groups, -1, weight.shape[1] * taps)
    out = torch.einsum("bgkp,gok->bgop", unfolded, kernels).reshape(batch, -1, rows, columns)
    return out if bias is None else out + bias[:, None, None]


def linear_operator(
    operator: Callable[[Sequence[Tensor]], Tensor], output: Tensor, features: Sequence[Tensor]
) -> Tensor:
    """Give the output of a linear operator all derivatives.

    The backward pass of a linear operator, such as RoIAlign, has the operator itself as its
    derivative. So an operator with first derivatives is enough. Only the features get gradients.

    Args:
        operator: maps features to the output, linearly.
        output: of the operator for these features.
        features: inputs of the operator.

    Returns:
        The output in a graph that starts at the features.
    """
    made: Tensor = _Linear.apply(operator, output.detach(), *features)
    return made


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, output: Tensor | None, *features: Tensor) -> Tensor:
        ctx.operator = operator
        ctx.like = [(x.shape, x.dtype, x.device) for x in features]
        return operator(features) if output is None else output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *_Adjoint.apply(ctx.operator, ctx.like, gradient)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, like: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        with torch.enable_grad():
            zeros = [
                torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
                for shape, dtype, device in like
            ]
            output = operator(zeros)
            found = torch.autograd.grad(output, zeros, gradient, allow_unused=True)
        return tuple(
            torch.zeros_like(z) if g is None else g for z, g in zip(zeros, found, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, None, _Linear.apply(ctx.operator, None, *gradients)
