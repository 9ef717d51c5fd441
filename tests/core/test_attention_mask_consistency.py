"""Attention mask consistency: numbers of the authors' code, cases by hand, and bad input."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from plugin_core import (
    AttentionMaskConsistency,
    GradientHeatmap,
    attention_mask_consistency_loss,
    gradient_heatmap,
)
from plugin_core.errors import ArgumentError
from plugin_core.methods.attention_mask_consistency import ScoredRegion, region_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "attention_mask_consistency.npz"


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}


# --- the authors' numbers -------------------------------------------------------------------- #


def test_heatmap_losses_and_gradient_are_those_of_the_authors(golden):
    activations = golden["activations"].clone().requires_grad_()
    heat = gradient_heatmap(activations, golden["gradients"], golden["token_mask"], (16, 16))
    torch.testing.assert_close(heat, golden["heatmap"], atol=1e-5, rtol=0)
    losses = attention_mask_consistency_loss(heat, golden["region_mask"])
    torch.testing.assert_close(losses[0], golden["mean_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(losses[1], golden["max_loss"], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(sum(losses), activations)
    torch.testing.assert_close(gradient, golden["grad_activations"], atol=1e-5, rtol=0)


def test_differentiated_heatmap_is_the_authors(golden):
    """A score whose gradient is the golden file's."""
    activations = golden["activations"].clone().requires_grad_()
    score = (activations * golden["gradients"]).sum((1, 2, 3, 4))
    heat = GradientHeatmap()(score, activations, golden["token_mask"], (16, 16))
    torch.testing.assert_close(heat, golden["heatmap"], atol=1e-5, rtol=0)


def test_losses_at_the_published_setting_are_those_of_the_authors():
    """Box to weighted losses, and gradients through the score's second derivatives.

    The golden numbers are what the authors' lines compute of the attention, scores and boxes below:
    16x16 positions behind a [CLS] position, 48x48 pixels, weights 0.2 and 0.8.
    """
    expected = np.load(GOLDEN.with_stem("attention_mask_consistency_published"))
    images, heads, tokens = 2, 12, 3
    factors = (1 + 0.3 * wave(heads * tokens, 1.7)).view(heads, tokens, 1).requires_grad_()
    weights = (2 * wave(heads * tokens, 2.3)).view(heads, tokens, 1).requires_grad_()
    attention = wave(images * heads * tokens * 257, 0.37).abs().view(images, heads, tokens, 257)
    attention = attention * factors
    scores = (attention * weights).sin().sum((1, 2, 3))
    boxes = ([[5.0, 9, 30, 33]], [[20.0, 2, 48, 17]])
    heatmap = GradientHeatmap()
    losses = AttentionMaskConsistency()(
        [[ScoredRegion(scores[i], torch.tensor(box))] for i, box in enumerate(boxes)],
        lambda score: heatmap(
            score,
            attention,
            token_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
            layout=lambda x: x[..., 1:].unflatten(3, (16, 16)),
        ),
        (48, 48),
    )
    gradients = torch.autograd.grad(sum(losses.values()), (factors, weights))
    for value, name in zip(
        (*losses.values(), *gradients),
        ("loss_mean", "loss_max", "grad_factors", "grad_weights"),
        strict=True,
    ):
        golden = torch.from_numpy(expected[name])
        torch.testing.assert_close(value.view_as(golden), golden, atol=1e-6, rtol=0, msg=name)


def wave(count: int, frequency: float) -> torch.Tensor:
    return (torch.arange(1, count + 1).double() * frequency).sin().float()


# --- by hand --------------------------------------------------------------------------------- #


def test_heatmap_by_hand():
    """Two channels: of the first the gradient is negative at one cell, which counts as 0."""
    activation = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[2.0, 0.0], [0.0, -8.0]]]])
    gradient = torch.tensor([[[[1.0, 1.0], [-1.0, 1.0]], [[0.0, 5.0], [5.0, 1.0]]]])
    # sums over channels: 1, 2, 0, -4; means 0.5, 1, 0, -2; relu: 0.5, 1, 0, 0
    expected = torch.tensor([[[[0.5, 1.0], [0.0, 0.0]]]])
    torch.testing.assert_close(gradient_heatmap(activation, gradient), expected)


