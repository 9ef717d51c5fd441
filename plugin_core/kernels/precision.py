"""Where sums and exponentials need more than half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(x: Tensor) -> Tensor:
    """Give x in float32, or as it is where it is more precise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
