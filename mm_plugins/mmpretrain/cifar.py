"""CIFAR as long-tailed recognition uses it: a long tail, and AutoAugment."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmpretrain.datasets import CIFAR100
from mmpretrain.registry import DATASETS, TRANSFORMS
from PIL import Image
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from plugin_core.errors import ArgumentError


@DATASETS.register_module()
class CIFAR100LT(CIFAR100):
    """CIFAR-100 with a long tail in its training set: CIFAR-100-LT (Cao et al., NeurIPS 2019).

    Class k of K keeps n·r^(-k/(K-1)) images, rounded down, of its n = 500. The test set stays
    whole.

    Args:
        imbalance_factor: r, the first class's images over the last's; 100, 50 and 10 are usual.
        seed: of the choice of images; 0 gives those of LDAM's code, which the field uses.
        *args: of ``CIFAR100``.
        **kwargs: likewise.

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
