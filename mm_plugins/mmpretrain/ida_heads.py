"""IDA as a multi-label classifier of images."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.heads import MultiLabelClsHead
from mmpretrain.registry import MODELS
from torch import Tensor

from mm_plugins.mmpretrain.loss_kinds import check_loss
from plugin_core.errors import ArgumentError
from plugin_core.methods.ida import IDAClassifier


@MODELS.register_module()
class IDAClsHead(MultiLabelClsHead):
    """Multi-label head that classifies the backbone's last map by IDA.

    It takes the map, so the model has no neck. The classifier keeps its own initial weights.

    Args:
        num_classes: K.
        in_channels: C of the map.
        num_heads: as :class:`plugin_core.IDAClassifier` takes it; it divides C.
        beta: as there.
        heavy: as there.
        sample_order: as there; "interleaved" for checkpoints of the public reproduction.
        last_head_norm: as there; True for checkpoints of the reproduction's first version.
        **kwargs: of ``MultiLabelClsHead``: ``loss``, ``thr``, ``topk`` and ``init_cfg``.

    Shape: ((B, C, H, W),) → (B, K).

    Raises:
        ArgumentError: if an argument of the classifier is out of its range, ``topk`` is not from 1
            to K or ``thr`` not from 0 to 1, or the loss is for images of one label.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_heads: int = 4,
        beta: float = 1 / 32,
        heavy: bool = False,
        sample_order: str = "heads",
        last_head_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss(self.loss_module, "several")
        self.classifier = IDAClassifier(
            in_channels, num_classes, num_heads, beta, heavy, sample_order, last_head_norm
        )
        if self.topk is not None and not (type(self.topk) is int and 0 < self.topk <= num_classes):
            raise ArgumentError(
                "topk", f"must be from 1 to num_classes={num_classes}, got {self.topk!r}"
            )
        if self.thr is not None and not (type(self.thr) in (int, float) and 0 <= self.thr <= 1):
            raise ArgumentError("thr", f"must be from 0 to 1, got {self.thr!r}")
        self.num_classes = num_classes

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Logits (B, K) for the maps of the backbone's stages, of which the last one counts."""
        logits: Tensor = self.classifier(self.pre_logits(feats))
        return logits
