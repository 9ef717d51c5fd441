"""Enough precision for sums and exponentials."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32. Leave float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
