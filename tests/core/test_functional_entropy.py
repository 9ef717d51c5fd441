"""Functional entropy: the published numbers, cases by hand, padding, and odd input."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.errors import ArgumentError
from plugin_core.methods.functional_entropy import (
    FLOOR,
    FunctionalEntropyRegularizer,
    expand_target,
    functional_entropy,
    functional_entropy_penalty,
    functional_information,
    functional_variance,
    noise_scale,
    perturb,
    repeat_samples,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "functional_entropy.npz"
BOUND = pytest.mark.parametrize(("bound", "key"), [("entropy", "ent"), ("variance", "var")])
METHOD = pytest.mark.parametrize("method", ["max_ent", "min_ent", "max_ent_minus"])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Bilinear(nn.Module):
    """Logits of an image (B, C) and a text (B, T, D) with a mask (B, T)."""

    def __init__(self, mask: Tensor | None = None, samples: int = 3) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 5), nn.Linear(3, 5)
        self.mask = None if mask is None else repeat_samples(mask, samples)

    def forward(self, x):
        text = self.text(x["text"]).tanh()
        if self.mask is not None:
            text = text.masked_fill(~self.mask.unsqueeze(2), 0)
        return self.image(x["image"]).tanh() + text.sum(1)


# ------------------------------------------------------------------------------- published numbers


@BOUND
def test_information_equals_the_authors(golden, bound, key):
    found = [functional_information(golden[f"grad_{m}"], golden["loss"], bound) for m in "ab"]
    torch.testing.assert_close(torch.stack(found), golden[f"scores_{key}"], rtol=0, atol=1e-5)


@BOUND
@METHOD
@pytest.mark.parametrize("norm", [1, 2])
def test_term_equals_the_authors(golden, bound, key, method, norm):
    term = functional_entropy_penalty(golden[f"scores_{key}"], norm, method)
    expected = golden[f"term_{key}_{method}_{norm}"]
    torch.testing.assert_close(term, expected, rtol=0, atol=1e-5)


def test_samples_and_targets_repeat_in_the_authors_order(golden):
    assert torch.equal(repeat_samples(golden["x"], 3), golden["repeated"])
    target = expand_target(golden["logits"].requires_grad_(), 3)
    assert not target.requires_grad
    torch.testing.assert_close(target, golden["expanded"], rtol=0, atol=1e-5)


def test_entropy_and_variance_of_samples_equal_the_authors(golden):
    for measure, key in (
        (functional_entropy, "functional_entropy"),
        (functional_variance, "variance"),
    ):
        torch.testing.assert_close(measure(golden["samples"]), golden[key], rtol=0, atol=1e-5)


@BOUND
@pytest.mark.parametrize("samples", [1, 3])
def test_as_published_information_term_and_gradients_are_the_authors(
    bound, key, samples, monkeypatch
):
    # Their code in float64: image features (B, C, H, W), text features (B, C), and their noise
    with np.load(GOLDEN.with_name("functional_entropy_published.npz")) as file:
        numbers = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    names = ("image", "text", "image_weight", "text_weight")
    image, text, a, b = (numbers[name].requires_grad_() for name in names)
    noise = iter([numbers[f"noise_{name}_{samples}"] for name in ("image", "text")])
    monkeypatch.setattr(torch, "randn_like", lambda x: next(noise).view(x.shape))

    def model(x):
        seen = torch.einsum("bchw,chwk->bk", x["image"], a).tanh()
        return seen * (x["text"] @ b) + x["text"] @ b

    modalities = {"image": image, "text": text}
    term, information = FunctionalEntropyRegularizer(samples, bound, weight=1.0, as_published=True)(
        model, modalities, model(modalities)
    )
    term.backward()
    at = f"{key}/{samples}/"
    found = {"scores": torch.stack([*information.values()]), "term": term.detach()}
    found |= {f"grad_{name}": x.grad for name, x in zip(names, (image, text, a, b), strict=True)}
    for name, value in found.items():
        torch.testing.assert_close(value, numbers[at + name], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------- gradients


@BOUND
@METHOD
@pytest.mark.parametrize("norm", [1.0, 2.0, 3.5])
def test_gradients_of_the_term_are_those_of_finite_differences(golden, bound, key, method, norm):
    a, b, loss = (golden[k].double().requires_grad_() for k in ("grad_a", "grad_b", "loss"))

    def term(a: Tensor, b: Tensor, loss: Tensor) -> Tensor:
        scores = [functional_information(g, loss, bound) for g in (a, b)]
        return functional_entropy_penalty(torch.stack(scores), norm, method)

    assert torch.autograd.gradcheck(term, (a, b, loss))


def test_gradient_of_the_term_in_closed_form(golden):
    scores = golden["scores_ent"].clone().requires_grad_()
    functional_entropy_penalty(scores).backward()
    s = golden["scores_ent"]
    # d/ds_m (sum of 1/s²)^(1/2)
    expected = -golden["term_ent_max_ent_2"].reciprocal() * s**-3
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-5)


def test_gradients_reach_the_features_and_the_model_as_finite_differences_say():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    model = Bilinear(mask, samples=2).double()
    regularizer = FunctionalEntropyRegularizer(samples=2, weight=1e-4)
    image, text = double(2, 4), double(2, 3, 3)
    # The size of the noise and the targets, of which no gradient is taken, as of here
    logits = double(2, 5).detach()
    scales = {"image": noise_scale(image), "text": noise_scale(text, mask)}

    def term(image: Tensor, text: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "plugin_core.methods.functional_entropy.noise_scale",
                lambda features, mask=None: scales["image" if mask is None else "text"],
            )
            modalities = {"image": image, "text": text}
            return regularizer(model, modalities, logits, masks={"text": mask})[0]

    assert torch.autograd.gradcheck(term, (image, text, *model.parameters()), atol=1e-6)


def test_no_gradient_through_the_clean_logits():
    model, image, text = Bilinear(), torch.randn(2, 4), torch.randn(2, 3, 3)
    logits = torch.randn(2, 5, requires_grad=True)
    term, information = FunctionalEntropyRegularizer()(
        model, {"image": image, "text": text}, logits
    )
    term.backward()
    assert logits.grad is None and not any(i.requires_grad for i in information.values())
    assert all(p.grad is not None for p in model.parameters())


def test_gradient_passes_through_the_clean_logits_only_as_published():
    model, image, text = Bilinear(), torch.randn(2, 4), torch.randn(2, 3, 3)
    logits = torch.randn(2, 5, requires_grad=True)
    regularizer = FunctionalEntropyRegularizer(as_published=True)
    term, _ = regularizer(model, {"image": image, "text": text}, logits)
    term.backward()
    assert logits.grad.any()
    with torch.no_grad():
        term, information = regularizer(model, {"image": image, "text": text}, logits)
    assert not term.requires_grad and all(i > 0 for i in information.values())


# ------------------------------------------------------------------------------------------ by hand


def test_as_published_gradients_of_positions_are_averaged_and_those_of_channels_added_up():
    rows, loss = torch.ones(2, 3, 4, 5), torch.tensor(0.5)
    levels = [rows, 2 * torch.ones(2, 3, 1, 1), torch.ones(2, 7)]
    assert functional_information(rows, loss, "variance") == 3 * 4 * 5
    assert functional_information(rows, loss, "variance", as_published=True) == 3
    assert functional_information(rows, loss, "entropy", as_published=True) == 6
    assert functional_information(levels, loss, "variance", as_published=True) == 3 + 12 + 7


def test_linear_models_information_worked_out_by_hand():
    # logits = <a, image> + <b, text>, and a loss of which each row's gradient is c / rows
    a, b, c = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 2.0]), 0.5
    image, text = torch.randn(4, 2), torch.randn(4, 3)
    regularizer = FunctionalEntropyRegularizer(
        samples=3,
        bound="variance",
        weight=2.0,
        norm=1,
        loss=lambda logits, target: c * logits.mean(),
    )
    term, information = regularizer(
        lambda x: (x["image"] @ a + x["text"] @ b).unsqueeze(1),
        {"image": image, "text": text},
        torch.zeros(4, 1),
    )
    of_row = (c / 12) ** 2  # times |a|² = 25 and |b|² = 9
    torch.testing.assert_close(information["image"], torch.tensor(25 * of_row))
    torch.testing.assert_close(information["text"], torch.tensor(9 * of_row))
    torch.testing.assert_close(term, torch.tensor(2 * (1 / 25 + 1 / 9) / of_row))


def test_bound_of_the_entropy_is_that_of_the_variance_by_the_loss():
    modalities = {"image": torch.randn(2, 4), "text": torch.randn(2, 3, 3)}
    model, logits, losses = Bilinear(), torch.randn(2, 5), []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        losses.append(F.binary_cross_entropy_with_logits(logits, target))
        return losses[-1]

    found = {}
    for bound in ("entropy", "variance"):
        torch.manual_seed(1)
        found[bound] = FunctionalEntropyRegularizer(bound=bound, loss=loss)(
            model, modalities, logits
        )[1]
    assert losses[0] == losses[1]
    for name in modalities:
        torch.testing.assert_close(found["entropy"][name] * losses[0], found["variance"][name])


def test_smallest_information_rules_the_term_and_its_gradient():
    scores = torch.tensor([1e-4, 1.0], requires_grad=True)
    term = functional_entropy_penalty(scores)
    term.backward()
    torch.testing.assert_close(term, torch.tensor(1e4))
    torch.testing.assert_close(scores.grad[0], torch.tensor(-1e8))
    assert -1e-3 < scores.grad[1] < 0


def test_entropy_of_a_constant_is_zero_and_of_a_single_value_the_largest():
    torch.testing.assert_close(functional_entropy(torch.full((2, 5), 3.0)), torch.tensor(0.0))
    one = functional_entropy(torch.tensor([[2.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(one, torch.tensor(math.log(4) / 4))  # -E f log E f with E f = 1/4


# -------------------------------------------------------------------------------------------- noise


def test_noise_has_the_standard_deviation_of_each_element_over_the_batch():
    features = torch.stack([torch.zeros(2), torch.tensor([2.0, 20.0])])
    torch.testing.assert_close(noise_scale(features), torch.tensor([[2.0, 20.0]]) / 2**0.5)
    noise = perturb(features, 20000) - repeat_samples(features, 20000)
    torch.testing.assert_close(noise.std(0), noise_scale(features)[0], rtol=0.02, atol=0)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), rtol=0, atol=0.3)


def test_a_batch_of_one_takes_the_deviation_of_its_own_elements():
    features = torch.randn(1, 3, 4, 5)
    assert noise_scale(features).shape == features.shape
    torch.testing.assert_close(
        noise_scale(features), features.std().expand_as(features), rtol=1e-5, atol=0
    )
    assert not noise_scale(torch.ones(1, 1)).any()  # of one element there is none
    assert not noise_scale(torch.ones(1)).any()


def test_as_published_noise_is_that_of_the_copies_and_is_differentiated(monkeypatch):
    features = torch.tensor([[0.0, 5.0], [2.0, 5.0]], requires_grad=True)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    noisy = perturb(features, 3, as_published=True)
    # Six copies at a distance of 1 from their mean; the second element is constant.
    scale = math.sqrt(6 / 5)
    expected = repeat_samples(features, 3) + torch.tensor([scale, 0.0])
    torch.testing.assert_close(noisy, expected)
    noisy.sum().backward()
    # Of 6·sqrt(0.3·(x_2 - x_1)²) added to the 3 of the copies
    slope = 6 * math.sqrt(0.3)
    torch.testing.assert_close(features.grad, torch.tensor([[3 - slope, 3.0], [3 + slope, 3.0]]))
    assert torch.equal(perturb(features[:1], 3, as_published=True), features[:1].expand(3, 2))


def test_as_published_noise_leaves_padding_alone(monkeypatch):
    text = torch.randn(3, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    scale = perturb(text, 2, mask, as_published=True) - repeat_samples(text, 2)
    assert not scale[~repeat_samples(mask, 2)].any()
    torch.testing.assert_close(scale[0, 0], repeat_samples(text, 2)[:, 0].std(0))
    torch.testing.assert_close(scale[0, 2], repeat_samples(text[:2], 2)[:, 2].std(0))
    assert not scale[:, 3].any()  # one text alone is so long


def test_padding_is_not_changed_and_enters_no_deviation():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    text = torch.randn(3, 4, 6)
    text[~mask] = 1e6
    scale = noise_scale(text, mask)
    torch.testing.assert_close(scale[0, 0], text[:, 0].std(0))
    torch.testing.assert_close(scale[1, 1], text[:2, 1].std(0))
    # Only the first text is as long as this
    torch.testing.assert_close(scale[0, 2], text[0, :3].std().expand(6))
    changed = perturb(text, 5, mask) != repeat_samples(text, 5)
    assert torch.equal(changed, repeat_samples(mask, 5).unsqueeze(2).expand_as(changed))
    padded_otherwise = text.masked_fill(~mask.unsqueeze(2), -7.0)
    assert torch.equal(noise_scale(padded_otherwise, mask), scale)


def test_mask_without_padding_changes_nothing():
    text = torch.randn(3, 4, 6)
    everywhere = torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(
        noise_scale(text, everywhere), noise_scale(text).expand_as(text), rtol=1e-5, atol=0
    )


def test_mask_of_as_many_dimensions_is_broadcast():
    image = torch.randn(2, 3, 4, 5)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, :, 2:] = False
    changed = perturb(image, 2, mask) != repeat_samples(image, 2)
    assert torch.equal(changed, repeat_samples(mask, 2).expand_as(changed))


# ---------------------------------------------------------------------- what a detector hands to it


def test_levels_of_a_pyramid_are_one_modality():
    levels = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    seen = []

    def model(x):
        seen.append(x)
        return x["image"][0].mean((2, 3)) + 2 * x["image"][1].mean((2, 3))

    regularizer = FunctionalEntropyRegularizer(
        samples=2, bound="variance", loss=lambda logits, target: logits.sum()
    )
    _, information = regularizer(model, {"image": levels}, torch.zeros(2, 3))
    assert isinstance(seen[0]["image"], tuple)
    assert [x.shape for x in seen[0]["image"]] == [(4, 3, 8, 8), (4, 3, 4, 4)]
    # Of a row 3·64 gradients of 1/64, and 3·16 of 2/16
    torch.testing.assert_close(information["image"], torch.tensor(3 / 64 + 3 * 4 / 16))


def test_modality_that_the_model_ignores_informs_of_nothing():
    model = nn.Linear(4, 3)
    modalities = {"image": torch.randn(2, 4), "text": torch.randn(2, 5)}
    term, information = FunctionalEntropyRegularizer()(
        lambda x: model(x["image"]), modalities, torch.zeros(2, 3)
    )
    term.backward()
    assert information["text"] == 0 and information["image"] > 0
    torch.testing.assert_close(term, torch.tensor(1e-10 / FLOOR))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dims", [2, 3], ids=["(B, T)", "(B, T, K)"])
@pytest.mark.parametrize("target", ["softmax", "sigmoid"])
def test_logits_that_are_not_valid_do_not_count(dims, target):
    logits = torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    x, weight = torch.randn(2, 3, 4), torch.randn(4)
    regularizer = FunctionalEntropyRegularizer(samples=2, target=target)
    found = []
    for padding in (0.0, 50.0):
        torch.manual_seed(1)
        clean = logits.masked_fill(~valid.unsqueeze(2), padding)

        def model(x, padding=padding):
            rows = repeat_samples(valid, 2).unsqueeze(2)
            return (x["image"] * weight).masked_fill(~rows, padding)

        mask = valid if dims == 2 else valid.unsqueeze(2)
        found.append(regularizer(model, {"image": x}, clean, valid=mask))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[0][1]["image"] > 0


def test_valid_logits_of_a_position_stay_together():
    shapes = []

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        shapes.append(tuple(logits.shape))
        return F.cross_entropy(logits, target)

    valid = torch.tensor([[True, True, False], [True, False, False]])
    regularizer = FunctionalEntropyRegularizer(samples=2, loss=loss)
    x = torch.randn(2, 3, 4)
    regularizer(lambda x: x["image"], {"image": x}, x, valid=valid)
    assert shapes == [(6, 4)]


def test_attention_of_the_model_is_differentiated_twice():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    text = torch.randn(2, 5, 8, requires_grad=True)

    def model(x):
        return attention(x["text"], x["text"], x["text"], need_weights=False)[0].mean(1)

    logits = model({"text": text})
    term, _ = FunctionalEntropyRegularizer()(model, {"text": text}, logits)
    term.backward()
    assert text.grad.abs().sum() > 0 and torch.isfinite(text.grad).all()


def test_half_precision_and_autocast_compute_in_float32():
    model = Bilinear()
    seen = []

    def watched(x):
        seen.extend(v.dtype for v in x.values())
        return model(x)

    modalities = {"image": torch.randn(2, 4).bfloat16(), "text": torch.randn(2, 3, 3).half()}
    with torch.autocast("cpu", torch.bfloat16):
        term, _ = FunctionalEntropyRegularizer()(watched, modalities, torch.zeros(2, 5).bfloat16())
    assert {*seen, term.dtype} == {torch.float32}


def test_information_is_measured_without_gradients_too():
    modalities = {"image": torch.randn(2, 4), "text": torch.randn(2, 3, 3)}
    model, regularizer = Bilinear(), FunctionalEntropyRegularizer()
    torch.manual_seed(1)
    with torch.no_grad():
        term, information = regularizer(model, modalities, torch.zeros(2, 5))
    assert not term.requires_grad
    torch.manual_seed(1)
    assert regularizer(model, modalities, torch.zeros(2, 5))[1] == information


def test_deep_copy_measures_the_same():
    regularizer = FunctionalEntropyRegularizer(norm=1, bound="variance")
    modalities = {"image": torch.randn(2, 4), "text": torch.randn(2, 3, 3)}
    model, terms = Bilinear(), []
    for each in (regularizer, copy.deepcopy(regularizer)):
        torch.manual_seed(1)
        terms.append(each(model, modalities, torch.zeros(2, 5))[0])
    assert torch.equal(*terms)


# -------------------------------------------------------------------------------- odd input, errors


@METHOD
@pytest.mark.parametrize("norm", [1.0, 1.5, 2.0, 8.0, math.inf])
@pytest.mark.parametrize("scores", [[0.0, 0.0], [0.0, 1.0]])
def test_term_of_scores_of_zero_is_finite(method, norm, scores):
    scores = torch.tensor(scores, requires_grad=True)
    term = functional_entropy_penalty(scores, norm, method)
    term.backward()
    assert torch.isfinite(term) and torch.isfinite(scores.grad).all()


@BOUND
def test_loss_and_gradients_of_zero_are_finite(bound, key):
    gradient, loss = torch.zeros(3, 2, requires_grad=True), torch.zeros((), requires_grad=True)
    information = functional_information(gradient, loss, bound)
    information.backward()
    assert information == 0 and not gradient.grad.any()
    assert loss.grad is None or loss.grad == 0
    assert functional_information(torch.zeros(0, 2), loss, bound) == 0


@METHOD
@pytest.mark.parametrize("as_published", [False, True])
def test_batch_of_one_is_finite(method, as_published):
    model = Bilinear()
    regularizer = FunctionalEntropyRegularizer(method=method, as_published=as_published)
    image, text = torch.randn(1, 4, requires_grad=True), torch.randn(1, 3, 3)
    term, information = regularizer(model, {"image": image, "text": text}, torch.zeros(1, 5))
    term.backward()
    assert torch.isfinite(term) and torch.isfinite(image.grad).all()
    assert all(i > 0 for i in information.values())


@pytest.mark.parametrize("batch", [0, 2])
def test_without_samples_or_valid_logits_nothing_is_measured(batch):
    image = torch.randn(batch, 4, requires_grad=True)
    valid = torch.zeros(batch, dtype=torch.bool)
    term, information = FunctionalEntropyRegularizer()(
        lambda x: x["image"], {"image": image}, torch.zeros(batch, 4), valid=valid
    )
    term.backward()
    assert term == 0 and information == {"image": 0} and not image.grad.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"samples": 2.0}, "samples must be a positive integer, got 2.0"),
        ({"bound": "poincare"}, "bound must be 'entropy' or 'variance', got 'poincare'"),
        ({"norm": 0.5}, "norm must be a number p ≥ 1, got 0.5"),
        ({"norm": "fro"}, "norm must be a number p ≥ 1, got 'fro'"),
        ({"method": "max"}, "method must be 'max_ent', .*, got 'max'"),
        ({"weight": -1.0}, "weight must be a finite number ≥ 0, got -1.0"),
        ({"loss": "bce"}, "loss must be a function of logits and targets, got 'bce'"),
        ({"target": "hard"}, "target must be 'softmax' or 'sigmoid', got 'hard'"),
        ({"as_published": 1}, "as_published must be True or False, got 1"),
    ],
)
def test_wrong_argument_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=f"^{message}$") as caught:
        FunctionalEntropyRegularizer(**arguments)
    assert caught.value.argument in arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {}}, "modalities must name at least one"),
        ({"modalities": {"image": []}}, r"modalities\['image'\] has no tensor"),
        (
            {"modalities": {"image": torch.zeros(3, 4)}},
            r"as many rows as the logits, 2, got .*3, 4",
        ),
        ({"modalities": {"image": torch.zeros(2, 4).int()}}, "floating point, got torch.int32"),
        ({"masks": {"text": torch.ones(2, 4)}}, "masks: unknown modality 'text'.*'image'"),
        ({"masks": {"image": torch.ones(2, 4)}}, "must be a tensor of bool.*got torch.float32"),
        (
            {"masks": {"image": torch.ones(2, 3) > 0}},
            r"leading dimensions .*\(2, 4\), got \(2, 3\)",
        ),
        ({"masks": {"image": [torch.ones(2, 4) > 0]}}, "must be a tensor for a tensor"),
        ({"valid": torch.ones(3) > 0}, r"valid must have the shape of the logits \(2, 4\)"),
        ({"valid": torch.ones(2)}, "valid must be a tensor of bool"),
        ({"model": lambda x: x["image"][:2]}, r"3 copies of each sample, \(6, 4\), got \(2, 4\)"),
        ({"model": lambda x: [x["image"]]}, "got <class 'list'>"),
        ({"model": lambda x: torch.zeros(6, 4)}, "loss must give a scalar that depends on"),
    ],
)
def test_input_that_does_not_fit_is_named(changes, message):
    arguments = {
        "model": lambda x: x["image"],
        "modalities": {"image": torch.randn(2, 4)},
        "logits": torch.zeros(2, 4),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        FunctionalEntropyRegularizer()(**arguments)


def test_functions_name_what_they_cannot_take():
    with pytest.raises(ValueError, match=r"equally many rows, got \[2, 3\]"):
        functional_information([torch.zeros(2, 1), torch.zeros(3, 1)], torch.ones(()))
    with pytest.raises(ValueError, match=r"scores must have shape \(M,\) with M ≥ 1, got \(2, 1\)"):
        functional_entropy_penalty(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"samples must have shape \(R, N\), got \(3,\)"):
        functional_variance(torch.zeros(3))
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        noise_scale(torch.zeros(2, 3, dtype=torch.int64))
