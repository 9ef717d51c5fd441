"""Learned-Mixin +H (arXiv:1909.03683), the loss of functional entropy's VQA-CP run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.errors import ArgumentError


class LearnedMixin(nn.Module):
    """Learned-Mixin +H (arXiv:1909.03683, section 3.2): leave out what the question's type tells.

    A classifier that knows only the type is added to the model in training, with a factor g that
    the model learns from an example. Of each answer, with p for (p, 1 - p):

        loss = cross entropy of softmax(log p_model + g · log(p_type + sigmoid(s)))
             + weight · mean entropy of softmax(g · log(p_type + sigmoid(s)))

    Args:
        channels: of what the answers are classified by.
        bias: p_type of each type's answers (types, answers), in [0, 1].
        weight: of the entropy, finite and ≥ 0.

    Raises:
        ArgumentError: if the weight is wrong.
    """

    bias: Tensor

    def __init__(self, channels: int, bias: Tensor, weight: float) -> None:
        super().__init__()
        if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
            raise ArgumentError("learned_mixin", f"must be a finite number ≥ 0, got {weight!r}")
        self.weight = weight
        self.register_buffer("bias", torch.stack([bias, 1 - bias], 2), persistent=False)
        self.factor = nn.Linear(channels, 1)
        self.smoothing = nn.Parameter(torch.tensor(-1.0))

    def forward(
        self, fused: Tensor, logits: Tensor, targets: Tensor, types: Tensor
    ) -> dict[str, Tensor]:
        """Make the losses.

        Args:
            fused: (B, channels).
            logits: (B, answers).
            targets: (B, answers) in [0, 1].
            types: (B,), rows of the bias.
        """
        factor = F.softplus(self.factor(fused))[:, :, None]
        bias = factor * (self.bias[types] + self.smoothing.sigmoid()).log()
        both = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], 2) + bias
        chosen = torch.stack([targets, 1 - targets], 2)
        alone = bias.log_softmax(2)
        return {
            "loss_answer": -(chosen * both.log_softmax(2)).sum((1, 2)).mean(),
            "loss_bias_entropy": -self.weight * (alone.exp() * alone).sum(2).mean(),
        }
