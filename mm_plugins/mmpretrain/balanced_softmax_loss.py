"""The balanced softmax (arXiv:2007.10740) as a loss of MMPretrain's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmpretrain.models.losses import CrossEntropyLoss
from mmpretrain.registry import MODELS
from torch import Tensor, tensor

from mm_plugins.mmpretrain.class_counts import NeedsClassCounts, check_counts
from plugin_core.errors import ArgumentError
from plugin_core.methods.balanced_softmax import balanced_logits


@MODELS.register_module()
class BalancedSoftmaxLoss(NeedsClassCounts, CrossEntropyLoss):
    """Cross entropy of the balanced softmax (``plugin_core.methods.balanced_softmax``).

    Args:
        counts: training images of each class; None where ``ClassCountsHook`` counts them.
        use_soft: labels are probabilities (N, K), as mixup makes them.
        **kwargs: ``reduction``, ``loss_weight`` and ``class_weight`` of ``CrossEntropyLoss``.

    Raises:
        ArgumentError: if the counts are no numbers of images, or ``use_sigmoid`` is given.
        ValueError: in training, if labels are missing their counts or are several for an image.
    """

    def __init__(
        self, counts: Sequence[int] | None = None, use_soft: bool = False, **kwargs: Any
    ) -> None:
        if kwargs.pop("use_sigmoid", False):
            raise ArgumentError(
                "use_sigmoid", "must be False, as the loss is of a softmax over the classes"
            )
        super().__init__(use_soft=use_soft, **kwargs)
        self.counts = None if counts is None else check_counts(counts)

    def forward(self, cls_score: Tensor, label: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of logits (N, K) for labels (N,), or (N, K) with ``use_soft``."""
        if self.counts is None:
            raise ValueError(f"BalancedSoftmaxLoss: counts: {self.no_counts}")
        if len(self.counts) != cls_score.shape[1]:
            raise ValueError(
                "BalancedSoftmaxLoss: counts: must be of the model's "
                f"{cls_score.shape[1]} classes, got {len(self.counts)} numbers"
            )
        if label.dim() > 1 and not (self.use_soft and (label.sum(1) - 1).abs().max() < 1e-3):
            raise ValueError(
                "BalancedSoftmaxLoss: labels must be one class for each image, or with "
                "use_soft=True probabilities that sum to 1; a multi-label head needs a loss such "
                "as AsymmetricLoss"
            )
        logits = balanced_logits(cls_score, tensor(self.counts))
        loss: Tensor = super().forward(logits, label, *args, **kwargs)
        return loss