def test_losses_by_hand():
    heat = torch.tensor([[[[0.9, 0.2], [0.4, 0.1]]]])
    mask = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    mean_loss, max_loss = attention_mask_consistency_loss(heat, mask, 0.4, 0.6)
    assert mean_loss.item() == pytest.approx(0.25 - 0.55 + 0.4)
    assert max_loss.item() == pytest.approx(0.4 - 0.9 + 0.6)
    assert attention_mask_consistency_loss(heat, mask, 0.2, 0.4) == (0, 0)


def test_means_are_over_the_whole_batch_and_maxima_over_each_sample():
    heat = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.6, 1.0]]).view(2, 1, 1, 3)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]).view(2, 1, 1, 3)
    mean_loss, max_loss = attention_mask_consistency_loss(heat, mask, 0.5, 0.5)
    assert mean_loss.item() == pytest.approx(1.0 / 3 - 1.4 / 3 + 0.5)
    assert max_loss.item() == pytest.approx((0.0 + (1.0 - 0.6 + 0.5)) / 2)  # first: -0.8 + 0.5


def test_levels_of_a_pyramid_are_averaged_at_the_first_ones_size():
    fine = torch.zeros(1, 1, 4, 4)
    fine[0, 0, 0, 0] = 1.0
    coarse = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]])
    ones = [torch.ones_like(fine), torch.ones_like(coarse)]
    heat = gradient_heatmap([fine, coarse], ones)
    up = nn.functional.interpolate(coarse, (4, 4), mode="bilinear", align_corners=False)
    expected = (fine + up) / 2
    torch.testing.assert_close(heat, expected / expected.max())


def test_a_heatmap_does_not_depend_on_the_scale_of_the_gradient():
    activation = torch.rand(2, 3, 2, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 2, 4, 4)
    heats = [
        GradientHeatmap()((activation * weight * scale).sum((1, 2, 3, 4)), activation)
        for scale in (1.0, 1e-8, 1e8)
    ]
    torch.testing.assert_close(heats[1], heats[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(heats[2], heats[0], atol=1e-5, rtol=0)


def test_a_heatmap_trains_what_the_score_is_computed_by():
    torch.manual_seed(0)
    layer, head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
    features = layer(torch.randn(2, 3, 6, 6))
    score = head(features.tanh()).amax((1, 2, 3))
    heat = GradientHeatmap()(score, features)
    sum(attention_mask_consistency_loss(heat, region(2))).backward()
    for parameter in (layer.weight, head.weight):
        assert parameter.grad is not None and parameter.grad.any()


def region(samples: int) -> torch.Tensor:
    mask = torch.zeros(samples, 1, 6, 6)
    mask[:, :, 4:, 4:] = 1.0
    return mask


def test_losses_can_be_differentiated_in_float64():
    torch.manual_seed(0)
    features = torch.rand(2, 1, 6, 6, dtype=torch.double, requires_grad=True)
    weight = torch.rand(2, 1, 6, 6, dtype=torch.double, requires_grad=True)

    def loss(features, weight):
        slope = (features * weight).cos()
        heat = gradient_heatmap(features, slope)
        return sum(attention_mask_consistency_loss(heat, region(2).double()))

    assert loss(features, weight) > 0
    assert torch.autograd.gradcheck(loss, (features, weight))


@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e-40, 1e-45])
def test_an_almost_zero_gradient_gives_finite_values(scale):
    features = torch.rand(1, 2, 6, 6, requires_grad=True)
    weight = torch.randn(1, 2, 6, 6, requires_grad=True)
    heat = GradientHeatmap()((features * weight).sum((1, 2, 3)) * scale, features)
    sum(attention_mask_consistency_loss(heat, region(1))).backward()
    assert heat.isfinite().all()
    assert features.grad.isfinite().all() and weight.grad.isfinite().all()


def test_a_zero_gradient_gives_finite_values():
    features = torch.rand(1, 2, 3, 3, requires_grad=True)
    heat = GradientHeatmap()((features * 0).sum((1, 2, 3)), features)
    assert not heat.any()
    losses = attention_mask_consistency_loss(
        heat, region_mask([torch.tensor([[0.0, 0, 1, 1]])], (3, 3), (3, 3))
    )
    assert [loss.item() for loss in losses] == pytest.approx([0.1, 0.5])
    (gradient,) = torch.autograd.grad(sum(losses), features, allow_unused=True)
    assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_region_that_is_empty_or_everything_has_no_part(value):
    torch.manual_seed(0)
    heat = torch.rand(2, 1, 4, 4, requires_grad=True)
    mask = torch.full((2, 1, 4, 4), value)
    losses = attention_mask_consistency_loss(heat, mask)
    assert [loss.item() for loss in losses] == [0, 0]
    sum(losses).backward()
    assert not heat.grad.any()
    mask[0, 0, :2] = 1 - value
    both = attention_mask_consistency_loss(heat, mask)
    first = attention_mask_consistency_loss(heat[:1], mask[:1])
    assert [loss.item() for loss in both] == [loss.item() for loss in first]


