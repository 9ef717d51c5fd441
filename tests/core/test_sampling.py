"""Sampling with second derivatives: the same numbers as the operators that have first ones only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from plugin_core.kernels.sampling import (
    bilinear_sample,
    deformable_attention,
    deformable_convolution,
    linear_operator,
    weighted_rows,
)


def test_sampling_is_that_of_grid_sample():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    points = (torch.rand(2, 50, 2, dtype=torch.double) * 8 - 1.5).requires_grad_()
    grid = (points + 0.5) / points.new_tensor([5, 4]) * 2 - 1
    expected = F.grid_sample(maps, grid[:, None], align_corners=False)[:, :, 0]
    sampled = bilinear_sample(maps, points)
    torch.testing.assert_close(sampled, expected)
    weight = torch.randn_like(expected)
    for mine, other in zip(
        torch.autograd.grad((sampled * weight).sum(), (maps, points)),
        torch.autograd.grad((expected * weight).sum(), (maps, points)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_sampling_can_be_differentiated_twice():
    maps = torch.randn(1, 2, 3, 3, dtype=torch.double, requires_grad=True)
    points = (torch.rand(1, 6, 2, dtype=torch.double) * 4 - 1).requires_grad_()
    assert gradcheck(bilinear_sample, (maps, points), fast_mode=True)
    assert gradgradcheck(bilinear_sample, (maps, points), fast_mode=True)


def test_a_point_on_a_cell_is_the_cell_and_one_outside_is_0():
    maps = torch.arange(6.0).view(1, 1, 2, 3)
    points = torch.tensor([[[2.0, 1.0], [0.5, 0.5], [-1.0, 0.0], [5.0, 5.0]]])
    assert bilinear_sample(maps, points)[0, 0].tolist() == [5.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_large_map_in_half_precision_is_sampled_at_the_right_cells(dtype):
    maps = torch.arange(100.0).repeat(1, 1, 70, 1).to(dtype)  # each column its number
    points = torch.tensor([[[99.0, 69.0], [3.0, 65.0], [64.0, 40.0]]])
    assert bilinear_sample(maps, points)[0, 0].tolist() == [99.0, 3.0, 64.0]


def test_a_point_that_is_nan_gives_nan():
    points = torch.tensor([[[float("nan"), 0.0], [1.0, 0.0]]])
    sampled = bilinear_sample(torch.arange(6.0).view(1, 1, 2, 3), points)[0, 0]
    assert sampled[0].isnan() and sampled[1] == 1.0


@pytest.mark.parametrize("rows", [30, 5])  # the CPU multiplies more rows than a sum has otherwise
def test_weighted_rows_have_the_derivatives_of_gathered_ones(rows):
    table = torch.randn(rows, 3, dtype=torch.double, requires_grad=True)
    index = torch.randint(rows, (6, 8))
    weights = torch.randn(6, 8, dtype=torch.double, requires_grad=True)
    given = (table, weights)
    found = []
    for sums in (weighted_rows(table, index, weights), (table[index] * weights[..., None]).sum(1)):
        first = torch.autograd.grad(sums.tanh().sum(), given, create_graph=True)
        total = sum(g.pow(3).sum() for g in first)
        second = torch.autograd.grad(total, given, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), given)
        found.append((sums, *first, *second, *third))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_no_sampled_values_are_kept_for_the_derivatives():
    shapes, value, locations, weights = attention_inputs()
    value = torch.randn(2, 16, 2, 64, requires_grad=True)
    kept: list[int] = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attended = deformable_attention(value, shapes, locations, weights)
        torch.autograd.grad(attended.tanh().sum(), (value, locations, weights), create_graph=True)
    assert max(kept) <= value.numel() < weights.numel() * 64


def test_there_may_be_nothing_to_sample():
    value, shapes = torch.randn(2, 6, 2, 4, requires_grad=True), [(2, 3)]
    for images, queries in ((2, 0), (0, 3)):
        locations = torch.rand(images, queries, 2, 1, 3, 2, requires_grad=True)
        attended = deformable_attention(value[:images], shapes, locations, locations[..., 0])
        assert attended.shape == (images, queries, 8)
        (slope,) = torch.autograd.grad(attended.sum(), locations, create_graph=True)
        assert slope.shape == locations.shape
    assert bilinear_sample(torch.randn(0, 2, 3, 3), torch.zeros(0, 4, 2)).shape == (0, 2, 4)


def attention_inputs(dtype=torch.float):
    shapes = [(4, 3), (2, 2)]
    value = torch.randn(2, 16, 2, 4, dtype=dtype, requires_grad=True)
    locations = (torch.rand(2, 5, 2, 2, 3, 2, dtype=dtype) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 5, 2, 2, 3, dtype=dtype, requires_grad=True)
    return shapes, value, locations, weights


def test_attention_is_mmcvs():
    operators = pytest.importorskip("mmcv.ops.multi_scale_deform_attn")
    shapes, value, locations, weights = attention_inputs()
    expected = operators.multi_scale_deformable_attn_pytorch(
        value, torch.tensor(shapes), locations, weights
    )
    torch.testing.assert_close(deformable_attention(value, shapes, locations, weights), expected)


def test_attention_can_be_differentiated_twice():
    shapes, *inputs = attention_inputs(torch.double)

    def attend(value, locations, weights):
        return deformable_attention(value, shapes, locations, weights)

    few = [inputs[0][:1, :, :1, :2], inputs[1][:1, :1, :1], inputs[2][:1, :1, :1]]
    inputs = [x.detach().requires_grad_() for x in few]
    assert gradgradcheck(attend, inputs, nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize(
    ("groups", "parts", "stride", "padding", "dilation"),
    [(1, 1, 1, 1, 1), (2, 2, 2, 1, 1), (1, 2, 1, 2, 2), (2, 1, 1, 0, 1)],
)
def test_convolution_is_mmcvs(groups, parts, stride, padding, dilation):
    ops = pytest.importorskip("mmcv.ops")
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = ops.ModulatedDeformConv2d(8, 6, 3, deform_groups=parts, **geometry)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 9, 7)
    plain = F.conv2d(x, layer.weight, layer.bias, **geometry)
    offset = torch.randn(2, 18 * parts, *plain.shape[2:])
    mask = torch.rand(2, 9 * parts, *plain.shape[2:])
    pairs = {name: (n, n) for name, n in geometry.items() if name != "groups"}

    def convolve(offset, mask):
        return deformable_convolution(
            x, offset, mask, layer.weight, layer.bias, groups=groups, **pairs
        )

    torch.testing.assert_close(convolve(offset, mask), layer(x, offset, mask), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(convolve(offset * 0, mask * 0 + 1), plain, atol=1e-5, rtol=1e-5)


def test_linear_operator_can_be_differentiated_twice():
    weight = torch.randn(7, 5, dtype=torch.double)

    def operator(features):
        return features[0] @ weight.T + 2 * features[1] @ weight.T

    def square(*features):
        return linear_operator(operator, operator(features), features) ** 2

    features = [torch.randn(3, 5, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert gradcheck(square, features)
    assert gradgradcheck(square, features)


def test_linear_operator_takes_an_operator_that_has_first_derivatives_only():
    def operator(features):
        grid = torch.zeros(1, 2, 2, 2, dtype=torch.double) + 0.2
        return F.grid_sample(features[0], grid, align_corners=False)

    x = torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        gradgradcheck(lambda x: operator([x]) ** 2, x)
    assert gradgradcheck(lambda x: linear_operator(operator, operator([x]), [x]) ** 2, x)


def test_linear_operator_leaves_a_feature_that_is_not_used_at_0():
    used, unused = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)

    def operator(features):
        return features[0] * 3

    linear_operator(operator, operator([used, unused]), [used, unused]).sum().backward()
    assert (used.grad == 3).all() and not unused.grad.any()
