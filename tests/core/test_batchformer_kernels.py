"""BatchFormer's compiled layer: the plain layer's values and gradients, and dropout of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from plugin_core import BatchFormer
from plugin_core.kernels import batchformer_cpu
from plugin_core.kernels.library import library


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the inputs that went through the compiled layer."""
    shapes: list[torch.Size] = []
    apply = batchformer_cpu._Layer.apply

    def noted(code: Any, drops: Any, epsilons: Any, is_key: Any, x: Tensor, *rest: Any) -> Tensor:
        shapes.append(x.shape)
        return apply(code, drops, epsilons, is_key, x, *rest)

    monkeypatch.setattr(batchformer_cpu._Layer, "apply", noted)
    return shapes


def trained(*args: Any, **kwargs: Any) -> BatchFormer:
    module = BatchFormer(*args, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def results(module: BatchFormer, x: Tensor, mask: Tensor | None, kernels: str) -> dict[str, Tensor]:
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLUGIN_KERNELS", kernels)
        y = module(x, mask)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "heads", "feedforward"),
    [
        (1, 3, 8, 2, 8),
        (2, 17, 32, 1, 40),
        (5, 9, 24, 4, 7),
        (64, 2, 16, 2, 16),
        (3, 1, 256, 4, 256),
    ],
)
def test_values_and_gradients_are_the_plain_layers(
    batch, length, channels, heads, feedforward, masked, uses
):
    module = trained(channels, heads, feedforward, dropout=0.0, num_layers=2)
    x = torch.randn(batch, length, channels)
    mask = torch.rand(batch, length) < 0.4 if masked else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single sample
        found, expected = (results(module, x, mask, kernels) for kernels in ("fast", "plain"))
    assert uses
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-6
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5 * scale, msg=name)


def test_derivatives_are_those_of_the_function_with_dropout_held(fast, uses):
    module = trained(6, 2, 5, dropout=0.3).double()
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(4)  # the same elements are dropped each time
        return module(x)

    assert torch.autograd.gradcheck(function, (x, *module.parameters()))
    assert uses


def test_second_derivative_is_refused(fast):
    module, x = trained(8), torch.randn(2, 3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match="cannot be differentiated twice; set .* PLUGIN_KERNELS=plain"
    ):
        grad.sum().backward()


# ------------------------------------------------------------------------------------------ dropout


def dropped(rate: float, rows: int = 400, columns: int = 16) -> Tensor:
    """Which of (rows, columns) ones a dropout of this rate makes zero."""
    functions = library()
    assert functions is not None
    x = torch.zeros(rows, columns)
    dropout = batchformer_cpu._Dropout.draw(rate)
    batchformer_cpu._Code(functions, "float32", 1).relu(x, torch.ones(columns), dropout)
    assert x.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
    return x == 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_everywhere_and_no_pattern(rate):
    zeros = dropped(rate).float()
    spread = (rate * (1 - rate)) ** 0.5
    assert float(zeros.mean()) == pytest.approx(rate, abs=4.5 * spread / 80)
    assert ((zeros.mean(dim=0) - rate).abs() < 4.5 * spread / 400**0.5).all()
    assert ((zeros.mean(dim=1) - rate).abs() < 5 * spread / 4).all()
    # Neighbours in a row, in a column and on the diagonals have nothing to do with one another.
    centred = zeros - zeros.mean()
    for rows, columns in ((0, 1), (1, 0), (1, 1), (2, 0), (1, -1)):
        other = centred.roll((rows, columns), (0, 1))
        assert float((centred * other).mean()) == pytest.approx(0, abs=4.5 * spread**2 / 80)


def test_dropout_follows_pytorchs_seed_and_differs_from_step_to_step(fast, uses):
    torch.manual_seed(1)
    first, second = dropped(0.5), dropped(0.5)
    assert 0.45 < float((first != second).float().mean()) < 0.55
    torch.manual_seed(1)
    assert torch.equal(first, dropped(0.5))
    module, x = trained(8), torch.randn(3, 4, 8)
    torch.manual_seed(2)
    y = module(x)
    assert not torch.equal(y, module(x))
    torch.manual_seed(2)
    assert torch.equal(y, module(x)) and uses


def test_dropout_before_the_norm_drops_by_its_rate_and_scales_the_rest():
    functions = library()
    assert functions is not None
    x, y = torch.zeros(2, 50, 8)
    y.fill_(2.0)
    bias, ones = torch.ones(8), torch.ones(8)
    dropout = batchformer_cpu._Dropout.draw(0.25)
    code, out = batchformer_cpu._Code(functions, "float32", 1), torch.empty(50, 8)
    code.add_norm(x, y, bias, (ones, 0 * ones, 1e-5), dropout, out)
    assert y.unique().tolist() == pytest.approx([0.0, 3 / 0.75])
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(y, (8,)), atol=1e-5, rtol=1e-5)


def test_dropout_of_a_part_may_be_in_training_alone(fast, uses):
    module, x = BatchFormer(8).eval(), torch.randn(2, 3, 8)
    assert torch.equal(module(x), module(x))
    module.layers[0].dropout2.train()
    assert not torch.equal(module(x), module(x))
    module.layers[0].dropout2.p = 1.0
    assert torch.equal(module(x), module(x)) and torch.isfinite(module(x)).all()
    assert uses


def test_backward_under_autocast_and_another_default_device_are_no_matter(fast, uses):
    module, x = BatchFormer(8, dropout=0.0), torch.randn(2, 3, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).pow(2).sum(), x)
    with torch.device("meta"):
        y = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x)
    torch.testing.assert_close(grad, expected)
    assert len(uses) == 2


def test_mean_over_dropout_is_the_function_without_it(fast):
    # Of the attention's weights: they are dropped before they weigh linear values.
    module = trained(8, 2, dropout=0.0).eval()
    layer = module.layers[0]
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        for parameter in (layer.linear2.weight, layer.linear2.bias):
            parameter.zero_()
        layer.self_attn.dropout = 0.5
        layer.self_attn.out_proj.weight.mul_(1e-3)  # so that the norm is nearly linear, too
        layer.self_attn.out_proj.bias.zero_()
        expected = module(x)
        module.train()
        seen = torch.stack([module(x) for _ in range(400)])
    deviation = (seen.mean(0) - expected).abs()
    assert seen.std(0).max() > 0
    assert (deviation <= 5 * seen.std(0) / 400**0.5 + 1e-5).all()


# ------------------------------------------------------------------------------ which path is taken


def test_what_the_compiled_layer_has_no_room_for_takes_the_plain_one(fast, uses):
    for module, shape in (
        (BatchFormer(8), (65, 1, 8)),
        (BatchFormer(512, num_heads=1), (17, 1, 512)),
        (BatchFormer(8).bfloat16(), (2, 3, 8)),
    ):
        module(torch.randn(shape, dtype=next(module.parameters()).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        BatchFormer(8)(torch.randn(2, 3, 8))
    assert not uses


def test_module_that_was_exchanged_or_has_a_hook_is_called(fast, uses):
    module, x, seen = BatchFormer(8), torch.randn(2, 3, 8), []
    module.layers[0].linear1.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    module(x)
    assert seen == [(2, 3, 8)] and not uses
    module = BatchFormer(8)

    class Twice(torch.nn.Linear):
        pass

    module.layers[0].linear1 = Twice(8, 8)
    module(x)
    assert not uses
