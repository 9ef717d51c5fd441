"""Plugin layers for ``ResNet(plugins=[dict(cfg=dict(type=…), position=…, stages=…)])``."""

from __future__ import annotations

from mmdet.registry import MODELS

import plugin_core


@MODELS.register_module()
class TripletAttention(plugin_core.TripletAttention):
    """:class:`plugin_core.TripletAttention` as a plugin layer.

    Args:
        in_channels: what the framework passes to every plugin; triplet attention needs none.
        kernel_size: side of the gates' convolution, odd.
        no_spatial: leave the gate over (H, W) out.
        warm_start: start as the identity, for a backbone pretrained without attention.
    """

    _abbr_ = "triplet_attention"

    def __init__(
        self,
        in_channels: int | None = None,
        kernel_size: int = 7,
        no_spatial: bool = False,
        warm_start: bool = False,
    ) -> None:
        super().__init__(kernel_size=kernel_size, no_spatial=no_spatial, warm_start=warm_start)
