"""Detectron2's R-CNNs with and without plugins, with comparable times.

All have the same weights, and the plugins start as the identity. So all compute the same function
and work on the same proposals and detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detector_step import IDA, PLAIN, TEXTBOOK, TRIPLET
from detectron2.config import get_cfg
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from textbook import TextbookTripletAttention
from torch import Tensor, nn

import d2_plugins

CONFIGS = {
    "Faster R-CNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "Faster R-CNN R18": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
}


def _with_plugin(name: str, *stages: str) -> list[Any]:
    plugin = {"NAME": name, "STAGES": list(stages), "WARM_START": True}
    return [
        *("MODEL.BACKBONE.NAME", "build_resnet_plugin_fpn_backbone"),
        *("MODEL.RESNETS.PLUGINS", [plugin]),
    ]


_TRIPLET = _with_plugin("triplet_attention", "res2", "res3", "res4", "res5")
PLUGINS = {
    PLAIN: [],
    TRIPLET: _TRIPLET,
    TEXTBOOK: _TRIPLET,
    IDA: _with_plugin("ida", "res4", "res5"),
}
_SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
]


def build(kind: str, plugin: str, device: torch.device, small: bool = False) -> nn.Module:
    """Build a detector.

    Args:
        kind: a key of CONFIGS.
        plugin: a key of PLUGINS.
        device: of the detector.
        small: a few channels and regions only.
    """
    cfg = get_cfg()
    d2_plugins.add_plugin_config(cfg)
    cfg.merge_from_file(get_config_file(CONFIGS[kind]))
    options = ["MODEL.DEVICE", str(device), "MODEL.WEIGHTS", ""]
    # res2 trains, also in the plain detector, as fresh attention in it has to train
    options += ["MODEL.BACKBONE.FREEZE_AT", "1"]
    if kind.endswith("R18"):
        options += ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    cfg.merge_from_list([*options, *(_SMALL if small else []), *PLUGINS[plugin]])
    last_conv = "conv2" if kind.endswith("R18") else "conv3"
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for name, norm in model.named_buffers():
            if name.endswith(f"{last_conv}.norm.weight"):
                norm.fill_(0.2)  # random residual branches would add up to huge features
        # Make one class likely, so that there are detections.
        model.roi_heads.box_predictor.cls_score.bias[0] = 3.0
    if plugin == TEXTBOOK:
        for block in [m for m in model.modules() if hasattr(m, "triplet_attention")]:
            block.triplet_attention = TextbookTripletAttention().to(device)
    return model


def build_alike(
    kind: str, plugins: Sequence[str], device: torch.device, small: bool = False
) -> dict[str, nn.Module]:
    """Build detectors with the first one's weights, by their plugin."""
    models = {plugin: build(kind, plugin, device, small) for plugin in plugins}
    first, *others = models.values()
    for other in others:
        other.load_state_dict(first.state_dict(), strict=False)
    return models


def random_batch(images: int, size: tuple[int, int], seed: int = 0) -> list[dict[str, Any]]:
    """Draw random images of one size with 8 objects each; the objects' masks are their boxes."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    batch = []
    for _ in range(images):
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)
        scale = torch.tensor([width, height])
        start = torch.rand(8, 2, generator=generator) * 0.6 * scale
        end = start + (0.03 + 0.35 * torch.rand(8, 2, generator=generator)) * scale
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([start, end], 1))
        instances.gt_classes = torch.randint(80, (8,), generator=generator)
        corners = torch.cat([start, end], 1)[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        instances.gt_masks = PolygonMasks([[polygon.double().numpy()] for polygon in corners])
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def loss(model: nn.Module, batch: list[dict[str, Any]]) -> Tensor:
    with EventStorage():  # heads write their statistics there
        return sum(model(batch).values())
