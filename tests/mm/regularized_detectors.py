"""Settings of auxiliary losses, batches for them, and the parameters that a loss reaches."""

from __future__ import annotations

from typing import Any

import torch
from grounding_detectors import samples
from torch import Tensor, nn

GROUNDING = ("grounding-dino", "glip")
AMC = {"attention_mask_consistency": {"max_margin": 1.0, "mean_margin": 1.0}}
ENTROPY = {"functional_entropy": {"samples": 2, "weight": 1e-6}}


def total(losses: dict[str, Any]) -> Tensor:
    values = [v if isinstance(v, Tensor) else sum(v) for k, v in losses.items() if "loss" in k]
    return sum(value.sum() for value in values)


def reached(value: Tensor, detector: nn.Module) -> set[str]:
    """Names of the parameters that a loss has a gradient for."""
    named = [(n, p) for n, p in detector.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True, retain_graph=True)
    assert all(g is None or g.isfinite().all() for g in found)
    return {n for (n, _), g in zip(named, found, strict=True) if g is not None and g.any()}


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def padded(kind: str) -> list:
    """The second image is smaller than the batch, and its text shorter."""
    batch = samples(kind, boxes=((8.0, 8, 40, 40), (10.0, 20, 40, 44)))
    batch[1].set_metainfo({"img_shape": (48, 44), "ori_shape": (24, 22)})
    return batch