# --- regions of a batch ---------------------------------------------------------------------- #


def test_region_mask_is_the_union_of_boxes_and_cuts_off_what_is_outside():
    boxes = torch.tensor([[-4.0, -4, 8, 4], [12, 8, 40, 40]])
    mask = region_mask([boxes, boxes[:0]], input_size=(16, 20), size=(4, 5))
    expected = torch.zeros(2, 1, 4, 5)
    expected[0, 0, 0, :2] = 1
    expected[0, 0, 2:, 3:] = 1
    torch.testing.assert_close(mask, expected)


def test_a_box_without_a_cells_centre_has_the_cell_that_it_is_in():
    mask = region_mask([torch.tensor([[17.0, 9, 17.5, 9.5]])], (16, 20), (4, 5))
    assert mask.nonzero().tolist() == [[0, 0, 2, 4]]


def test_a_box_outside_of_the_input_has_no_cell():
    mask = region_mask([torch.tensor([[30.0, 0, 40, 8], [-9, 0, 0, 8]])], (16, 20), (4, 5))
    assert not mask.any()


def batch(phrases: list[int]):
    """Features of some images, and scored regions of each."""
    torch.manual_seed(0)
    features = torch.rand(len(phrases), 2, 4, 4, requires_grad=True)
    weights = torch.randn(3, 2, 4, 4)
    box = torch.tensor([[0.0, 0, 8, 8]])
    images = [
        [ScoredRegion((features[i] * weights[k]).sum().sigmoid(), box) for k in range(count)]
        for i, count in enumerate(phrases)
    ]
    return features, images


def test_a_batchs_losses_are_those_of_its_phrases_and_weighted():
    features, images = batch([2, 0, 1])
    heatmap = GradientHeatmap()
    amc = AttentionMaskConsistency(
        mean_weight=2.0, max_weight=3.0, phrases=None, resolution="activation"
    )
    losses = amc(images, lambda score: heatmap(score, features), (16, 16))
    heats = [
        heatmap(phrase.score, features)[i : i + 1]
        for i, phrase in ((0, images[0][0]), (2, images[2][0]), (0, images[0][1]))
    ]
    mask = region_mask([images[0][0].boxes], (16, 16), (4, 4)).expand(3, -1, -1, -1)
    mean_loss, max_loss = attention_mask_consistency_loss(torch.cat(heats), mask)
    assert set(losses) == {"loss_amc_mean", "loss_amc_max"}
    torch.testing.assert_close(losses["loss_amc_mean"], 2 * mean_loss)
    torch.testing.assert_close(losses["loss_amc_max"], 3 * max_loss)


