"""MMDetection's Grounding DINO with and without auxiliary losses, with comparable times.

All have the same weights and, with the same seed, the same losses of their own.
"""

from __future__ import annotations

import copy
import functools
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdet_detectors
import timing
import torch
from mmcv.ops import get_compiling_cuda_version
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mm_plugins  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))

from make_tiny_text_model import ArgumentError, make_text_model

CONFIG = "mmdet::grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py"
PHRASES = ("a red bus", "two people", "the tall tree", "a small dog")
CAPTION = f"{', '.join(PHRASES)}."
# Label → places in the caption of its phrase's first character and of the one after its last
SPANS = {
    label: [[CAPTION.index(phrase), CAPTION.index(phrase) + len(phrase)]]
    for label, phrase in enumerate(PHRASES)
}
_SMALL = {
    "num_queries": 10,
    "encoder.num_layers": 1,
    "decoder.num_layers": 1,
    "encoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
    "decoder.layer_cfg.ffn_cfg.feedforward_channels": 64,
    "backbone.depth": 18,
    "backbone.base_channels": 8,
    "neck.in_channels": [16, 32, 64],
    "dn_cfg.group_cfg.num_dn_queries": 4,
}


@functools.cache
def _config() -> ConfigDict:
    return get_config(CONFIG).model


def build(
    losses: Mapping[str, Any], queries: int, text_model: Path, small: bool = False
) -> nn.Module:
    """Build a detector on the CPU.

    Args:
        losses: arguments of PluginGroundingDINO; none for the plain detector.
        queries: of its decoder.
        text_model: folder of a BERT.
        small: few layers, channels and queries.
    """
    init_default_scope("mmdet")
    model = copy.deepcopy(_config())
    options = {
        "backbone.init_cfg": None,
        "encoder.num_cp": 0,  # activation checkpoints have no second derivative
        "language_model.name": str(text_model),
        "num_queries": queries,
        **(_SMALL if small else {}),
    }
    for name, value in options.items():
        *path, key = name.split(".")
        node = model
        for part in path:
            node = node[part]
        node[key] = value
    if losses:
        model = ConfigDict({**model, "type": "PluginGroundingDINO", **losses})
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of an unused pooler
    torch.manual_seed(0)
    detector = MODELS.build(model)
    for name, norm in detector.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(norm, 0.2)  # random residual branches would add up to huge features
    nn.init.normal_(detector.level_embed)  # otherwise whatever the memory held
    return detector


def build_alike(
    losses: Mapping[str, Mapping[str, Any]],
    queries: int,
    device: torch.device,
    small: bool = False,
) -> dict[str, nn.Module]:
    """Build detectors with the first one's weights, by the names of their losses."""
    if device.type == "cuda" and get_compiling_cuda_version() == "not available":
        raise timing.Impossible("mmcv was built without its CUDA operators")
    with tempfile.TemporaryDirectory() as folder:
        caption, text_model = Path(folder) / "caption.txt", Path(folder) / "text_model"
        caption.write_text(CAPTION)
        try:
            make_text_model(text_model, [caption])
        except ArgumentError as error:  # transformers is not installed
            raise timing.Impossible(str(error)) from None
        models = {name: build(given, queries, text_model, small) for name, given in losses.items()}
    first, *others = models.values()
    for other in others:
        other.load_state_dict(first.state_dict())
    return {name: model.to(device) for name, model in models.items()}


def random_batch(images: int, size: tuple[int, int]) -> dict[str, Any]:
    """Draw random images with 8 objects each, two for each phrase of the caption."""
    batch = mmdet_detectors.random_batch(images, size)
    for sample in batch["data_samples"]:
        sample.set_metainfo({"text": CAPTION, "tokens_positive": SPANS})
        sample.gt_instances.labels = torch.arange(len(sample.gt_instances)) % len(PHRASES)
    return batch


def losses(detector: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Compute the losses of this step by their names."""
    MessageHub.get_current_instance().update_info("iter", step)
    found = detector(**detector.data_preprocessor(batch, True), mode="loss")
    _, log = detector.parse_losses(found)
    return {name: value for name, value in log.items() if "loss" in name and name != "loss"}
