"""BatchFormer (arXiv:2203.01522) in MMPretrain's MoCo v2 and v3.

In a config::

    custom_imports = dict(imports=["mm_plugins"])
    model = dict(type="BatchFormerMoCoV3", batchformer=dict())

The pooled features of a batch's B views go through a BatchFormer before the projection. From there
on an encoder has two streams, 2B features: the plain ones first. As in the authors' moco-v3/, the
encoders of queries and of keys share the BatchFormer, and each stream of the queries is compared
with each stream of the keys, so that there are four losses where MoCo has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.selfsup import MoCo, MoCoV3
from mmpretrain.models.utils import batch_shuffle_ddp, batch_unshuffle_ddp
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.nn.functional import normalize

from mm_plugins.mmpretrain.training_batchformers import TrainingBatchFormer
from mm_plugins.settings import build_from
from plugin_core.errors import check_bool
from plugin_core.stand_ins import view


class _BatchFormerMixin:
    """Gives a MoCo a BatchFormer before its projections.

    Args:
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
        train_batchformer: False leaves its weights at their random start.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    backbone: Any
    neck: Any
    head: Any

    def __init__(
        self,
        *args: Any,
        batchformer: Mapping[str, Any] | None = None,
        train_batchformer: bool = True,
        **kwargs: Any,
    ) -> None:
        check_bool(train_batchformer=train_batchformer)
        super().__init__(*args, **kwargs)
        first = next(part for part in self.neck.modules() if isinstance(part, nn.Linear))
        self.batchformer = build_from(
            "batchformer", TrainingBatchFormer, batchformer or {}, embed_dims=first.in_features
        ).requires_grad_(train_batchformer)

    def _encode(self, images: Tensor, backbone: nn.Module, neck: nn.Module) -> Tensor:
        """(B, 3, H, W) → (2B, C): the plain stream's projections, and the BatchFormer's."""
        features = backbone(images)[-1]
        if features.dim() == 4:  # of a ResNet, whose neck pools maps
            features = features.mean((2, 3), keepdim=True)
        plain = features.flatten(1)
        related = self.batchformer(plain[:, None])[:, 0].view_as(features)
        projected: Tensor = neck((torch.cat([features, related]),))[0]
        return projected


@MODELS.register_module()
class BatchFormerMoCoV3(_BatchFormerMixin, MoCoV3):
    """``MoCoV3`` with a BatchFormer; its loss is the sum of eight, where MoCo v3's is of two.

    In the authors' code the BatchFormer is not trained: it is among the parameters of the keys'
    encoder, which get no gradient (``train_batchformer=False``).

    Args:
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
        train_batchformer: False leaves its weights at their random start.
        *args: of ``MoCoV3``.
        **kwargs: likewise.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    def loss(
        self, inputs: list[Tensor], data_samples: list[DataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Compute the loss of two views (B, 3, H, W) of each image."""
        queries = [self._encode(images, self.backbone, self.neck) for images in inputs[:2]]
        # One prediction of both streams, whose norms see both
        queries = [self.head.predictor([query])[0] for query in queries]
        with torch.no_grad():
            self.momentum_encoder.update_parameters(nn.Sequential(self.backbone, self.neck))
            keys = [self._encode(images, *self.momentum_encoder.module) for images in inputs[:2]]
        head = view(self.head, predictor=nn.Identity())
        losses = [
            head.loss(query, key)
            for both, others in zip(queries, reversed(keys), strict=True)
            for query in both.chunk(2)
            for key in others.chunk(2)
        ]
        return {"loss": torch.stack(losses).sum()}


@MODELS.register_module()
class BatchFormerMoCo(_BatchFormerMixin, MoCo):
    """``MoCo`` with a BatchFormer; its loss is the mean over the four pairs of streams.

    The queue gets the keys of both streams, so that twice the batch must divide its length.

    Args:
        batchformer: arguments of :class:`plugin_core.BatchFormer`, except ``embed_dims``.
        train_batchformer: False leaves its weights at their random start.
        *args: of ``MoCo``.
        **kwargs: likewise.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    def loss(
        self, inputs: list[Tensor], data_samples: list[DataSample], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Compute the loss of two views (B, 3, H, W) of each image."""
        queries = normalize(self._encode(inputs[0], self.backbone, self.neck)).chunk(2)
        with torch.no_grad():
            self.encoder_k.update_parameters(nn.Sequential(self.backbone, self.neck))
            shuffled, order = batch_shuffle_ddp(inputs[1])
            found = normalize(self._encode(shuffled, *self.encoder_k.module)).chunk(2)
            keys = [batch_unshuffle_ddp(stream, order) for stream in found]
        positive = [(query * key).sum(1, keepdim=True) for query in queries for key in keys]
        negative = [query @ self.queue.clone() for query in queries for _ in keys]
        loss = self.head.loss(torch.cat(positive), torch.cat(negative))
        self._dequeue_and_enqueue(torch.cat(keys))
        return {"loss": loss}
