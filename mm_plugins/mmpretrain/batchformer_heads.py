"""BatchFormer (arXiv:2203.01522) in MMPretrain's linear classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.models.losses import AsymmetricLoss
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from mm_plugins.mmpretrain.long_tail import BalancedSoftmaxLoss
from mm_plugins.settings import build_from
from plugin_core import BatchFormer
from plugin_core.errors import ArgumentError


class TrainingBatchFormer(BatchFormer):
    """Keeps PyTorch's initial weights, as the authors do, where a model's are drawn otherwise.

    A checkpoint that is evaluated need not have it.
    """

    training_only = True

    def init_weights(self) -> None:
        """Draw the weights anew; mmengine calls it after what the model's ``init_cfg`` says."""
        self.reset_parameters()


@MODELS.register_module()
class BatchFormerClsHead(LinearClsHead):
    """``LinearClsHead`` that in training also classifies what a BatchFormer makes of the batch.

    The pooled features (B, C) of a batch are one sequence. In training the classifier gets two
    streams, (2B, C): the plain features first, then the BatchFormer's, and each label twice. So the
    classifier is shared, and the loss is the mean over both streams. Without training there is only
    the plain head. Checkpoints of either head load into the other.

    Args:
        num_classes: number of classes K.
        in_channels: number of channels C.
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
        **kwargs: of ``LinearClsHead``. ``loss`` must be one of a single label.

    Raises:
        ArgumentError: if an argument of the BatchFormer is wrong, the loss is one of several
            labels, or has counts of another number of classes.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        batchformer: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        check_single_label(self.loss_module, num_classes)
        self.batchformer = build_from(
            "batchformer", TrainingBatchFormer, batchformer or {}, embed_dims=in_channels
        )

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Compute the loss of both streams, from the features (B, C) and the labels of one."""
        if self.training:
            features = self.pre_logits(feats)
            feats = (torch.cat((features, self.batchformer(features[:, None])[:, 0])),)
            data_samples = [*data_samples, *data_samples]
        losses: dict[str, Tensor] = super().loss(feats, data_samples, **kwargs)
        return losses


def check_single_label(loss: Any, num_classes: int) -> None:
    """Raise ArgumentError if a loss is for several labels, or counts other classes."""
    if isinstance(loss, AsymmetricLoss) or getattr(loss, "mode", None) == "multi_label":
        raise ArgumentError(
            "loss",
            "must be one of a single label, such as dict(type='CrossEntropyLoss'), as the head "
            f"has one for each image, got {type(loss).__name__}, which takes several",
        )
    counts = loss.counts if isinstance(loss, BalancedSoftmaxLoss) else None
    if counts is not None and len(counts) != num_classes:
        raise ArgumentError(
            "loss.counts",
            f"must be the training images of each of the {num_classes} classes, got {len(counts)} "
            "numbers; leave it out, and ClassCountsHook counts them",
        )
