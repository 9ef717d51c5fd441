"""A linear classifier behind a dropout."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.heads import LinearClsHead
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from plugin_core.errors import ArgumentError


@MODELS.register_module()
class DropoutLinearClsHead(LinearClsHead):
    """``LinearClsHead`` with a dropout before it, as triplet attention's authors train MobileNetV2.

    Args:
        dropout: rate in [0, 1).
        **arguments: of ``LinearClsHead``.

    Raises:
        ArgumentError: if the rate is none.
    """

    def __init__(self, dropout: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        if not 0 <= dropout < 1:
            raise ArgumentError("dropout", f"must be in [0, 1), got {dropout!r}")
        self.dropout = nn.Dropout(dropout)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        dropped: Tensor = self.dropout(super().pre_logits(feats))
        return dropped
