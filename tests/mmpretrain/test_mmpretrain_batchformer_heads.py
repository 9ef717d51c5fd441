"""BatchFormer in MMPretrain's linear head, for long-tailed recognition."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from torch import Tensor, nn

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import mm_plugins  # noqa: F401
from mm_plugins.weights import check_weights
from plugin_core.errors import ArgumentError

CHANNELS, CLASSES = 8, 5
NO_DROPOUT = {"batchformer": {"dropout": 0.0}}


def head(kind: str = "BatchFormerClsHead", **changed: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build({"type": kind, "num_classes": CLASSES, "in_channels": CHANNELS, **changed})


def batch() -> tuple[Tensor, list[DataSample], Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 3, 1, 1, 4, 2])
    features = torch.randn(len(labels), CHANNELS, generator=generator, requires_grad=True)
    return features, [DataSample().set_gt_label(k) for k in labels.tolist()], labels


def original_loss(
    model: Any, features: Tensor, labels: Tensor, prior: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """What the authors' trainer does, and its BatchFormer's parameters.

    The encoder's logits are before the plain ones, with labels twice. The loss of each half is
    added to that of both.
    """
    layer = nn.TransformerEncoderLayer(CHANNELS, 4, CHANNELS, 0.0)
    layer.load_state_dict(
        {n.removeprefix("layers.0."): p for n, p in model.batchformer.state_dict().items()}
    )
    related = layer(features.unsqueeze(1)).squeeze(1)
    logits = torch.cat([model.fc(related), model.fc(features)]) + prior
    twice, half = torch.cat([labels, labels]), len(labels)
    total = nn.functional.cross_entropy(logits[:half], twice[:half])
    total = total + nn.functional.cross_entropy(logits[half:], twice[half:])
    total = total + nn.functional.cross_entropy(logits, twice)
    return total, [parameter for _, parameter in sorted(layer.named_parameters())]


@pytest.mark.parametrize("counts", [None, [500, 200, 60, 12, 3]], ids=["plain", "balanced"])
def test_loss_and_gradients_are_the_authors(counts: list[int] | None) -> None:
    kind = {"type": "BalancedSoftmaxLoss", "counts": counts} if counts else {}
    loss = {"type": "CrossEntropyLoss", **kind, "loss_weight": 3.0}  # as in the configs
    model = head(**NO_DROPOUT, loss=loss).train()
    features, samples, labels = batch()
    prior = torch.tensor(counts).float().log() if counts else torch.zeros(CLASSES)
    found = model.loss((features,), samples)["loss"]
    expected, theirs = original_loss(model, features, labels, prior)
    torch.testing.assert_close(found, expected)
    shared = [features, model.fc.weight, model.fc.bias]
    ours = [parameter for _, parameter in sorted(model.batchformer.named_parameters())]
    torch.testing.assert_close(
        torch.autograd.grad(found, [*shared, *ours]),
        torch.autograd.grad(expected, [*shared, *theirs]),
    )


def test_a_batch_of_one_image_trains_and_is_warned_of() -> None:
    model = head(**NO_DROPOUT).train()
    features, samples, _ = batch()
    with pytest.warns(UserWarning, match="the batch is a single sample"):
        loss = model.loss((features[:1],), samples[:1])["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains_the_balanced_softmax(dtype: torch.dtype) -> None:
    loss = {"type": "BalancedSoftmaxLoss", "counts": [70000, 200, 60, 12, 0]}
    model = head(**NO_DROPOUT, loss=loss).train()
    features, samples, _ = batch()
    exact = model.loss((features[:4],), samples[:4])["loss"]
    with torch.autocast("cpu", dtype=dtype):
        found = model.loss((features[:4],), samples[:4])["loss"]
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("labels", [[0, 3], []])
def test_a_sample_of_several_labels_or_none_is_told(labels: list[int]) -> None:
    features, samples, _ = batch()
    samples[2].set_gt_label(torch.tensor(labels, dtype=torch.long))
    with pytest.raises(
        ValueError, match="each image must have one label, got " + re.escape(f"{labels}")
    ):
        head().train().loss((features,), samples)


def gradients(model: Any, features: Tensor, samples: list[DataSample]) -> dict[str, Tensor]:
    model.loss((features,), samples)["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_of_process(rank: int) -> dict[str, Tensor]:
    model = head(batchformer={"dropout": 0.0, "gather": True}).train()
    features, samples, _ = batch()
    part = slice(3 * rank, 3 * rank + 3)
    found = gradients(model, features.detach()[part], samples[part])
    for gradient in found.values():  # as DistributedDataParallel averages
        torch.distributed.all_reduce(gradient)
    return {name: gradient / 2 for name, gradient in found.items()}


def test_two_processes_that_gather_train_as_one_with_both_batches(tmp_path: Path) -> None:
    features, samples, _ = batch()
    expected = gradients(head(**NO_DROPOUT).train(), features, samples)
    for found in two_processes.run(gradients_of_process, tmp_path):
        torch.testing.assert_close(found, expected)


def test_without_training_it_is_the_plain_head_and_weights_load_both_ways() -> None:
    model, plain = head().eval(), head("LinearClsHead").eval()
    keys = plain.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    assert {name.split(".")[0] for name in keys.unexpected_keys} == {"batchformer"}
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    features, samples, _ = batch()
    assert torch.equal(model((features,)), plain((features,)))
    assert torch.equal(
        model.loss((features,), samples)["loss"], plain.loss((features,), samples)["loss"]
    )


def test_an_evaluated_checkpoint_need_not_have_the_batchformer(tmp_path: Path) -> None:
    torch.save({"state_dict": head("LinearClsHead").state_dict()}, tmp_path / "plain.pth")
    path = str(tmp_path / "plain.pth")
    assert check_weights(head(), path, "CHECKPOINT", whole=True) == []
    torch.save({"state_dict": {"fc.weight": head().fc.weight}}, path)
    with pytest.raises(ValueError, match=r"lacks weights of the model.*: fc\.bias$"):
        check_weights(head(), path, "CHECKPOINT", whole=True)


def test_soft_labels_of_mixup_are_doubled_too() -> None:
    loss = {"type": "CrossEntropyLoss", "use_soft": True}
    model = head(loss=loss, **NO_DROPOUT).train()
    features, samples, labels = batch()
    hard = head(**NO_DROPOUT).train().loss((features,), samples)["loss"]
    for sample, one_hot in zip(samples, nn.functional.one_hot(labels, CLASSES), strict=True):
        sample.set_gt_score(one_hot.float())
    torch.testing.assert_close(model.loss((features,), samples)["loss"], hard)


def test_the_batchformer_keeps_pytorchs_initial_weights() -> None:
    model = head()
    before = model.batchformer.layers[0].linear1.weight.std().item()
    model.init_weights()
    layer = model.batchformer.layers[0]
    assert model.fc.weight.std() < 0.02  # MMPretrain's own
    assert layer.linear1.weight.std().item() == pytest.approx(before, rel=0.5)
    assert not layer.self_attn.out_proj.bias.any()
    assert not layer.self_attn.in_proj_bias.any()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batchformer": {"num_heads": 3}}, "batchformer.num_heads must divide"),
        ({"batchformer": {"heads": 2}}, "batchformer"),
        ({"loss": {"type": "AsymmetricLoss"}}, "loss must be for one label in an image"),
        (
            {"loss": {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "multi_label"}},
            "loss must be for one label in an image",
        ),
        ({"loss": {"type": "CrossEntropyLoss", "use_sigmoid": True}}, "got CrossEntropyLoss with"),
        ({"loss": {"type": "FocalLoss"}}, "loss must be for one label in an image"),
        ({"loss": {"type": "BalancedSoftmaxLoss", "counts": [3, 2, 1, 1, -1]}}, "got -1 for 4"),
        ({"loss": {"type": "BalancedSoftmaxLoss", "use_sigmoid": True}}, "use_sigmoid"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        head(**changed)
