"""Triplet attention's few passes over memory: the plain formula's values and gradients, always."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from triplet_results import FORMATS, FORMULA, TOLERANCE, attention, results

from plugin_core import ArgumentError, TripletAttention, set_kernels
from plugin_core.kernels import triplet_cpu


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_gates_convolution_and_its_gradients_are_pytorchs(k, dtype, fast, threads):
    threads(2)
    operators = torch.ops.plugin_core

    def whole(*shape: int) -> Tensor:  # their sums are exact in any order
        return torch.randint(-3, 4, shape).to(dtype)

    # Columns are worked on by 16 and by 64, and rows and columns exchanged where rows are longer.
    for columns in (1, 16, 17, 48, 49, 65, 130):
        for rows in (5, 131):
            x, weight = whole(2, 2, rows, columns), whole(1, 2, k, k)
            y = operators.correlate(x, weight)
            expected = F.conv2d(x.double(), weight.double(), padding=k // 2)
            assert torch.equal(y, expected.round().to(dtype)) and y.is_contiguous()
            g = whole(*y.shape)
            found = operators.correlate_weight_gradient(g, x, k)
            expected = conv2d_weight(x.double(), weight.shape, g.double(), padding=k // 2)
            assert torch.equal(found, expected.round().to(dtype))
            gx = operators.correlate(g, weight.flip(2, 3).transpose(0, 1))
            expected = conv2d_input(x.shape, weight.double(), g.double(), padding=k // 2)
            assert torch.equal(gx, expected.round().to(dtype))
            # All that the compiled code reads of a row, whole vectors at each place of the window
            assert triplet_cpu._pad(x, k).shape[3] >= math.ceil(columns / 16) * 16 + k - 1


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
    with pytest.raises(ArgumentError, match="kernels must be 'auto', 'plain' or 'fast', got 'C'"):
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