def test_a_subset_of_phrases_takes_as_many_differentiations():
    features, images = batch([3, 2])
    calls = []

    def heatmaps(score):
        calls.append(score)
        return GradientHeatmap()(score, features)

    AttentionMaskConsistency(phrases=1)(images, heatmaps, (16, 16))
    assert len(calls) == 1
    AttentionMaskConsistency(phrases=None)(images, heatmaps, (16, 16))
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(("resolution", "size"), [("image", (8, 12)), ("activation", (2, 3))])
def test_losses_are_taken_at_the_resolution_of_the_image_or_of_the_activation(resolution, size):
    """Half of a box's pixels are in a cell whose centre is not in the box."""
    heat = torch.tensor([[[[0.0, 0, 0], [0, 1, 0]]]])
    region = ScoredRegion(torch.zeros(()), torch.tensor([[2.0, 4, 8, 8]]))
    amc = AttentionMaskConsistency(1.0, 1.0, resolution=resolution)
    losses = amc([[region]], lambda score: heat, (8, 12))
    if resolution == "image":
        heat = nn.functional.interpolate(heat, size, mode="bilinear")
    mask = torch.zeros(1, 1, *size)
    mask[0, 0, size[0] // 2 :, size[1] // 6 if resolution == "image" else 0 : size[1] * 2 // 3] = 1
    expected = attention_mask_consistency_loss(heat, mask)
    assert [loss.item() for loss in losses.values()] == [loss.item() for loss in expected]


@pytest.mark.parametrize(("cell", "is_resized"), [(16, True), (17, False)])
def test_heatmaps_of_small_cells_are_resized_to_the_image_by_default(cell, is_resized):
    heat = torch.rand(1, 1, 3, 2)
    input_size = (3 * 16, 2 * cell)
    region = ScoredRegion(torch.zeros(()), torch.tensor([[0.0, 0, 20, 33]]))
    losses = {
        resolution: AttentionMaskConsistency(resolution=resolution)(
            [[region]], lambda score: heat, input_size
        )
        for resolution in ("image", "activation")
    }
    assert losses["image"] != losses["activation"]
    by_default = AttentionMaskConsistency()([[region]], lambda score: heat, input_size)
    assert by_default == losses["image" if is_resized else "activation"]


def test_a_region_is_all_boxes_of_a_phrase_or_a_random_one():
    heat = torch.zeros(1, 1, 4, 4)
    heat[..., :2, :2] = 1.0
    boxes = torch.tensor([[0.0, 0, 2, 2], [2, 2, 4, 4]])
    region = ScoredRegion(torch.zeros(()), boxes)

    def mean_loss(boxes: str) -> float:
        amc = AttentionMaskConsistency(mean_weight=1.0, mean_margin=1.0, boxes=boxes)
        return amc([[region]], lambda score: heat, (4, 4))["loss_amc_mean"].item()

    torch.manual_seed(0)
    assert mean_loss("all") == pytest.approx(0.0 - 0.5 + 1)
    drawn = Counter(round(mean_loss("random"), 4) for _ in range(40))
    # The first box holds all heat; outside of the second one is 4 of 12 pixels' heat.
    assert set(drawn) == {0.0, round(4 / 12 + 1, 4)}
    assert min(drawn.values()) > 8


def test_images_without_phrases_only_have_losses_of_zero():
    losses = AttentionMaskConsistency()([[], []], lambda score: pytest.fail("no score"), (8, 8))
    assert [loss.item() for loss in losses.values()] == [0, 0]


# --- bad input ------------------------------------------------------------------------------- #


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mean_margin": -0.1}, "mean_margin must be from 0 to 1, .* got -0.1"),
        ({"max_margin": 1.5}, "max_margin must be from 0 to 1, .* got 1.5"),
        ({"mean_weight": -1}, "mean_weight must be at least 0 and finite, got -1"),
        ({"max_weight": float("nan")}, "max_weight must be at least 0 and finite, got nan"),
        ({"every": 0}, "every must be a positive integer, got 0"),
        ({"phrases": 0}, "phrases must be at least 1, or None for all, got 0"),
        ({"boxes": "one"}, "boxes must be 'all' or 'random', got 'one'"),
        ({"resolution": 16}, "resolution must be 'auto', 'image' or 'activation', got 16"),
    ],
)
def test_bad_settings_are_named(arguments, text):
    with pytest.raises(ArgumentError, match=f"^{text}$") as caught:
        AttentionMaskConsistency(**arguments)
    assert caught.value.argument in arguments


def test_bad_shapes_are_named(golden):
    activations, gradients = golden["activations"], golden["gradients"]
    with pytest.raises(ValueError, match="gradients must have the shapes of activations"):
        gradient_heatmap(activations, gradients[:1])
    with pytest.raises(ValueError, match=r"activations must be \(B, heads, tokens, H, W\)"):
        gradient_heatmap(activations[0, 0], gradients[0, 0])
    with pytest.raises(ValueError, match=r"token_mask must be \(B, tokens\)"):
        gradient_heatmap(activations, gradients, golden["token_mask"][:, :2])
    heat, mask = golden["heatmap"], golden["region_mask"]
    with pytest.raises(ValueError, match="heatmap and region_mask must both be"):
        attention_mask_consistency_loss(heat, mask[..., :8])
    with pytest.raises(ValueError, match="1 inside of the region and 0 outside"):
        attention_mask_consistency_loss(heat, mask * 0.5)
    with pytest.raises(ValueError, match="mean_margin"):
        attention_mask_consistency_loss(heat, mask, mean_margin=2)


def test_a_score_that_has_no_graph_to_the_activation_is_refused():
    activation = torch.rand(1, 2, 3, 3, requires_grad=True)
    with pytest.raises(ValueError, match="score does not depend on the activations"):
        GradientHeatmap()(torch.rand(1, requires_grad=True), activation)
    with pytest.raises(ValueError, match="parts of one graph"):
        GradientHeatmap()(activation.detach().sum(), activation)
