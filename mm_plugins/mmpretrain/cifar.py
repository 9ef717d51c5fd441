"""CIFAR as long-tailed recognition uses it: a long tail, AutoAugment, and He et al.'s ResNets."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmpretrain.datasets import CIFAR100
from mmpretrain.models.backbones import ResNet_CIFAR
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from plugin_core.errors import ArgumentError

_DEPTHS = (20, 32, 44, 56, 110)


@DATASETS.register_module()
class CIFAR100LT(CIFAR100):
    """CIFAR-100 with a long tail in its training set: CIFAR-100-LT (Cao et al., NeurIPS 2019).

    Class k of K keeps n·r^(-k/(K-1)) images, rounded down, of its n = 500. The test set stays
    whole.

    Args:
        imbalance_factor: r, the first class's images over the last's; 100, 50 and 10 are usual.
        seed: of the choice of images; 0 gives those of LDAM's code, which the field uses.
        *args, **kwargs: of ``CIFAR100``.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    def __init__(
        self, *args: Any, imbalance_factor: float = 100, seed: int = 0, **kwargs: Any
    ) -> None:
        if type(imbalance_factor) not in (int, float) or not 1 <= imbalance_factor < float("inf"):
            raise ArgumentError("imbalance_factor", f"must be at least 1, got {imbalance_factor!r}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ArgumentError("seed", f"must be an integer of at least 0, got {seed!r}")
        self.imbalance_factor = imbalance_factor
        self.seed = seed
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        images: list[dict[str, Any]] = super().load_data_list()
        if self.split != "train":
            return images
        labels = np.array([image["gt_label"] for image in images])
        classes = np.unique(labels)
        rng = np.random.RandomState(self.seed)  # whose order is LDAM's
        kept: list[dict[str, Any]] = []
        for rank, label in enumerate(classes):
            share = (1 / self.imbalance_factor) ** (rank / max(len(classes) - 1, 1))
            places = np.flatnonzero(labels == label)
            rng.shuffle(places)
            kept += [images[i] for i in places[: int(len(images) / len(classes) * share)]]
        return kept


@TRANSFORMS.register_module()
class CIFARAutoAugment(BaseTransform):
    """AutoAugment with the policy found on CIFAR-10 (Cubuk et al., CVPR 2019), as torchvision's.

    MMPretrain's ``AutoAugment`` has the policy of ImageNet. The image must be RGB, as CIFAR's are.
    """

    def __init__(self) -> None:
        self.augment = AutoAugment(AutoAugmentPolicy.CIFAR10)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return {**results, "img": np.asarray(self.augment(Image.fromarray(results["img"])))}


@MODELS.register_module()
class ThinResNet_CIFAR(ResNet_CIFAR):
    """ResNet of 6n + 2 layers for images of 32 pixels (CVPR 2016, section 4.2).

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
