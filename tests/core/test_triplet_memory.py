"""Triplet attention's passes make no copies of their input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triplet_results import FORMATS

from plugin_core import TripletAttention
from plugin_core.kernels.triplet_torch import AXES, TorchPasses


class FullSizeOperations(TorchDispatchMode):
    """Notes the operators that make a tensor of ``numel`` elements in memory of its own."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [*args, *(kwargs or {}).values()]
        inputs = {a.untyped_storage().data_ptr() for a in given if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(tensor, Tensor)
                and tensor.numel() == self.numel
                and tensor.untyped_storage().data_ptr() not in inputs
            ):
                self.names.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_no_pass_has_more_than_one_tensor_of_the_inputs_size_beside_its_result(memory_format):
    passes = TorchPasses()
    x = torch.randn(2, 4, 5, 7).to(memory_format=memory_format)
    pqr = x if x.is_contiguous() else x.permute(0, 2, 3, 1)
    g, y = torch.randn_like(pqr), torch.empty_like(pqr)
    gates = [torch.rand_like(pqr.sum(axis)) for axis in AXES]
    with FullSizeOperations(x.numel()) as operations:
        maps, at = passes.pool(pqr, indices=True)
        passes.scale(pqr, gates, y)
    assert operations.names == []  # the sum of the gates is never laid out
    with FullSizeOperations(x.numel()) as operations:
        passes.product(g, pqr)
        passes.input_gradient(g, gates, maps, at)
    assert operations.names == ["mul", "empty_like"]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_step_makes_no_copy_of_its_input(memory_format, fast):
    module = TripletAttention(kernel_size=3)
    x = torch.randn(2, 4, 5, 7).to(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(2, 4, 5, 7).to(memory_format=memory_format)
    with FullSizeOperations(x.numel()) as operations:
        module(x).backward(gradient)
    assert set(operations.names) <= {"z_pool", "scale", "input_gradient", "detach"}
