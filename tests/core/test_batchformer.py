"""BatchFormer: the published numbers, PyTorch's layer, cases by hand, two processes, odd input."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import two_processes
from torch import Tensor, nn

from plugin_core import BatchFormer
from plugin_core.errors import ArgumentError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


# ------------------------------------------------------------------------------- published numbers


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"batchformer_v2_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def part(numbers: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}


def detr_layer(x: Tensor, pos: Tensor, padding: Tensor, state: dict[str, Tensor]) -> Tensor:
    """A post-norm encoder layer of DETR on (L, B, C), in evaluation or without dropout."""
    attended, _ = F.multi_head_attention_forward(
        *(x + pos, x + pos, x, x.shape[2], 4),
        *(state["self_attn.in_proj_weight"], state["self_attn.in_proj_bias"]),
        *(None, None, False, 0.0),
        *(state["self_attn.out_proj.weight"], state["self_attn.out_proj.bias"]),
        key_padding_mask=padding,
    )
    x = F.layer_norm(x + attended, x.shape[2:], state["norm1.weight"], state["norm1.bias"])
    hidden = F.relu(F.linear(x, state["linear1.weight"], state["linear1.bias"]))
    x = x + F.linear(hidden, state["linear2.weight"], state["linear2.bias"])
    return F.layer_norm(x, x.shape[2:], state["norm2.weight"], state["norm2.bias"])


@pytest.mark.parametrize("name", ["first", "two"])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_with_batchformer_gives_the_authors_numbers(name, training):
    numbers = golden(name)
    x, pos, padding = numbers["src"], numbers["pos"], numbers["key_padding_mask"]
    indices = sorted({int(key.split(".")[1]) for key in numbers if key.startswith("state/bf.")})
    assert indices == ([0] if name == "first" else [0, 2])
    for i in range(3):
        x = detr_layer(x, pos, padding, part(numbers, f"state/layers.{i}."))
        if training and i in indices:
            module = BatchFormer(32, dropout=0)
            module.load_state_dict(part(numbers, f"state/bf.{i}."), strict=True)
            streams = [x, x] if i == indices[0] else x.chunk(2, dim=1)
            x = torch.cat([streams[0], module(streams[1].transpose(0, 1)).transpose(0, 1)], dim=1)
            if i == indices[0]:
                pos, padding = pos.repeat(1, 2, 1), padding.repeat(2, 1)
    expected = numbers["out_train" if training else "out_eval"]
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_pytorchs_layers_over_the_batch(num_layers, masked):
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0)
    reference = layer
    if num_layers > 1:
        reference = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
    ours = BatchFormer(16, feedforward_channels=24, dropout=0.0, num_layers=num_layers)
    for parameter in reference.parameters():  # biases and norms, too, have to matter
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(3, 5, 16)
    padding = None
    if masked:
        # No position where everything is padding: there PyTorch's gives NaN.
        padding = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    results = []
    for model, mask in ((reference, None if padding is None else padding.T), (ours, padding)):
        given = x.clone().requires_grad_()
        name = "key_padding_mask" if model is ours else "src_key_padding_mask"
        y = model(given, **{name: mask})
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {k.removeprefix("layers.0."): p.grad for k, p in model.named_parameters()}
        results.append((y, given.grad, grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=2e-5)


# ----------------------------------------------------------------------------------------- by hand


def averaging(channels: int) -> BatchFormer:
    """Attention that weighs all alike and hands values on, and no feed-forward network."""
    module = BatchFormer(channels, num_heads=1, dropout=0)
    layer = module.layers[0]
    with torch.no_grad():
        for parameter in (*layer.self_attn.parameters(), *layer.linear2.parameters()):
            parameter.zero_()
        layer.self_attn.in_proj_weight[2 * channels :] = torch.eye(channels)
        layer.self_attn.out_proj.weight.copy_(torch.eye(channels))
    return module


def test_two_samples_worked_out_by_hand():
    # Each sample gets the mean (2, 2, 5) added, and is normalized: (3, 5, 10) has mean 6 and
    # variance 26 / 3, and (5, 3, 10) the same.
    x = torch.tensor([[[1.0, 3.0, 5.0]], [[3.0, 1.0, 5.0]]])
    y = averaging(3)(x)
    scale = (26 / 3) ** -0.5
    expected = torch.tensor([[[-3.0, -1.0, 4.0]], [[-1.0, -3.0, 4.0]]]) * scale
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)


def test_padding_is_not_averaged_over():
    x = torch.tensor([[[1.0, 3.0, 5.0]], [[300.0, 1.0, -7.0]]])
    padding = torch.tensor([[False], [True]])
    y = averaging(3)(x, padding)
    torch.testing.assert_close(y[:1], F.layer_norm(x[:1], (3,)), rtol=0, atol=1e-4)


def test_positions_do_not_see_one_another_and_samples_have_no_order():
    module, x = BatchFormer(8).eval(), torch.randn(4, 6, 8)
    y = module(x)
    torch.testing.assert_close(module(x[:, [3]]), y[:, [3]])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(module(x[order]), y[order])
    changed = x.clone()
    changed[1, 2] += 1
    differs = (module(changed) - y).abs().amax(dim=2) > 1e-6
    assert differs[:, 2].all() and not differs[:, [0, 1, 3, 4, 5]].any()


def test_position_where_all_is_padding_stays_finite():
    module, x = BatchFormer(8), torch.randn(2, 3, 8, requires_grad=True)
    padding = torch.tensor([[False, False, True], [False, True, True]])
    y = module(x, padding)
    y.sum().backward()
    assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()


# ---------------------------------------------------------------------------------- how it behaves


def test_dropout_is_that_of_the_paper_and_of_training_only():
    module, x = BatchFormer(8), torch.randn(3, 4, 8)
    rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout)]
    assert {*rates, module.layers[0].self_attn.dropout} == {0.5}
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_attention_is_dropped_out_too():
    module, x = averaging(3), torch.randn(6, 1, 3)
    module.layers[0].self_attn.dropout = 0.5
    assert not torch.equal(module(x), module(x))


def test_batch_of_one_is_warned_about_once():
    module, x = BatchFormer(8), torch.randn(1, 3, 8)
    with pytest.warns(UserWarning, match="single sample.*batch size.*gather=True"):
        module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x)
        BatchFormer(8)(torch.randn(2, 3, 8))
        BatchFormer(8).eval()(x)


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 1, 8)])
def test_empty_batches_pass(shape):
    x = torch.randn(shape, requires_grad=True)
    y = BatchFormer(8)(x)
    y.sum().backward()
    assert y.shape == shape


@pytest.mark.parametrize("training", [False, True])
def test_first_and_second_derivatives_are_those_of_the_function(training):
    module = BatchFormer(4, 2, 3, dropout=0.3).double().train(training)
    x = torch.randn(3, 2, 4, dtype=torch.double, requires_grad=True)
    padding = torch.tensor([[False, True], [False, False], [True, False]])

    def function(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(4)  # the same elements are dropped each time
        return module(x, padding)

    inputs = (x, *module.parameters())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_copy_computes_the_same():
    module, x = BatchFormer(8).eval(), torch.randn(3, 4, 8)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_bfloat16_autocast_stays_close():
    module, x = BatchFormer(16).eval(), torch.randn(3, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_compiles_without_a_graph_break():
    module, x = BatchFormer(8).eval(), torch.randn(3, 4, 8)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 0}, "embed_dims must be a positive integer, got 0"),
        ({"num_heads": 3}, "num_heads must divide embed_dims, got num_heads=3 and embed_dims=8"),
        ({"feedforward_channels": -1}, "feedforward_channels must be a positive integer, got -1"),
        ({"num_layers": 1.0}, "num_layers must be a positive integer, got 1.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}$") as caught:
        BatchFormer(**{"embed_dims": 8, **arguments})
    assert caught.value.argument in arguments


def test_wrong_input_is_named():
    module = BatchFormer(8)
    with pytest.raises(ValueError, match=r"\(B, L, 8\), got \(2, 3\)"):
        module(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"\(B, L, 8\), got \(2, 3, 4\)"):
        module(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"\(B, L\) = \(2, 3\), got \(3, 2\)"):
        module(torch.randn(2, 3, 8), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"3 positions together, got \[\(1, 2\)\]"):
        module(torch.randn(2, 3, 8), spatial_shapes=[(1, 2)])


# ----------------------------------------------------------------------------------- two processes


def shares(uneven: bool) -> list[tuple[Tensor, Tensor | None]]:
    """What each process has: features (B, L, C) and a padding mask."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 5), (3, 3)] if uneven else [(2, 4), (2, 4)]
    batches: list[tuple[Tensor, Tensor | None]] = []
    for rank, (batch, length) in enumerate(shapes):
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, 1 + rank] = True
        x = torch.randn(batch, length, 8, generator=generator, dtype=torch.double)
        batches.append((x, padding if uneven else None))
    return batches


