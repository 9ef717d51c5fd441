"""Attention mask consistency of DINOs: no derivative passes their denoising queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

import batchformer_detectors
from grounding_detectors import build, kind_of, loss, regularized, samples

from mm_plugins import attention_mask_consistency
from mm_plugins.denoising import decode_apart
from plugin_core.inspection.recorder import record_calls

AMC = {"attention_mask_consistency": {"max_margin": 1.0, "mean_margin": 1.0, "phrases": None}}
DINOS = pytest.mark.parametrize("name", ["grounding-dino", "DINO"])


def detector_of(name: str, config: Any) -> Any:
    model = batchformer_detectors.model_config(name) if name == "DINO" else config(name)
    return build(regularized(model, **AMC))


def total(losses: dict[str, Any]) -> Tensor:
    values = [value for name, value in losses.items() if "loss" in name]
    return sum(v.sum() if isinstance(v, Tensor) else sum(v).sum() for v in values)


@DINOS
def test_decoded_apart_they_change_no_loss_and_no_gradient(name, config, monkeypatch):
    detector = detector_of(name, config)
    named = [(n, p) for n, p in detector.named_parameters() if p.requires_grad]
    found = []
    for _ in ("apart", "together"):
        losses = loss(detector, samples(kind_of(name)))
        parameters = [p for _, p in named]
        gradients = torch.autograd.grad(total(losses), parameters, allow_unused=True)
        found.append((losses, gradients))
        monkeypatch.setattr(
            attention_mask_consistency, "has_denoising_queries", lambda detector: False
        )
    (losses, gradients), (expected, all_gradients) = found
    assert losses["loss_amc_mean"] > 0 and losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-4, atol=1e-5, msg=key)
    for (parameter, _), mine, other in zip(named, gradients, all_gradients, strict=True):
        assert (mine is None) == (other is None), parameter
        if other is not None:
            assert (mine - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6, parameter


@DINOS
def test_no_denoising_query_is_in_the_graph_of_the_scores(name, config, monkeypatch):
    detector = detector_of(name, config)
    hidden: list[Tensor] = []

    def decode(*args: Any) -> Any:
        outputs, states = decode_apart(*args)
        hidden.append(states)
        return outputs, states

    monkeypatch.setattr(attention_mask_consistency, "decode_apart", decode)
    layers = detector.decoder.layers
    with record_calls([layer.ffn for layer in layers]) as calls:
        loss(detector, samples(kind_of(name)))
    of_matching, of_denoising = calls[: len(layers)], calls[len(layers) :]
    assert all(call.output.shape[1] == detector.num_queries for call in of_matching)
    assert len(of_denoising) == len(layers)
    outputs = [call.output for call in (*of_matching, *of_denoising)]
    slopes = torch.autograd.grad(hidden[0].square().sum(), outputs, allow_unused=True)
    assert all(slope.any() for slope in slopes[: len(layers)])
    assert all(slope is None for slope in slopes[len(layers) :])
