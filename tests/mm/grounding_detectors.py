"""Small grounding and class detectors with auxiliary losses, and batches for them."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from batchformer_detectors import CONFIGS, skip_where_it_cannot_run
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from make_tiny_text_model import main as make_tiny_text_model  # noqa: E402

SYNTHETIC = ROOT / "configs" / "mm" / "synthetic"
TEXT = "the red disk, the small square left of the red disk."
# Of its phrases, where they are
SPANS = {0: [[0, 12]], 1: [[14, 51]]}


def write_text_model(folder: Path, *options: str) -> Path:
    words = folder.parent / f"{folder.name}.txt"
    words.write_text(TEXT)
    make_tiny_text_model([str(folder), "--texts", str(words), *options])
    return folder


def model_config(name: str, text_model: Path | None = None) -> ConfigDict:
    """Of a small detector, plain: the type is the detector's own."""
    skip_where_it_cannot_run(name)
    if name in ("grounding-dino", "glip"):
        model = Config.fromfile(SYNTHETIC / f"{name}_r50_synthetic.py").model
        model.type = model.type.removeprefix("Plugin")
        model.pop("heatmap")
        model.language_model.name = str(text_model)
        if name == "glip":
            model.bbox_head.lang_model_name = str(text_model)
    else:
        model = Config.fromfile(CONFIGS / CLASS_DETECTORS[name]).model
        model.backbone = ConfigDict(
            type="PluginResNet", depth=18, base_channels=8, norm_eval=False, init_cfg=None
        )
        head = model.roi_head if "roi_head" in model else model
        heads = head.bbox_head if isinstance(head.bbox_head, list) else [head.bbox_head]
        for bbox_head in heads:
            bbox_head.num_classes = 3
            if "fc_out_channels" in bbox_head:
                bbox_head.fc_out_channels = 32
        if "roi_head" in model:
            stages = model.train_cfg.rcnn
            for stage in stages if isinstance(stages, list) else [stages]:
                stage.sampler.num = 32
        if name == "deformable-detr":
            model.num_queries = 12
            model.encoder.num_layers = model.decoder.num_layers = 2
            model.backbone.out_indices = (1, 2, 3)
            model.neck.in_channels = [16, 32, 64]
        else:
            model.neck.in_channels = [8, 16, 32, 64]
            narrow_pyramid(model)
    return model


def narrow_pyramid(node: Any) -> None:
    """Give a feature pyramid, and the heads on it, 64 channels instead of 256."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, (dict, list, tuple)):
            narrow_pyramid(value)
    if isinstance(node, dict):
        node.update({key: 64 for key in PYRAMID if node.get(key) == 256})


PYRAMID = ("in_channels", "out_channels", "feat_channels")


CLASS_DETECTORS = {
    "faster-rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "cascade-rcnn": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "retinanet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "deformable-detr": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
}


def regularized(model: ConfigDict, **settings: Any) -> ConfigDict:
    model = copy.deepcopy(model)
    return ConfigDict({**model, "type": f"Plugin{model.type}", **settings})


def build(model: ConfigDict, seed: int = 0) -> Any:
    """A detector whose gates and heads are far from 0, so that everything has an influence."""
    torch.manual_seed(seed)
    detector = MODELS.build(copy.deepcopy(model))
    for name, parameter in detector.named_parameters():
        if parameter.dim() > 1 and "language_model" not in name:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 / 2)
    return without_dropout(detector)


def without_dropout(detector: nn.Module) -> nn.Module:
    for module in detector.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout",):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return detector


def samples(
    kind: str,
    boxes: tuple = ((8.0, 8, 40, 40), (30.0, 20, 60, 62)),
    count: int = 2,
    test: bool = False,
) -> list[DetDataSample]:
    """Annotated images of 64×64; ``kind`` is phrases, names or classes."""
    made = []
    for i in range(count):
        sample = DetDataSample()
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes).reshape(-1, 4),
            labels=torch.arange(len(boxes)) % 2,
        )
        sample.set_metainfo(
            {
                "img_path": f"image{i}.jpg",
                "img_shape": (64, 64),
                "ori_shape": (32, 32),
                "batch_input_shape": (64, 64),
                "pad_shape": (64, 64),
                "scale_factor": (2.0, 2.0),
            }
        )
        if kind == "phrases":
            spans = list(SPANS.values()) if test else dict(SPANS)
            sample.set_metainfo({"text": TEXT, "tokens_positive": spans})
        elif kind == "names":
            sample.set_metainfo({"text": ("red disk", "square"), "custom_entities": True})
        made.append(sample)
    return made


def kind_of(name: str) -> str:
    return {"grounding-dino": "phrases", "glip": "names"}.get(name, "classes")


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def loss(detector: Any, batch: list, count: int = 2) -> dict[str, Any]:
    torch.manual_seed(0)  # of denoising queries and samplers
    return detector.train().loss(images(count), batch)
