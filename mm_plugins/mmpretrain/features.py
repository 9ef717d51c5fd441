"""What a backbone gives, found out by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from plugin_core.inspection.building import silence


def last_features(*modules: nn.Module) -> tuple[int, ...] | None:
    """Run a backbone, and what follows it, on a black image of 224 pixels.

    Returns:
        Shape of the last stage's features; None if they cannot take such an image alone.
    """
    device = next((p.device for module in modules for p in module.parameters()), None)
    features: Any = torch.zeros(1, 3, 224, 224, device=device)
    training = [module.training for module in modules]
    try:
        with torch.no_grad(), silence():
            for module in modules:
                module.eval()  # which gives None for some
                features = module(features)
    except Exception:  # the run itself tells what is wrong
        return None
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
    last = features[-1] if isinstance(features, (tuple, list)) else features
    return tuple(last.shape) if isinstance(last, torch.Tensor) else None
