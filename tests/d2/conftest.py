"""What the tests of Detectron2's side share: configs of small models, and a tiny dataset."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import DeformConv
from torch import nn

from d2_plugins import add_plugin_config

ROOT = Path(__file__).resolve().parents[2]
ALL_STAGES = ("res2", "res3", "res4", "res5")


@pytest.fixture
def _deformable_convolution() -> None:
    if not issubclass(DeformConv, nn.Module):
        pytest.skip("this Detectron2 has no compiled operators and so no deformable convolution")


@pytest.fixture
def cfg() -> CfgNode:
    """Detectron2's defaults and the plugins', on the CPU."""
    cfg = get_cfg()
    add_plugin_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture
def resnet_cfg(cfg: CfgNode) -> CfgNode:
    """A narrow ResNet-50 with attention in every stage; nothing is frozen."""
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.FPN.IN_FEATURES = list(ALL_STAGES)
    resnets = cfg.MODEL.RESNETS
    resnets.NORM = "BN"
    resnets.OUT_FEATURES = list(ALL_STAGES)
    resnets.STEM_OUT_CHANNELS = 8
    resnets.RES2_OUT_CHANNELS = 16
    resnets.WIDTH_PER_GROUP = 4
    resnets.PLUGINS = [{"NAME": "triplet_attention", "STAGES": list(ALL_STAGES), "KERNEL_SIZE": 3}]
    return cfg


@pytest.fixture
def registered() -> Iterator[None]:
    """Forgets the datasets that a test registers."""
    before = set(DatasetCatalog.list()), set(MetadataCatalog.list())
    yield
    for catalog, names in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        for name in set(catalog.list()) - names:
            catalog.remove(name)


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An annotation file and its folder of 7 images, wide and high ones in no simple order."""
    folder = tmp_path_factory.mktemp("tiny_coco")
    sizes = [(24, 16), (16, 24), (16, 20), (28, 16), (16, 16), (20, 16), (16, 28)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (width, height) in enumerate(sizes, start=1):
        image = Image.linear_gradient("L").rotate(40 * i).resize((width, height)).convert("RGB")
        image.save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        box, corners = [2, 3, 10, 8], [2, 3, 12, 3, 12, 11, 2, 11]
        record = {"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 80, "iscrowd": 0}
        annotations.append({**record, "segmentation": [corners]})
    path = folder / "annotations.json"
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return str(path), str(folder)


@pytest.fixture(scope="module")
def packed(drawn_coco: Path) -> list[dict[str, Any]]:
    """Two images as MMDetection's pipeline gives them, resized to other shapes than they have."""
    from bridged_detectors import pack

    return pack(drawn_coco)


@pytest.fixture(scope="session")
def train_net() -> ModuleType:
    """The script tools/train_net.py, as a module."""
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
