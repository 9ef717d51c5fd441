"""Triplet attention's operators in PyTorch's transforms, compiler, exports and counters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from triplet_results import FORMATS, FORMULA, TOLERANCE, attention, results, take

from plugin_core import TripletAttention


def square(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum()


def of_parameters(module: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda parameters: functional_call(module, parameters, (x,)).square().sum()


def per_sample_gradients(module: nn.Module, x: Tensor) -> Any:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return of_parameters(module, sample[None])(parameters)

    return vmap(torch.func.grad(loss), (None, 0))(dict(module.named_parameters()), x)


def ensemble(module: nn.Module, x: Tensor) -> Any:
    stacked = {name: torch.stack([p, 2 * p]) for name, p in module.named_parameters()}
    return vmap(lambda parameters: functional_call(module, parameters, (x,)))(stacked)


def mixed_derivative(module: nn.Module, x: Tensor) -> Tensor:
    """Derivative by x, which only the outer transform follows, of one by parameters."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def size(x: Tensor) -> Tensor:
        grads = torch.func.grad(of_parameters(module, x))(parameters)
        return torch.stack([grad.square().sum() for grad in grads.values()]).sum()

    return torch.func.grad(size)(x)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda m, x: vmap(m)(torch.stack([x, 2 * x])),
    "grad": lambda m, x: torch.func.grad(lambda x: square(m, x))(x),
    "grad of parameters": lambda m, x: torch.func.grad(of_parameters(m, x))(
        dict(m.named_parameters())
    ),
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[:1]),
    "mixed derivative": mixed_derivative,
    "batch of gradients": lambda m, x: jacobian(m, x[:1], vectorize=True),
    "make_fx": lambda m, x: make_fx(m)(x)(x),
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_uses_the_kernels(name, memory_format, fast, uses):
    module = attention(warm_start=True).eval()
    x = torch.randn(2, 4, 5, 3).to(memory_format=memory_format)
    found = TRANSFORMS[name](module, x)
    assert uses
    with pytest.MonkeyPatch.context() as patch:
        take(FORMULA, patch)
        expected = TRANSFORMS[name](module, x)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_forward_derivatives_are_those_of_the_formula(transform, fast, uses):
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(1, 2, 2, 3)
    found = transform(lambda x: module(x).pow(3).sum())(x)
    assert not uses
    module.requires_grad_(False)
    of_x = torch.autograd.functional.jacobian
    if transform is torch.func.hessian:
        of_x = torch.autograd.functional.hessian
    torch.testing.assert_close(found, of_x(lambda x: module(x).pow(3).sum(), x), **TOLERANCE)


@pytest.mark.parametrize(
    ("memory_format", "training"), [*zip(FORMATS, (True, False), strict=True)], ids=["nchw", "nhwc"]
)
def test_compiled_module_uses_the_kernels_without_a_graph_break(
    memory_format, training, fast, uses
):
    module = attention(warm_start=True).train(training)
    x = torch.randn(2, 4, 5, 6).to(memory_format=memory_format)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    found, expected = results(compiled, x, "fast"), results(module, x, FORMULA)
    assert uses
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")], **TOLERANCE)


def test_exported_program_takes_any_size(fast, uses):
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(2, 4, 8, 9)
    sizes = {axis: torch.export.Dim(name) for axis, name in {0: "b", 2: "h", 3: "w"}.items()}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,), strict=True).module()
    for shape in ((3, 4, 12, 7), (2, 4, 2, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), module(x))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_exported_program_can_be_trained(memory_format, fast, uses):
    module = attention(warm_start=True).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.double).to(memory_format=memory_format)
    exported = torch.export.export(copy.deepcopy(module), (x,)).module()
    found, expected = results(exported, x, "fast"), results(module, x, FORMULA)
    assert uses
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE)
    inputs = (x.requires_grad_(), *exported.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: exported(x), inputs, fast_mode=True)


def test_flops_are_those_of_the_formula(fast, uses):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6, requires_grad=True)
    found = []
    for kernels in ("fast", FORMULA):
        with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
            take(kernels, patch)
            module(x).sum().backward()
        found.append(counter.get_total_flops())
    assert uses and found[0] == found[1] > 0


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False])
def test_operators_obey_pytorchs_rules(memory_format, training, monkeypatch):
    """Schema, autograd, and fake tensors of the same strides, for all operators of a step."""
    calls: dict[str, tuple[Any, ...]] = {}

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "plugin_core":
                calls[str(func)] = (func, args)
            return func(*args, **(kwargs or {}))

    module = TripletAttention(kernel_size=3)
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format).requires_grad_(training)
    with Recorded():
        y = module(x)
        if training:
            y.square().sum().backward()
    assert len(calls) == (6 if training else 3)
    for func, args in calls.values():
        args = [a.detach() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_holds_the_formula(fast, uses):
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(2, 4, 5, 6)
    traced = torch.jit.trace(module, x, check_trace=False)  # the check runs the module itself
    assert "plugin_core::" not in str(traced.inlined_graph)
    assert not uses


def test_meta_tensors_have_their_strides():
    module, x = TripletAttention(kernel_size=3).to("meta"), torch.empty(2, 4, 5, 6, device="meta")
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = module(x)
    y.backward(torch.empty_like(y))
    assert y.stride() == x.grad.stride() == x.stride()