Step = tuple[Tensor, Tensor, dict[str, Tensor]]


def train_a_step(module: nn.Module, x: Tensor, padding: Tensor | None, order: int) -> Step:
    """Output, gradient at x and those of the parameters, of a loss or of one on its gradient."""
    x = x.clone().requires_grad_()
    y = module(x, padding)
    # Padded positions count for nothing, as in a detector.
    seen = torch.ones(y.shape[:2]) if padding is None else ~padding
    loss = ((y**3).sum(dim=2) * seen).sum()
    if order == 2:
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = slope.square().sum()
    loss.backward()
    assert x.grad is not None
    grads = {k.removeprefix("module."): p.grad for k, p in module.named_parameters()}
    return y.detach(), x.grad, {k: g for k, g in grads.items() if g is not None}


def steps_of_process(rank: int) -> dict[tuple[bool, int], Step]:
    steps = {}
    for uneven, order in CASES:
        torch.manual_seed(0)
        module = BatchFormer(8, dropout=0, num_layers=2, gather=True).double()
        model = nn.parallel.DistributedDataParallel(module)
        steps[uneven, order] = train_a_step(model, *shares(uneven)[rank], order)
    return steps


CASES = [(False, 1), (True, 1), (True, 2)]


@pytest.fixture(scope="module")
def steps_of_both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[bool, int], Step]]:
    return two_processes.run(steps_of_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize(("uneven", "order"), CASES, ids=["even", "uneven", "second_derivative"])
def test_two_processes_that_gather_give_what_one_gives_on_the_joined_batch(
    uneven, order, steps_of_both
):
    results = [steps[uneven, order] for steps in steps_of_both]
    torch.manual_seed(0)
    module = BatchFormer(8, dropout=0, num_layers=2).double()
    batches = shares(uneven)
    longest = max(x.shape[1] for x, _ in batches)
    joined = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x, _ in batches])
    padding = None
    if uneven:
        masks = [F.pad(m, (0, longest - m.shape[1]), value=True) for _, m in batches]
        padding = torch.cat(masks)
    y, grad, grads = train_a_step(module, joined, padding, order)
    first = 0
    for (x, mask), (got_y, got_grad, got_grads) in zip(batches, results, strict=True):
        batch, length = x.shape[:2]
        seen = slice(None) if mask is None else ~mask
        torch.testing.assert_close(got_y[seen], y[first : first + batch, :length][seen])
        torch.testing.assert_close(got_grad, grad[first : first + batch, :length])
        # DistributedDataParallel averages over the processes.
        halves = {name: value / 2 for name, value in grads.items()}
        torch.testing.assert_close(got_grads, halves)
        first += batch
