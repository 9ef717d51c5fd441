"""BatchFormer (arXiv:2203.01522) in MMPretrain's linear classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor

from mm_plugins.mmpretrain.loss_kinds import check_loss
from mm_plugins.mmpretrain.training_batchformers import TrainingBatchFormer
from mm_plugins.settings import build_from


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
        **kwargs: of ``LinearClsHead``. ``loss`` must be for one label in an image.

    Raises:
        ArgumentError: if an argument of the BatchFormer is wrong, or the loss is for several
            labels.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        batchformer: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        check_loss(self.loss_module, "one")
        self.batchformer = build_from(
            "batchformer", TrainingBatchFormer, batchformer or {}, embed_dims=in_channels
        )

    def loss(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Compute the loss of both streams, from the features (B, C) and the labels of one.

        Raises:
            ValueError: in training, if a sample has several labels, or none.
        """
        if self.training:
            for sample in data_samples:
                if "gt_score" not in sample and len(sample.gt_label) != 1:  # a score is mixup's
                    raise ValueError(
                        "BatchFormerClsHead: each image must have one label, got "
                        f"{sample.gt_label.tolist()}"
                    )
            features = self.pre_logits(feats)
            feats = (torch.cat((features, self.batchformer(features[:, None])[:, 0])),)
            data_samples = [*data_samples, *data_samples]
        losses: dict[str, Tensor] = super().loss(feats, data_samples, **kwargs)
        return losses
