"""Plugin layers for ``ResNet(plugins=[dict(cfg=dict(type=…), position=…, stages=…)])``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import plugin_core

_BN = MappingProxyType({"type": "BN"})


@MODELS.register_module()
class TripletAttention(plugin_core.TripletAttention):
    """:class:`plugin_core.TripletAttention` as a plugin layer.

    Args:
        in_channels: what the framework passes to every plugin; triplet attention needs none.
        kernel_size: side of the gates' convolution, odd.
        no_spatial: leave the gate over (H, W) out.
        warm_start: start as the identity, for a backbone pretrained without attention.
        norm_cfg: of the gates' norms: ``type`` "BN" or "SyncBN", and ``requires_grad``, which is
            False for a scale and shift that do not train.
        norm_eval: use the running statistics in training too. The backbone's ``norm_eval`` is for
            its own, pretrained norms: fresh gates would never gather statistics. To freeze the
            gates' norms set this one: ``eval()`` on a norm alone does not last.

    Raises:
        ValueError: if ``kernel_size`` or ``norm_cfg`` is wrong.
    """

    _abbr_ = "triplet_attention"

    def __init__(
        self,
        in_channels: int | None = None,
        kernel_size: int = 7,
        no_spatial: bool = False,
        warm_start: bool = False,
        norm_cfg: Mapping[str, Any] = _BN,
        norm_eval: bool = False,
    ) -> None:
        _check_norm_cfg(norm_cfg)
        super().__init__(kernel_size, no_spatial, warm_start, norm=norm_cfg["type"])
        self.norm_eval = norm_eval
        for norm in self._norms():
            norm.requires_grad_(norm_cfg.get("requires_grad", True))

    def forward(self, x: Tensor) -> Tensor:
        # Here and not in train(): after it, a backbone with norm_eval puts all norms that are
        # below it into evaluation mode.
        training = self.training and not self.norm_eval
        for norm in self._norms():
            if norm.training != training:
                norm.training = training
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm_eval={self.norm_eval}"

    def _norms(self) -> list[_BatchNorm]:
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]


@MODELS.register_module()
class IDABlock(plugin_core.IDABlock):
    """:class:`plugin_core.IDABlock` as a plugin layer; its arguments are the same.

    No initialization of MMDetection's touches its ``gamma``: whatever a backbone does to its
    convolutions, the block is the identity at first.
    """

    _abbr_ = "ida"


def _check_norm_cfg(norm_cfg: Any) -> None:
    if not isinstance(norm_cfg, Mapping):
        raise ValueError(f"norm_cfg must be dict(type='BN') or the like, got {norm_cfg!r}")
    if norm_cfg.get("type") not in ("BN", "SyncBN"):
        raise ValueError(f"norm_cfg: type must be 'BN' or 'SyncBN', got {norm_cfg.get('type')!r}")
    if not isinstance(norm_cfg.get("requires_grad", True), bool):
        raise ValueError(
            f"norm_cfg: requires_grad must be True or False, got {norm_cfg['requires_grad']!r}"
        )
    unknown = set(norm_cfg) - {"type", "requires_grad"}
    if unknown:
        raise ValueError(
            f"norm_cfg: unknown key {', '.join(sorted(unknown))}; there are type and requires_grad"
        )
