"""Functional entropy of MMDetection's grounding detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import build, kind_of, loss, regularized, samples
from regularized_detectors import GROUNDING, padded, parts, reached

from plugin_core.methods.functional_entropy import expand_target, repeat_samples

pytestmark = pytest.mark.usefixtures("no_iteration_of_another_test")


@pytest.mark.parametrize("name", GROUNDING)
def test_information_is_logged_and_the_terms_gradient_reaches_image_and_text(name, config):
    detector = build(regularized(config(name), functional_entropy={"samples": 1, "weight": 1e-9}))
    losses = loss(detector, samples(kind_of(name)))
    assert losses["information_image"] > 0 and losses["information_text"] > 0
    assert losses["loss_functional_entropy"] > 0
    names = reached(losses["loss_functional_entropy"], detector)
    assert {"backbone", "neck", "language_model"} <= parts(names)
    _, logged = detector.parse_losses(losses)
    assert float(logged["information_text"]) == pytest.approx(float(losses["information_text"]))


@pytest.mark.parametrize("name", GROUNDING)
def test_as_published_targets_are_differentiated(name, config, monkeypatch):
    targets = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        targets.append(expand_target(*args, **kwargs))
        return targets[-1]

    monkeypatch.setattr("plugin_core.methods.functional_entropy.expand_target", watched)
    settings = {"samples": 1, "weight": 1e-9, "as_published": True}
    detector = build(regularized(config(name), functional_entropy=settings))
    losses = loss(detector, samples(kind_of(name)))
    assert targets[0].requires_grad
    detector.parse_losses(losses)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


class NoNoise:
    """In place of the regularizer: gives the modalities as they are."""

    samples, as_published = 2, False

    def __call__(self, run, modalities, logits, masks, valid):
        repeated = {
            name: repeat_samples(x, 2)
            if isinstance(x, Tensor)
            else tuple(repeat_samples(level, 2) for level in x)
            for name, x in modalities.items()
        }
        self.clean, self.again = repeat_samples(logits, 2), run(repeated)
        self.valid = repeat_samples(valid.expand(logits.shape), 2)
        self.masks = masks
        return logits.sum(), {}


@pytest.mark.parametrize("name", GROUNDING)
def test_without_noise_the_copies_have_the_logits_of_the_image(name, config):
    detector = build(regularized(config(name)))
    batch = padded(kind_of(name))
    if name == "grounding-dino":
        batch[1].set_metainfo(
            {"text": TEXT_WITH_PADDING, "tokens_positive": {0: [[0, 8]], 1: [[0, 8]]}}
        )
    with detector._record() as recording:
        loss(detector, batch)
    stub = NoNoise()
    detector._regularize(stub, recording())
    torch.testing.assert_close(stub.again[stub.valid], stub.clean[stub.valid], atol=1e-4, rtol=1e-4)
    assert 0 < stub.valid.sum() < stub.valid.numel(), "padding of the shorter text does not count"
    if name == "grounding-dino":
        assert not stub.masks["image"][1].all(), "nor does that of the smaller image"
    assert stub.masks["text"].any() and not stub.masks["text"].all()


TEXT_WITH_PADDING = "the disk."
