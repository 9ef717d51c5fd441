"""Interventional dual attention: the reproduction's numbers, cases by hand, and odd input.

``ida_light.npz`` and ``ida_heavy.npz`` are of the public reproduction, mended where it departs from
the paper. ``ida_reproduction.npz`` is of the reproduction as it stands, both of its versions, with
the same weights and input. Keys are ``FORM/VERSION/…``: ``logits``, ``grad_x``, ``grad/PARAMETER``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plugin_core import IDABlock, IDAClassifier, build_block_plugin
from plugin_core.errors import StateDictError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HEAVY = pytest.mark.parametrize("heavy", [False, True], ids=["light", "heavy"])
PROJECTION = pytest.mark.parametrize("projection", ["scale", "grouped", "full"])
BOTH = pytest.mark.parametrize("kind", [IDAClassifier, IDABlock])


def golden(heavy: bool) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"ida_{'heavy' if heavy else 'light'}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_classifier(heavy: bool, **arguments: Any) -> IDAClassifier:
    model = IDAClassifier(32, 7, heavy=heavy, **arguments)
    state = {k.removeprefix("state/"): v for k, v in golden(heavy).items() if k[:6] == "state/"}
    model.load_state_dict(state, strict=True)
    return model


# ------------------------------------------------------------------------------- published numbers


@HEAVY
def test_logits_and_gradient_equal_those_of_the_reproduction_mended_to_the_paper(heavy):
    numbers, model = golden(heavy), golden_classifier(heavy)
    x = numbers["x"].requires_grad_()
    logits = model(x)
    torch.testing.assert_close(logits, numbers["logits"], rtol=0, atol=1e-5)
    (logits * numbers["r"]).sum().backward()
    torch.testing.assert_close(x.grad, numbers["grad_x"], rtol=0, atol=1e-5)


@HEAVY
@pytest.mark.parametrize(
    ("version", "last_head_norm"), [("org_backbone", False), ("new_attention", True)]
)
def test_interleaved_logits_and_gradients_equal_those_of_the_reproduction_as_it_stands(
    heavy, version, last_head_norm
):
    numbers, at = golden(heavy), f"{'heavy' if heavy else 'light'}/{version}/"
    with np.load(GOLDEN / "ida_reproduction.npz") as file:
        of = {k.removeprefix(at): torch.from_numpy(file[k]) for k in file.files if k.startswith(at)}
    model = golden_classifier(heavy, sample_order="interleaved", last_head_norm=last_head_norm)
    x = numbers["x"].requires_grad_()
    logits = model(x)
    (logits * numbers["r"]).sum().backward()
    found = {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    found.update(logits=logits, grad_x=x.grad)
    assert len(of) == 7  # 5 parameters among them
    for name, value in of.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    # With the paper's order the same weights give other logits.
    assert (logits - numbers["logits"]).abs().max() > 0.01


# ----------------------------------------------------------------------------------- by hand


def silence_second_attention(model: nn.Module) -> None:
    """Leave the samples as they are: what is added to them becomes zero."""
    for layer in model.att_layers.layers:
        nn.init.zeros_(layer.att.out_proj.weight)
        nn.init.zeros_(layer.att.out_proj.bias)


def test_logit_worked_out_by_hand():
    # One head, one class of weight (3, 4), two positions x(0) = (5, 0) and x(1) = (0, 5), beta 5.
    model = IDAClassifier(2, 1, num_heads=1, beta=5.0)
    silence_second_attention(model)
    with torch.no_grad():
        model.head[0].weight.copy_(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
    x = torch.tensor([[5.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    logits, attention = model(x, return_attention=True)
    # |w| + beta = 10, so that the scores are 1.5 and 2.
    share = 1 / (1 + torch.exp(torch.tensor(0.5)))
    torch.testing.assert_close(attention.flatten(), torch.stack([share, 1 - share]))
    # E = (5 share, 5 (1 - share)), and the logit its score
    torch.testing.assert_close(logits, (1.5 * share + 2 * (1 - share)).view(1, 1))


def test_interleaved_sample_has_a_piece_of_each_head():
    # Two heads of two channels and one position, where the first attention leaves x as it is
    model = IDAClassifier(4, 1, num_heads=2, beta=1.0, sample_order="interleaved")
    seen = []
    model.att_layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    silence_second_attention(model)
    with torch.no_grad():
        model.head[0].weight.copy_(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
        model.head[1].weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    x = torch.tensor([1.0, 2.0, 10.0, 20.0]).view(1, 4, 1, 1)
    # (1, 10) meets the first head's weights (3, 4), and (2, 20) the second one's (0, 1).
    torch.testing.assert_close(model(x), torch.tensor([[43 / 6 + 20 / 2]]))
    torch.testing.assert_close(seen[0], torch.tensor([[[1.0, 10.0], [2.0, 20.0]]]))
    model.last_head_norm = True
    torch.testing.assert_close(model(x), torch.tensor([[43 / 2 + 20 / 2]]))


def test_constant_input_attends_everywhere_alike():
    _, attention = IDAClassifier(8, 3)(torch.ones(2, 8, 4, 5), return_attention=True)
    assert attention.shape == (2, 4, 3, 4, 5)
    torch.testing.assert_close(attention, torch.full_like(attention, 1 / 20))


@PROJECTION
def test_block_hands_a_class_back_to_the_positions_that_asked_for_it(projection):
    block = IDABlock(8, num_queries=3, num_heads=2, projection=projection).double()
    nn.init.uniform_(block.proj.weight)
    nn.init.uniform_(block.proj.bias)
    x = torch.randn(1, 8, 2, 3, dtype=torch.float64)
    expected = torch.zeros(1, 8, 2, 3, dtype=torch.float64)
    heads = x.view(2, 4, 6)
    samples = torch.zeros(3, 2, 4, dtype=torch.float64)
    scores = torch.zeros(2, 3, 6, dtype=torch.float64)
    for n in range(2):
        for k in range(3):
            w = block.head[n].weight[k].flatten()
            scores[n, k] = w @ heads[n] / (w.norm() + 1 / 32)
            samples[k, n] = heads[n] @ scores[n, k].softmax(0)
    attended = block.att_layers(samples)
    for n in range(2):
        share = scores[n].softmax(0)  # over the queries, at each position
        expected[0, 4 * n : 4 * n + 4] = torch.einsum("kp,kd->dp", share, attended[:, n]).view(
            4, 2, 3
        )
    alpha = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(block(x), x + block.proj(expected))
    torch.testing.assert_close(block(x, warm_start=alpha), x + 0.7 * block.proj(expected))
    block.proj.register_forward_hook(lambda *_: None)  # then the module itself is called
    torch.testing.assert_close(block(x, warm_start=alpha), x + 0.7 * block.proj(expected))


def test_what_a_position_gets_is_added_as_it_is_before_the_scale_has_learned():
    block = IDABlock(8, num_queries=3, num_heads=2)
    full = IDABlock(8, num_queries=3, num_heads=2, projection="full")
    full.load_state_dict({k: v for k, v in block.state_dict().items() if "proj." != k[:5]}, False)
    nn.init.dirac_(full.proj.weight)
    nn.init.zeros_(full.proj.bias)
    x = torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(block(x), full(x))


@PROJECTION
@HEAVY
def test_state_dict_of_a_block_tells_its_arguments(projection, heavy):
    arguments = {"num_queries": 3, "num_heads": 2, "heavy": heavy, "projection": projection}
    assert IDABlock.arguments_in(IDABlock(8, **arguments).state_dict()) == arguments


def test_default_block_has_less_than_a_hundredth_of_a_ResNet_50s_parameters():
    counts = [sum(p.numel() for p in IDABlock(c).parameters()) for c in (1024, 2048)]
    assert counts == [100_608, 233_984]


def test_mixers_before_the_classifier_mix_positions_then_channels():
    model, x = IDAClassifier(8, 3, num_mixers=2), torch.randn(2, 8, 4, 5)
    plain = IDAClassifier(8, 3)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "mixers" not in k})
    hidden = x
    for mixer in model.mixers:
        kernel, bias = mixer.positions.weight, mixer.positions.bias
        wide = torch.nn.functional.pad(hidden, (3, 3, 3, 3))
        windows = wide.unfold(2, 7, 1).unfold(3, 7, 1)  # (B, C, H, W, 7, 7)
        hidden = hidden + (windows * kernel[:, 0, None, None]).sum((4, 5)) + bias[:, None, None]
        hidden = torch.einsum("oc,bchw->bohw", mixer.channels.weight[:, :, 0, 0], hidden)
        hidden = (hidden + mixer.channels.bias[:, None, None]).relu()
    torch.testing.assert_close(model(x), plain(hidden))


def test_only_mixers_let_a_classifier_see_where_something_lies():
    x = torch.randn(2, 8, 4, 5)
    moved = x.roll(1, dims=3)
    plain, mixed = IDAClassifier(8, 3), IDAClassifier(8, 3, num_mixers=1)
    torch.testing.assert_close(plain(moved), plain(x))
    assert (mixed(moved) - mixed(x)).abs().max() > 0.01


@pytest.mark.parametrize(("saved", "built"), [(0, 2), (2, 0)])
def test_classifier_of_other_mixers_is_not_loaded(saved, built):
    state = IDAClassifier(8, 3, num_mixers=saved).state_dict()
    with pytest.raises(StateDictError, match=f"trained with {saved} mixers .* with {built};"):
        IDAClassifier(8, 3, num_mixers=built).load_state_dict(state, strict=False)


@pytest.mark.parametrize("built", [0, 2])
def test_classifier_of_version_0_2_with_linear_layers_is_not_loaded(built):
    state = IDAClassifier(8, 3).state_dict() | {"fcs.0.weight": torch.zeros(8, 8, 1, 1)}
    with pytest.raises(StateDictError, match=r"^fcs: .* which version 0\.2\.0 has"):
        IDAClassifier(8, 3, num_mixers=built).load_state_dict(state, strict=False)


@HEAVY
def test_every_parameter_of_the_block_learns(heavy):
    block = IDABlock(16, num_queries=5, num_heads=4, heavy=heavy)
    x, alpha = torch.randn(2, 16, 5, 4), torch.full((), 0.1, requires_grad=True)
    (block(x, warm_start=alpha) ** 3).sum().backward()
    silent = {name for name, p in block.named_parameters() if not p.grad.any()}
    # A bias of all keys alike moves no softmax.
    assert all(name.endswith("k_proj.bias") for name in silent) and alpha.grad != 0


def test_alpha_of_an_earlier_version_was_called_gamma():
    plugin = build_block_plugin("ida", 8, True, num_queries=3, num_heads=4)
    state = {name.replace("alpha", "gamma"): t for name, t in plugin.state_dict().items()}
    state["gamma"] = torch.tensor(0.3)
    plugin.load_state_dict(state, strict=True)
    assert plugin.alpha == state["gamma"]


# -------------------------------------------------------------------------------- odd input, errors


@BOTH
@HEAVY
@pytest.mark.parametrize("case", ["constant", "one position", "empty batch", "zero weight"])
def test_values_and_gradients_are_finite(kind, heavy, case):
    model = kind(8, 3, num_heads=4, heavy=heavy)
    shape = {"one position": (2, 8, 1, 1), "empty batch": (0, 8, 3, 3)}.get(case, (2, 8, 3, 3))
    x = torch.ones(shape) if case == "constant" else torch.randn(shape)
    x.requires_grad_()
    if case == "zero weight":
        with torch.no_grad():
            model.head[0].weight[1] = 0
    y = model(x)
    assert y.shape == (x.shape if kind is IDABlock else (len(x), 3))
    y.square().sum().backward()
    for tensor in (y, x.grad, *(p.grad for p in model.parameters())):
        assert torch.isfinite(tensor).all()


@BOTH
@HEAVY
def test_gradients_are_those_of_finite_differences(kind, heavy):
    model = kind(4, 2, num_heads=2, heavy=heavy).double()
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, x)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmaxes_and_norms_are_in_float32_under_autocast(kind, dtype):
    kinds: dict[str, set[torch.dtype]] = {"softmax": set(), "norm": set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("_softmax", "linalg_vector_norm"):
                kinds["norm" if "norm" in name else "softmax"].add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 8, 3, 3)
    model = kind(8, 3, num_heads=4, heavy=True)
    with torch.autocast("cpu", dtype), Watch():
        y = model(x)
    assert kinds == {"softmax": {torch.float32}, "norm": {torch.float32}}
    assert torch.isfinite(y).all()
    assert kind is IDAClassifier or y.dtype == x.dtype


def test_attention_of_great_scores_has_no_denormal_numbers():
    # A product of matrices that hold them takes many times as long on a CPU.
    x = 100 * torch.randn(2, 8, 9, 9)
    _, attention = IDAClassifier(8, 3)(x, return_attention=True)
    assert attention.min() > torch.finfo(torch.float32).tiny
    assert attention.min() < 1e-25 and attention.max() > 0.9


@BOTH
def test_no_tensor_is_as_large_as_the_square_of_the_positions(kind):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    model, x = kind(8, 3, num_heads=4), torch.randn(1, 8, 20, 20)
    with Watch():
        model(x).sum().backward()
    assert largest <= 4 * 3 * 400  # heads, classes, positions


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 10}, "num_heads must divide the 10 channels, got 4"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
    ],
)
def test_wrong_argument_is_named(kind, arguments, message):
    count = "num_queries" if kind is IDABlock else "num_classes"
    channels = arguments.get("channels", 8)
    others = {key: value for key, value in arguments.items() if key != "channels"}
    with pytest.raises(ValueError, match=message):
        kind(channels, **{count: 3, "num_heads": 4, **others})
    with pytest.raises(ValueError, match=f"{count} must be a positive integer, got -1"):
        kind(8, -1)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"sample_order": "head"}, "sample_order must be 'heads' or 'interleaved', got 'head'"),
        ({"last_head_norm": 1}, "last_head_norm must be True or False, got 1"),
        ({"num_mixers": -1}, "num_mixers must be 0 or a positive integer, got -1"),
    ],
)
def test_wrong_choice_of_the_classifier_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        IDAClassifier(8, 3, **argument)


def test_wrong_projection_is_named():
    with pytest.raises(ValueError, match="projection must be 'scale', 'grouped' or 'full', g"):
        IDABlock(16, projection="none")


@BOTH
@pytest.mark.parametrize("shape", [(8, 3, 3), (1, 4, 3, 3)])
def test_input_of_another_shape_is_named(kind, shape):
    with pytest.raises(ValueError, match=r"takes an input \(B, 8, H, W\), got"):
        kind(8, 3, num_heads=4)(torch.zeros(shape))


# --------------------------------------------------------------------- what frameworks do to models


@HEAVY
def test_classifier_compiles_without_a_graph_break(heavy):
    model, x = IDAClassifier(8, 3, heavy=heavy), torch.randn(2, 8, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


@BOTH
def test_memory_format_of_the_input_does_not_matter(kind):
    model, x = kind(8, 3, num_heads=4), torch.randn(2, 8, 4, 5)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
