"""IDA's multi-label head in MMPretrain, and the loss of its public reproduction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from plugin_core import IDAClassifier
from plugin_core.errors import ArgumentError


def head(**arguments: Any) -> nn.Module:
    return MODELS.build({"type": "IDAClsHead", "num_classes": 5, "in_channels": 16, **arguments})


def samples(*labels: list[int]) -> list[DataSample]:
    return [DataSample().set_gt_label(of_image) for of_image in labels]


def test_logits_are_the_classifiers_of_the_last_map():
    module = head(num_heads=2, heavy=True, beta=0.5, sample_order="interleaved")
    classifier = IDAClassifier(16, 5, 2, 0.5, True, "interleaved")
    classifier.load_state_dict(module.classifier.state_dict())
    x = torch.randn(2, 16, 3, 4)
    torch.testing.assert_close(module((torch.randn(2, 8, 6, 8), x)), classifier(x))
    assert head(last_head_norm=True).classifier.last_head_norm


def test_loss_is_binary_cross_entropy_summed_over_classes_and_trains_every_parameter():
    module = head(heavy=True)
    x = torch.randn(3, 16, 3, 3)
    loss = module.loss((x,), samples([0, 3], [], [4]))["loss"]
    truth = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    p = module((x,)).sigmoid()
    expected = -(truth * p.log() + (1 - truth) * (1 - p).log()).sum() / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in _weights(module))


def _weights(module: nn.Module) -> list[nn.Parameter]:
    # Attention does not see a bias of its keys.
    return [p for name, p in module.named_parameters() if not name.endswith("k_proj.bias")]


@pytest.mark.parametrize(("arguments", "labels"), [({"thr": 0.5}, [1, 2]), ({"topk": 1}, [2])])
def test_prediction_has_sigmoid_scores_and_the_labels_above_the_threshold_or_the_first(
    arguments, labels
):
    module = head(num_classes=3, **arguments)
    module.classifier.forward = lambda x: torch.tensor([[-1.0, 0.5, 2.0]])
    (found,) = module.predict((torch.zeros(1, 16, 2, 2),))
    torch.testing.assert_close(found.pred_score, torch.tensor([-1.0, 0.5, 2.0]).sigmoid())
    assert found.pred_label.tolist() == labels


def test_initial_weights_are_the_classifiers_own():
    torch.manual_seed(3)
    module = head()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.init_weights()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "given"),
    [
        ({"type": "CrossEntropyLoss"}, "CrossEntropyLoss with use_sigmoid=False"),
        ({"type": "AsymmetricLoss", "use_sigmoid": False}, "AsymmetricLoss with use_sigmoid=False"),
        ({"type": "SeesawLoss", "num_classes": 5}, "SeesawLoss with use_sigmoid=False"),
        (
            {"type": "LabelSmoothLoss", "label_smooth_val": 0.1},
            "LabelSmoothLoss with use_sigmoid=False and mode='original'",
        ),
        (
            {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "use_sigmoid": True},
            "LabelSmoothLoss with use_sigmoid=True and mode='original'",
        ),
    ],
)
def test_loss_for_one_label_is_refused(loss, given):
    with pytest.raises(ArgumentError) as error:
        head(loss=loss)
    assert error.value.argument == "loss"
    assert error.value.reason == (
        "must be for several labels in an image, such as dict(type='CrossEntropyLoss', "
        f"use_sigmoid=True) or dict(type='AsymmetricLoss'), got {given}"
    )


@pytest.mark.parametrize(
    "loss",
    [
        {"type": "FocalLoss"},
        {"type": "DetachedAsymmetricLoss"},
        {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "multi_label"},
    ],
    ids=lambda loss: loss["type"],
)
def test_loss_for_several_labels_is_taken(loss):
    found = head(loss=loss).loss((torch.randn(2, 16, 2, 2),), samples([1, 2], [0]))
    assert torch.isfinite(found["loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide the 16 channels, got 3"),
        ({"beta": 0}, "beta must be positive, got 0"),
        ({"topk": 6}, "topk must be from 1 to num_classes=5, got 6"),
        ({"topk": (1,)}, r"topk must be from 1 to num_classes=5, got \(1,\)"),
        ({"thr": 5}, "thr must be from 0 to 1, got 5"),
        ({"thr": "a"}, "thr must be from 0 to 1, got 'a'"),
        ({"sample_order": "paper"}, "sample_order must be 'heads' or 'interleaved', got 'paper'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_argument_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        head(**arguments)


# ------------------------------------------------------------------------- the reproduction's loss


def reproductions_loss(
    x: Tensor, y: Tensor, gamma_pos: float, gamma_neg: float, clip: float, detached: bool
) -> Tensor:
    """The loss that its file aslloss.py computes, written anew: over each entry, in a loop."""
    total = x.new_zeros(())
    for logits, labels in zip(x, y, strict=True):
        for logit, label in zip(logits, labels, strict=True):
            p = torch.sigmoid(logit)
            right = p if label else torch.clamp(1 - p + clip, max=1)
            gamma = gamma_pos if label else gamma_neg
            factor = (1 - right) ** gamma
            factor = factor.detach() if detached else factor
            total = total - torch.log(torch.clamp(right, min=1e-5)) * factor
    return total / len(x) / x.shape[1] * 1000


GAMMAS = pytest.mark.parametrize(
    ("gamma_pos", "gamma_neg", "clip"), [(0, 0, 0), (0, 2, 0), (1, 4, 0.05), (0, 4, 0.2)]
)


@GAMMAS
@pytest.mark.parametrize("kind", ["AsymmetricLoss", "DetachedAsymmetricLoss"])
def test_loss_and_gradients_equal_the_reproductions(kind, gamma_pos, gamma_neg, clip):
    # With --dtgfl, as in its command, the factors pass no gradient on.
    x = (4 * torch.randn(3, 8, dtype=torch.float64)).requires_grad_()
    with torch.no_grad():
        x[0, 0], x[0, 1] = 15.0, -15.0  # below eps
    y = (torch.rand(3, 8) < 0.4).double()
    y[0, :2] = torch.tensor([0.0, 1.0])
    arguments = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "clip": clip, "eps": 1e-5}
    ours = MODELS.build({"type": kind, **arguments, "loss_weight": 1000 / 8})
    detached = kind == "DetachedAsymmetricLoss"
    expected = reproductions_loss(x, y, gamma_pos, gamma_neg, clip, detached)
    found = ours(x, y, avg_factor=3)  # as heads call it
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_detached_loss_of_logits_of_half_precision_is_that_of_floats(dtype):
    x = torch.tensor([[20.0, -20.0, 3.0]]).requires_grad_()
    y = torch.tensor([[0.0, 1.0, 1.0]])  # the first two are as wrong as can be
    loss = MODELS.build({"type": "DetachedAsymmetricLoss"})
    found = loss(x.to(dtype), y, avg_factor=1)
    torch.testing.assert_close(found, loss(x, y, avg_factor=1))
    (gradient,) = torch.autograd.grad(found, x)
    assert gradient.isfinite().all()


def test_detached_loss_weighs_images():
    x, y = torch.randn(2, 4), (torch.rand(2, 4) < 0.5).float()
    loss = MODELS.build({"type": "DetachedAsymmetricLoss"})
    of_second = loss(x, y, weight=torch.tensor([0.0, 2.0]), avg_factor=1)
    torch.testing.assert_close(of_second, 2 * loss(x[1:], y[1:], avg_factor=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma_neg": -1}, "gamma_neg must be a finite number ≥ 0, got -1"),
        ({"gamma_pos": "2"}, "gamma_pos must be a finite number ≥ 0, got '2'"),
        ({"clip": 1.5}, "clip must be from 0 to less than 1, got 1.5"),
        ({"clip": None}, "clip must be from 0 to less than 1, got None"),
        ({"eps": -1}, "eps must be above 0 and less than 1, got -1"),
    ],
)
def test_bad_argument_of_the_loss_is_named(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        MODELS.build({"type": "DetachedAsymmetricLoss", **arguments})
