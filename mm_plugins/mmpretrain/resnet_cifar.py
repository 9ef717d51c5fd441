"""The ResNets that He et al. (CVPR 2016, arXiv:1512.03385) have for CIFAR."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.registry import MODELS
from torch import Tensor, nn

_DEPTHS = (20, 32, 44, 56, 110)


@MODELS.register_module()
class ThinResNet_CIFAR(ResNet_CIFAR):
    """ResNet of 6n + 2 layers for images of 32 pixels (section 4.2).

    It has three stages of 16, 32 and 64 channels, and shortcuts without parameters (option A).
    ``ResNet_CIFAR`` is an ImageNet ResNet with another stem, some 25 times as large.

    Args:
        depth: 20, 32, 44, 56 or 110.
        **kwargs: of ``ResNet_CIFAR``.

    Shape: (B, 3, 32, 32) → (B, 64, 8, 8).
    """

    arch_settings: ClassVar[dict] = {d: (BasicBlock, ((d - 2) // 6,) * 3) for d in _DEPTHS}

    def __init__(self, depth: int = 32, **kwargs: Any) -> None:
        stages = {"num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1)}
        sizes = {"stem_channels": 16, "base_channels": 16, "out_indices": (2,)}
        super().__init__(depth, **{**stages, **sizes, **kwargs})
        for name in self.res_layers[1:]:
            first = getattr(self, name)[0]
            first.downsample = ZeroPadShortcut(first.out_channels - first.in_channels)


class ZeroPadShortcut(nn.Module):
    """Takes every second position, and adds channels of zeros, half of them before the others.

    Args:
        channels: to add.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C + channels, H/2, W/2)."""
        before = self.channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.channels - before))
