"""The asymmetric loss as its authors train with it."""

from __future__ import annotations

import torch
from mmpretrain.models.losses import AsymmetricLoss
from mmpretrain.models.losses.asymmetric_loss import asymmetric_loss
from mmpretrain.models.losses.utils import weight_reduce_loss
from mmpretrain.registry import MODELS
from torch import Tensor

from plugin_core.errors import ArgumentError


@MODELS.register_module()
class DetachedAsymmetricLoss(AsymmetricLoss):
    """``AsymmetricLoss`` whose focusing factors pass no gradient on (Ridnik et al., ICCV 2021).

    The authors' training does so (``disable_torch_grad_focal_loss``), and IDA's public reproduction
    with ``--dtgfl``. Values are those of ``AsymmetricLoss``. With both gammas 0 and no clip it is
    binary cross entropy, whose probabilities have the floor ``eps``.

    A head sums the loss over the classes and divides by the images. The reproduction also divides
    by the classes and multiplies by 1000, so that ``loss_weight=1000 / num_classes`` gives its
    values.

    Args:
        gamma_pos: as in ``AsymmetricLoss``, >= 0.
        gamma_neg: as there.
        clip: as there, from 0 to less than 1.
        reduction: as there.
        loss_weight: as there.
        eps: as there, more than 0 and less than 1. Logits of half precision become floats first:
            float16 has no number as small as 1e-8.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    def __init__(
        self,
        gamma_pos: float = 0.0,
        gamma_neg: float = 4.0,
        clip: float = 0.05,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        for name, gamma in (("gamma_pos", gamma_pos), ("gamma_neg", gamma_neg)):
            if type(gamma) not in (int, float) or not 0 <= gamma < float("inf"):
                raise ArgumentError(name, f"must be a finite number ≥ 0, got {gamma!r}")
        if type(clip) not in (int, float) or not 0 <= clip < 1:
            raise ArgumentError("clip", f"must be from 0 to less than 1, got {clip!r}")
        if type(eps) is not float or not 0 < eps < 1:
            raise ArgumentError("eps", f"must be above 0 and less than 1, got {eps!r}")
        super().__init__(gamma_pos, gamma_neg, clip, reduction, loss_weight, eps=eps)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: int | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of logits (N, K) and targets (N, K) of 0 and 1, with weights (N,) of the images."""
        pred = pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred
        terms = asymmetric_loss(pred, target, None, 0, 0, self.clip, "none", eps=self.eps)
        with torch.no_grad():
            wrong = pred.sigmoid() * (1 - target) + (1 - pred.sigmoid()) * target
            wrong = (wrong - self.clip * (1 - target)).clamp(min=0)
            factors = wrong.pow(self.gamma_pos * target + self.gamma_neg * (1 - target))
        if weight is not None:
            factors = factors * weight[:, None]
        reduction = reduction_override or self.reduction
        loss: Tensor = weight_reduce_loss(terms, factors, reduction, avg_factor)
        return self.loss_weight * loss
