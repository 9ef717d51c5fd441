"""Triplet attention's passes by PyTorch's operators, for every device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The axes of (B, P, Q, R) that PQ, PR and QR reduce.
AXES = (3, 2, 1)


class TorchPasses:
    """The passes of :mod:`plugin_core.kernels.triplet_operators` on tensors of any strides.

    Beside its result a pass has at most one tensor of x's size.
    """

    def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
        wide = wide_of(x)
        maxima = [x.max(axis) for axis in AXES]
        maps = [
            torch.stack((maximum.values.to(wide), x.mean(axis, dtype=wide)), 1)
            for maximum, axis in zip(maxima, AXES, strict=True)
        ]
        return maps, [m.indices.int().contiguous() for m in maxima] if indices else []

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        # The sum of the gates would be another tensor of x's size.
        pq, pr, qr = (gate.unsqueeze(axis) for gate, axis in zip(gates, AXES, strict=True))
        torch.mul(x, pq, out=y).addcmul_(x, pr).addcmul_(x, qr)

    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        product = g * x
        return [product.sum(axis, dtype=wide_of(x)).contiguous() for axis in AXES]

    def input_gradient(
        self,
        g: Tensor,
        gates: list[Tensor],
        pooled: list[Tensor],
        indices: list[Tensor],
    ) -> Tensor:
        gx = torch.empty_like(g)
        self.scale(g, gates, gx)
        for gradient, at, axis in zip(pooled, indices, AXES, strict=True):
            maximum, mean = (gradient[:, i].unsqueeze(axis).to(g.dtype) for i in (0, 1))
            gx.add_(mean, alpha=1 / g.shape[axis])
            gx.scatter_add_(axis, at.unsqueeze(axis).long(), maximum)
        return gx

    def correlate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve x (B, I, H, W) with weight (O, I, k, k), k odd, to (B, O, H, W)."""
        # Keep x's dtype. Not every device has autocast.
        device = x.device.type if x.device.type == "cuda" else "cpu"
        with torch.autocast(device, enabled=False):
            return F.conv2d(x, weight, padding=weight.shape[2] // 2)

    def correlate_weight_gradient(self, g: Tensor, x: Tensor, k: int) -> Tensor:
        """Give the gradient of the weight (1, I, k, k) for the gradient g (B, 1, H, W)."""
        weight = x.new_empty((1, x.shape[1], k, k))  # only its shape is read
        gradient = convolution_backward(g, x, weight, False, True)[1]
        assert gradient is not None
        return gradient


def wide_of(x: Tensor) -> torch.dtype:
    """The dtype of x's maps."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Differentiate ``F.conv2d(x, weight, padding=k // 2)``."""
    half, which = [weight.shape[2] // 2] * 2, [for_x, for_weight, False]
    gx, gw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, [1, 1], half, [1, 1], False, [0, 0], 1, which
    )
    return gx, gw
