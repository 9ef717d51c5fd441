"""MMDetection's Deformable DETR with and without BatchFormerV2."""

from __future__ import annotations

import timing
import torch
from detector_step import BATCHFORMER, PLAIN, STREAMS
from mmcv.ops import get_compiling_cuda_version
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mm_plugins  # noqa: F401

CONFIG = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"


class _Identity(nn.Module):
    """Replaces a BatchFormer and does nothing."""

    gather = False

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def build(kind: str, device: torch.device, small: bool = False) -> nn.Module:
    """Build a detector.

    Args:
        kind: PLAIN; BATCHFORMER; or STREAMS, which doubles the batch after the first encoder layer
            as BatchFormerV2 does, but lets no images see one another.
        device: of the detector.
        small: few channels, layers and queries.
    """
    init_default_scope("mmdet")
    model = get_config(CONFIG).model
    model.backbone.init_cfg = None
    if small:
        model.encoder.num_layers = model.decoder.num_layers = 2
        model.num_queries = 10
        model.backbone.update(base_channels=8, stem_channels=8)
        model.neck.in_channels = [channels // 8 for channels in model.neck.in_channels]
        for coder in (model.encoder, model.decoder):
            coder.layer_cfg.ffn_cfg.feedforward_channels = 64
    if kind != PLAIN:
        model = ConfigDict({**model, "type": f"Plugin{model.type}", "batchformer": {}})
    torch.manual_seed(0)
    detector = MODELS.build(model)
    for name, norm in detector.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(norm, 0.2)  # random residual branches would add up to huge features
    nn.init.normal_(detector.level_embed)  # otherwise whatever the memory held
    if kind == STREAMS:
        streams = detector.encoder.batchformer
        for index in streams:
            streams[index] = _Identity()
    return detector.to(device)


def build_alike(device: torch.device, small: bool = False) -> dict[str, nn.Module]:
    """Build the three detectors with the plain one's weights."""
    if device.type == "cuda" and get_compiling_cuda_version() == "not available":
        raise timing.Impossible("mmcv was built without its CUDA operators")
    models = {kind: build(kind, device, small) for kind in (PLAIN, STREAMS, BATCHFORMER)}
    first, *others = models.values()
    for other in others:
        other.load_state_dict(first.state_dict(), strict=False)
    return models


def random_batch(images: int, size: tuple[int, int]) -> dict:
    """Draw random images with 8 objects each, before the detector's preprocessing."""
    return demo_mm_inputs(images, (3, *size), num_items=[8] * images, num_classes=80)


def loss(detector: nn.Module, batch: dict) -> Tensor:
    losses = detector(**detector.data_preprocessor(batch, True), mode="loss")
    return detector.parse_losses(losses)[0]
