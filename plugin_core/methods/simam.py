"""SimAM, a parameter-free attention (Yang et al., ICML 2021, section 3.2, eq. 5 and 6).

For x of shape (B, C, H, W), mean and variance of each channel over its H·W positions, a neuron is
the more important, the more it stands out from the others of its channel::

    d(p) = (x(p) - mean)²,   v = sum_p d(p) / (H·W - 1)
    1/e(p) = d(p) / (4 (v + lambda)) + 1/2
    y = x * sigmoid(1/e)

There is nothing to learn. A pretrained network needs the warm start of
:class:`plugin_core.BlockPlugin`. The authors put it behind the second convolution of a block; as a
block plugin it is behind the last norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plugin_core.block_plugins import register_block_plugin
from plugin_core.errors import ArgumentError
from plugin_core.kernels.precision import in_float32


@register_block_plugin("simam")
class SimAM(nn.Module):
    """Scales each value by how much it stands out in its channel (paper, eq. 6).

    Args:
        channels: C, which every block plugin is built from; SimAM needs none.
        e_lambda: lambda, added to the variance, > 0; 1e-4 in the paper, 0.1 in its detectors.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype.

    Raises:
        ArgumentError: if ``e_lambda`` is not positive.
    """

    def __init__(self, channels: int | None = None, e_lambda: float = 1e-4) -> None:
        super().__init__()
        if not isinstance(e_lambda, (int, float)) or not e_lambda > 0:
            raise ArgumentError("e_lambda", f"must be positive, got {e_lambda!r}")
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        return x * self._importance(x)

    def _importance(self, x: Tensor) -> Tensor:
        wide = in_float32(x)
        deviation = (wide - wide.mean((2, 3), keepdim=True)).square()
        others = max(x.shape[2] * x.shape[3] - 1, 1)  # a map of one position has no variance
        variance = deviation.sum((2, 3), keepdim=True) / others
        return torch.sigmoid(deviation / (4 * (variance + self.e_lambda)) + 0.5).to(x.dtype)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The importance of each position, mean over the channels: (B, H, W)."""
        return {"importance, mean over C": self._importance(x).mean(1)}

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda:g}"
