"""Triplet attention's few passes over memory: the plain formula's values and gradients, always."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from plugin_core import ArgumentError, BlockPlugin, TripletAttention, set_kernels
from plugin_core.kernels import triplet
from plugin_core.kernels.triplet_cpu import CpuPasses
from plugin_core.kernels.triplet_torch import AXES, TorchPasses

FORMATS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def attention(
    kernel_size: int = 3, no_spatial: bool = False, warm_start: bool = False
) -> nn.Module:
    """Triplet attention by itself, or with a warm start that is under way."""
    module = TripletAttention(kernel_size=kernel_size, no_spatial=no_spatial)
    if not warm_start:
        return module
    plugin = BlockPlugin(module, "triplet_attention", warm_start=True)
    nn.init.constant_(plugin.get_parameter("alpha"), 0.7)
    return plugin


FORMULA = "formula"


def results(module: nn.Module, x: Tensor, kernels: str) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step in training.

    Args:
        module: is left as it is.
        x: its input.
        kernels: one of PLUGIN_KERNELS, or FORMULA for the formula without our operators.
    """
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        take(kernels, patch)
        y = module(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weight).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **dict(module.named_buffers())}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def take(kernels: str, patch: pytest.MonkeyPatch) -> None:
    if kernels == FORMULA:
        patch.setattr(triplet, "is_offered", lambda: False)
    else:
        patch.setenv("PLUGIN_KERNELS", kernels)


def assert_equal_to_formula(module: nn.Module, x: Tensor, **tolerance: float) -> None:
    expected = results(module, x, FORMULA)
    for kernels in ("fast", "plain"):
        found = results(module, x, kernels)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name],
                value,
                **(tolerance or TOLERANCE),
                msg=lambda m, n=name, k=kernels: f"{k}, {n}: {m}",
            )
        assert in_memory(found["y"]) == in_memory(expected["y"])


