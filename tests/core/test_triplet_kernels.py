"""Triplet attention's few passes over memory: the plain formula's values and gradients, always."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from plugin_core import BlockPlugin, TripletAttention
from plugin_core.kernels import triplet
from plugin_core.kernels.triplet_cpu import CpuPasses

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


def results(module: nn.Module, x: Tensor, kernels: str) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step in training, with one of PLUGIN_KERNELS."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUGIN_KERNELS", kernels)
        y = module(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weight).sum().backward()
    found = {"y": y.detach(), "x": x.grad, **dict(module.named_buffers())}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


def assert_equal_to_plain(module: nn.Module, x: Tensor, **tolerance: float) -> None:
    fast, plain = results(module, x, "fast"), results(module, x, "plain")
    assert fast.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(
            fast[name], value, **(tolerance or TOLERANCE), msg=lambda m, n=name: f"{n}: {m}"
        )
    assert in_memory(fast["y"]) == in_memory(plain["y"])


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
def test_any_shape_layout_and_ties_give_the_plain_values_and_gradients(data):
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
    assert_equal_to_plain(module, x, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 2])
def test_image_that_threads_share_gives_the_plain_values_and_gradients(
    memory_format, batch, threads
):
    threads(3)
    # Whole numbers, so that the parts of an image have equal maxima.
    x = torch.randn(batch, 64, 50, 6).round().to(memory_format=memory_format)
    assert_equal_to_plain(TripletAttention(kernel_size=3), x)


@pytest.mark.parametrize(
    ("no_spatial", "warm_start", "memory_format", "training"),
    list(itertools.product([False, True], [False, True], FORMATS, [True, False])),
)
def test_first_and_second_derivatives_are_those_of_the_function(
    no_spatial, warm_start, memory_format, training, monkeypatch, uses
):
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    module = attention(no_spatial=no_spatial, warm_start=warm_start).double().train(training)
    x = torch.randn(2, 3, 4, 3, dtype=torch.double).to(memory_format=memory_format)
    inputs = (x.requires_grad_(), *module.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: module(x), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x), inputs, fast_mode=True)
    assert uses


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
def test_bfloat16_stays_as_close_as_the_plain_formula(memory_format):
    module = TripletAttention(kernel_size=3)
    x = torch.randn(2, 8, 9, 10).to(torch.bfloat16).to(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, plain = results(module, x, "fast"), results(module, x, "plain")
    exact = results(module, x.float(), "plain")
    assert fast["y"].dtype == fast["x"].dtype == torch.bfloat16
    for name in ("y", "x", "cw.conv.conv.weight"):
        error, plain_error = (
            (found[name].float() - exact[name]).abs().max() for found in (fast, plain)
        )
        assert error <= plain_error + 1e-3, name


def test_whole_module_in_bfloat16_runs():
    module = TripletAttention(kernel_size=3).bfloat16()
    x = torch.randn(2, 8, 9, 10, dtype=torch.bfloat16)
    fast, plain = results(module, x, "fast"), results(module, x, "plain")
    torch.testing.assert_close(fast["y"], plain["y"], atol=0.05, rtol=0.05)
    assert all(value.dtype is plain[name].dtype for name, value in fast.items())


def test_float16_on_a_cpu_takes_the_plain_formula(uses, monkeypatch):
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
    expected = results(module, x, "plain")["y"]
    torch.testing.assert_close(results(fuse(module), x, "fast")["y"], expected)


def test_default_device_does_not_matter(fast, uses):
    module, x = TripletAttention(kernel_size=3), torch.randn(2, 4, 5, 6, requires_grad=True)
    expected = module(x)
    with torch.device("meta"):
        y = module(x)
        y.sum().backward()
    assert len(uses) == 2
    torch.testing.assert_close(y, expected)


def test_batch_of_gradients_is_that_of_the_plain_formula(monkeypatch):
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(1, 2, 3, 4)
    jacobians = []
    for kernels in ("fast", "plain"):
        monkeypatch.setenv("PLUGIN_KERNELS", kernels)
        jacobians.append(torch.autograd.functional.jacobian(module, x, vectorize=True))
    torch.testing.assert_close(*jacobians)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_records_operators_sees_the_plain_formula(fast, uses):
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(2, 4, 5, 6)
    torch.jit.trace(module, x, check_trace=False)  # the check runs the module itself
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() > 0
    torch.compile(module, backend="eager", fullgraph=True)(x)
    torch.func.vmap(module)(x[None])
    torch.func.grad(lambda x: module(x).sum())(x)
    with forward_ad.dual_level():
        module(forward_ad.make_dual(x, torch.ones_like(x)))
    assert not uses
    module(x)
    assert uses


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


def test_channels_last_is_pooled_as_it_lies_in_memory(fast, uses):
    x = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    assert triplet.passes_for(x) is not None
    TripletAttention(kernel_size=3)(x)
    assert uses == [(1, 3, 4, 2)]


def test_nothing_is_warned_of(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TripletAttention(kernel_size=3)(
            torch.randn(1, 2, 3, 4, requires_grad=True)
        ).sum().backward()
