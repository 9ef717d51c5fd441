"""Compare a backend's passes with PyTorch's operators on a small tensor.

Kernels compiled for the GPU at hand must pass before they are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from plugin_core.kernels.triplet import Passes

# Two blocks and two parts, the last one ragged.
_CHECKED_SHAPE = (2, 11, 35, 67)


def failure_of(passes: Passes, device: torch.device, dtype: torch.dtype) -> str | None:
    """Describe the passes' fault, or return None. This compiles all their variants.

    It does not try their convolutions.

    Raises:
        OutOfMemoryError: if the GPU is full, which says nothing about the passes.
    """
    b, p, q, r = _CHECKED_SHAPE
    sizes = [(p, q), (p, r), (q, r)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    try:
        with torch.no_grad():
            x, g = (_numbers(_CHECKED_SHAPE, n, device, dtype) for n in (7, 11))
            gates = [_numbers((b, *size), 5, device, wide) for size in sizes]
            gradients = [_numbers((b, 2, *size), 3, device, wide) for size in sizes]
            maps, at = passes.pool(x, indices=True)
            expected_maps, expected_at = plain_pool(x.to(wide))
            gate = sum(m.unsqueeze(axis) for m, axis in zip(gates, _AXES, strict=True))
            product = g.to(wide) * x.to(wide)
            scaled = torch.empty_like(x)
            passes.scale(x, gates, scaled)
            pairs = {
                "pool": (maps, expected_maps),
                "pool's indices": (at, expected_at),
                "pool without indices": (passes.pool(x, indices=False)[0], expected_maps),
                "scale": (scaled, (x * gate).to(dtype)),
                "product": (passes.product(g, x), [product.sum(axis) for axis in _AXES]),
                "input_gradient": (
                    passes.input_gradient(g, gates, gradients, expected_at),
                    plain_input_gradient(g * gate, gradients, expected_at).to(dtype),
                ),
            }
            for name, (actual, expected) in pairs.items():
                torch.testing.assert_close(
                    actual, expected, msg=f"{name} differs from PyTorch's result"
                )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Triton and the driver raise whatever they like
        first_line = str(error).strip().partition("\n")[0]
        return f"the kernels fail on {device} ({type(error).__name__}: {first_line})"
    return None


# The axes of (B, P, Q, R) that PQ, PR and QR reduce.
_AXES = (3, 2, 1)


def _numbers(shape: tuple[int, ...], step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make eighths from -15 / 8 to 15 / 8 with many ties, without PyTorch's random generator."""
    numbers = torch.arange(math.prod(shape), device=device) * step % 31 - 15
    return (numbers / 8).to(dtype).view(shape)


def plain_pool(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Compute ``Passes.pool`` with indices by PyTorch's operators."""
    maxima = [x.max(axis) for axis in _AXES]
    means = [x.mean(axis) for axis in _AXES]
    maps = [torch.stack((m.values, mean), 1) for m, mean in zip(maxima, means, strict=True)]
    return maps, [m.indices.int() for m in maxima]


def plain_input_gradient(gated: Tensor, gradients: list[Tensor], indices: list[Tensor]) -> Tensor:
    """Compute ``Passes.input_gradient`` by PyTorch's operators from g times the sum of gates."""
    for gradient, at, axis in zip(gradients, indices, _AXES, strict=True):
        maximum, mean = (gradient[:, i].unsqueeze(axis) for i in (0, 1))
        positions = torch.arange(gated.shape[axis], device=gated.device)
        positions = positions.view([-1 if i == axis else 1 for i in range(4)])
        gated = gated + mean / gated.shape[axis]
        gated = gated + maximum * (at.unsqueeze(axis) == positions)
    return gated