def in_memory(x: Tensor) -> list[int]:
    """Strides of the axes that have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


# ----------------------------------------------------------------------------- values and gradients


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_layout_and_ties_give_the_formulas_values_and_gradients(data):
    b, c, h, w = (data.draw(st.integers(1, most)) for most in (3, 40, 20, 40))
    module = attention(
        kernel_size=data.draw(st.sampled_from([1, 3, 7])),
        no_spatial=data.draw(st.booleans()),
        warm_start=data.draw(st.booleans()),
    )
    x = torch.randn(b, c, h, w)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        x = x.round()  # so that maxima are often tied
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"]))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(b, c, h, 2 * w)[..., ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3)
    module.train(data.draw(st.booleans()))
    assert_equal_to_formula(module, x, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 2])
def test_image_that_threads_share_gives_the_formulas_values_and_gradients(
    memory_format, batch, threads
):
    threads(3)
    # Whole numbers, so that the parts of an image have equal maxima.
    x = torch.randn(batch, 64, 50, 6).round().to(memory_format=memory_format)
    # A weight's gradient adds up 38,400 products that nearly cancel out, in another order.
    assert_equal_to_formula(TripletAttention(kernel_size=3), x, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("no_spatial", "warm_start", "memory_format", "training"),
    list(itertools.product([False, True], [False, True], FORMATS, [True, False])),
)
@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_first_and_second_derivatives_are_those_of_the_function(
    no_spatial, warm_start, memory_format, training, kernels, monkeypatch, uses
):
    monkeypatch.setenv("PLUGIN_KERNELS", kernels)
    module = attention(no_spatial=no_spatial, warm_start=warm_start).double().train(training)
    x = torch.randn(2, 3, 4, 3, dtype=torch.double).to(memory_format=memory_format)
    inputs = (x.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), inputs, fast_mode=True)
    assert bool(uses) == (kernels == "fast")


@pytest.mark.parametrize("kernels", ["fast", "plain"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_bfloat16_stays_as_close_as_the_formula(memory_format, kernels):
    module = TripletAttention(kernel_size=3)
    x = torch.randn(2, 8, 9, 10).to(torch.bfloat16).to(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, formula = results(module, x, kernels), results(module, x, FORMULA)
    exact = results(module, x.float(), FORMULA)
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    for name in ("y", "x", "cw.conv.conv.weight"):
        error, formulas_error = (
            (of[name].float() - exact[name]).abs().max() for of in (found, formula)
        )
        assert error <= formulas_error + 1e-3, name


def test_whole_module_in_bfloat16_runs():
    module = TripletAttention(kernel_size=3).bfloat16()
    x = torch.randn(2, 8, 9, 10, dtype=torch.bfloat16)
    expected = results(module, x, FORMULA)
    for kernels in ("fast", "plain"):
        found = results(module, x, kernels)
        torch.testing.assert_close(found["y"], expected["y"], atol=0.05, rtol=0.05)
        assert all(value.dtype is expected[name].dtype for name, value in found.items())


def test_float16_on_a_cpu_takes_pytorchs_operators(uses, monkeypatch):
    monkeypatch.setenv("PLUGIN_KERNELS", "auto")
    TripletAttention(kernel_size=3).half().eval()(torch.randn(1, 4, 5, 6).half())
    assert not uses


def test_not_a_number_is_not_lost(monkeypatch):
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    x = torch.randn(1, 4, 5, 6)
    x[0, 1, 2, 3] = torch.nan
    assert TripletAttention(kernel_size=3).eval()(x)[0, 1, 2, 3].isnan()
    assert TripletAttention(kernel_size=3).train()(x).isnan().all()


def test_runs_are_equal_to_the_last_bit_in_deterministic_mode(threads):
    threads(2)
    module, x = TripletAttention(kernel_size=3), torch.randn(1, 64, 9, 10)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(module, x, "fast"), results(module, x, "fast")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -------------------------------------------------------------------------- what users do around it


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")


def test_frozen_input_trains_the_gates_alone(fast, uses):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6)
    module(x).sum().backward()
    grads = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x.requires_grad_()).sum().backward()
    assert uses
    for grad, parameter in zip(grads, module.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_shortcut_may_be_added_in_place_and_the_block_checkpointed(memory_format, fast):
    module = TripletAttention(kernel_size=3).eval()
    x = torch.randn(2, 4, 5, 6).to(memory_format=memory_format)

    def block(x: Tensor) -> Tensor:
        out = module(x * 2)
        out += x
        return torch.relu_(out)

    def offloaded(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    grads = []
    for run in (
        block,
        lambda x: checkpoint(block, x, use_reentrant=False),
        lambda x: checkpoint(block, x, use_reentrant=True),
        offloaded,
    ):
        given_x = x.clone().requires_grad_()
        run(given_x).sum().backward()
        grads.append(given_x.grad)
    assert all(torch.equal(grads[0], grad) for grad in grads)


def test_graph_may_be_walked_twice(fast):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6, requires_grad=True)
    y = module(x).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_hook_on_a_gates_convolution_is_called(fast):
    module, seen = TripletAttention(kernel_size=3), []
    module.hc.conv.conv.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    x = torch.randn(2, 4, 5, 6)
    y = module(x)
    assert seen == [(2, 1, 5, 4)]
    torch.testing.assert_close(y, copy.deepcopy(module)(x))


def test_convolution_that_is_changed_when_it_is_called_is_called(monkeypatch):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6)
    prune.random_unstructured(module.cw.conv.conv, "weight", 0.5)
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    for _ in range(2):  # the weight is made anew each time
        module(x).sum().backward()
    with torch.no_grad():
        module.cw.conv.conv.weight_orig.add_(1)
    y = module.eval()(x)
    monkeypatch.setenv("PLUGIN_KERNELS", "plain")
    torch.testing.assert_close(y, module(x))


def test_norm_that_was_fused_into_the_convolution_is_not_lost():
    fuse = pytest.importorskip("mmcv.cnn", reason="needs mmcv").fuse_conv_bn
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(2, 4, 5, 6)
    for name, buffer in module.named_buffers():
        if not name.endswith("num_batches_tracked"):
            buffer.uniform_(0.5, 1.5)
    expected = results(module, x, FORMULA)["y"]
    torch.testing.assert_close(results(fuse(module), x, "fast")["y"], expected)


def test_default_device_does_not_matter(fast, uses):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6, requires_grad=True)
    expected = module(x)
    with torch.device("meta"):
        y = module(x)
        y.sum().backward()
    assert len(uses) == 2
    torch.testing.assert_close(y, expected)


# ------------------------------------------------------------- what PyTorch does with the operators


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


# ------------------------------------------------------------------------------------------- memory


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


# ------------------------------------------------------------------------------ which path is taken


def test_unknown_choice_is_named(monkeypatch):
    monkeypatch.setenv("PLUGIN_KERNELS", "quick")
    with pytest.raises(
        ValueError, match="PLUGIN_KERNELS must be one of auto, plain, fast.*'quick'"
    ):
        TripletAttention(kernel_size=3)(torch.randn(1, 2, 3, 4))


def test_plain_is_plain_and_an_empty_variable_is_auto(monkeypatch, uses):
    module, x = TripletAttention(kernel_size=3), torch.randn(1, 2, 3, 4)
    monkeypatch.setenv("PLUGIN_KERNELS", "plain")
    module(x)
    assert not uses
    monkeypatch.setenv("PLUGIN_KERNELS", "")
    module(x)
    assert uses == [(1, 2, 3, 4)]


def test_set_kernels_chooses_as_the_variable_does(monkeypatch, uses):
    monkeypatch.setenv("PLUGIN_KERNELS", "auto")
    module, x = TripletAttention(kernel_size=3), torch.randn(1, 2, 3, 4)
    set_kernels("plain")
    module(x)
    assert not uses
    set_kernels("auto")
    module(x)
    assert uses
    with pytest.raises(ArgumentError, match="kernels must be one of auto, plain, fast, got 'C'"):
        set_kernels("C")


def test_channels_last_is_pooled_as_it_lies_in_memory(fast, uses):
    x = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    TripletAttention(kernel_size=3)(x)
    assert uses == [(1, 3, 4, 2)]


def test_nothing_is_warned_of(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TripletAttention(kernel_size=3)(
            torch.randn(1, 2, 3, 4, requires_grad=True)
        ).sum().backward()
