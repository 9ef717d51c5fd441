"""Bilinear sampling, and the deformable operators made of it, that can be differentiated twice.

A loss on a gradient needs second derivatives, which neither ``F.grid_sample`` nor the operators for
deformable attention and convolution have. What is here is made of gathers and products, which have
them; it takes more memory, so it is for where they are needed only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def bilinear_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps at points between their cells, 0 outside.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2), x and y in cells: (0, 0) is the centre of the first one.

    Returns:
        (N, C, P).
    """
    height, width = maps.shape[2:]
    flat = maps.flatten(2)
    # Half precision cannot tell the cells of a larger map apart.
    points = points if points.dtype == torch.float64 else points.float()
    corner = points.detach().floor()
    past = points - corner  # in [0, 1)
    first = corner.nan_to_num().long()  # a point that is NaN makes a value that is NaN, no index
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
    """Multi-scale deformable attention (Zhu et al., ICLR 2021, arXiv:2010.04159, section 4.1).

    Args:
        value: (B, K, heads, D), the K positions of all levels.
        shapes: (H, W) of each of L levels.
        locations: (B, Q, heads, L, points, 2), x and y in [0, 1] of the level.
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
    """Modulated deformable convolution (Zhu et al., CVPR 2019, arXiv:1811.11168, section 3.2).

    Args:
        x: (B, C, H, W).
        offset: (B, G · 2 · kh · kw, H', W'), of G groups of channels y and x by turns.
        mask: (B, G · kh · kw, H', W'), by which each sample is multiplied.
        weight: (C', C / groups, kh, kw).
        bias: (C',) or None.
        stride: (vertical, horizontal), as the following.
        padding: of x.
        dilation: of the kernel.
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
    """Make what an operator gave differentiable twice, where the operator is so only once.

    It is exact for an operator that is linear in the features, such as RoIAlign: the derivative of
    its backward pass is its forward pass. Of nothing else are gradients taken.

    Args:
        operator: takes features and gives its output.
        output: what it gave for these features.
        features: that it was given.

    Returns:
        The output, as a part of the features' graph.
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
