"""What the tests of MMPretrain's side share: its scope, and a small folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmengine.registry import DefaultScope
from mmpretrain.utils import register_all_modules

import mm_plugins  # noqa: F401  # registers the plugins

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def _mmpretrain_scope() -> Iterator[None]:
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """``train`` and ``val`` with a folder of two images for each class."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"
