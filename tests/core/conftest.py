"""What the tests of triplet attention's kernels share: the choice of kernels, and who used them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plugin_core.kernels.triplet_cpu import CpuPasses


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that the compiled code has pooled."""
    shapes: list[torch.Size] = []
    pool = CpuPasses.pool

    def noted(self: CpuPasses, x: Tensor, indices: bool) -> Any:
        shapes.append(x.shape)
        return pool(self, x, indices)

    monkeypatch.setattr(CpuPasses, "pool", noted)
    return shapes


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
