"""Bilinear sampling and deformable operators with second derivatives.

A loss on a gradient needs second derivatives. ``F.grid_sample`` and the CUDA operators for
deformable attention and convolution have none. These are made of gathers and products, which have
them, but need more memory: use them only under such a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def bilinear_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate maps at points, with zeros around the maps.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2), x and y in cells; (0, 0) is the centre of the first cell.

    Returns:
        (N, C, P).
    """
    height, width = maps.shape[2:]
    flat = maps.flatten(2)
    # Half precision cannot tell the cells of a large map apart.
    points = points if points.dtype == torch.float64 else points.float()
    corner = points.detach().floor()
    past = points - corner  # in [0, 1)
    first = corner.nan_to_num().long()  # NaN stays in the weights, but is no index
    sampled = maps.new_zeros(*maps.shape[:2], points.shape[1])
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = first[..., 0] + dx, first[..., 1] + dy
            weight = (past[..., 0] if dx else 1 - past[..., 0]) * (
                past[..., 1] if dy else 1 - past[..., 1]
            )
            within = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            cell = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
            index = cell[:, None].expand(-1, maps.shape[1], -1)
            sampled = sampled + flat.gather(2, index) * (weight * within).to(maps.dtype)[:, None]
    return sampled


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
    batch, queries, heads, _, points, _ = locations.shape
    gathered = value.new_zeros(batch * heads, value.shape[3], queries)
    levels = value.split([height * width for height, width in shapes], dim=1)
    for i, ((height, width), level) in enumerate(zip(shapes, levels, strict=True)):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        extent = locations.new_tensor([width, height])
        where = (locations[:, :, :, i] * extent - 0.5).transpose(1, 2).reshape(batch * heads, -1, 2)
        sampled = bilinear_sample(maps, where).unflatten(2, (queries, points))
        share = weights[:, :, :, i].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        gathered = gathered + (sampled * share).sum(3)
    return gathered.reshape(batch, -1, queries).transpose(1, 2)


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
