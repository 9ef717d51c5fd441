"""MMDetection's detectors that have a DETR encoder, made small, and batches for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from torch import nn

from mm_plugins.preflight import check_decoder

CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
DETECTORS = {
    "DETR": "detr/detr_r50_8xb2-150e_coco.py",
    "Conditional DETR": "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py",
    "DAB-DETR": "dab_detr/dab-detr_r50_8xb2-50e_coco.py",
    "Deformable DETR": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "refined": "deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py",
    "two-stage": "deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py",
    "DINO": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "DDQ": "ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py",
    "Grounding DINO": "grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py",
    "MaskFormer": "maskformer/maskformer_r50_ms-16xb1-75e_coco.py",
    "Mask2Former": "mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py",
}
CLASSES = ("disk", "square", "ring")


def skip_where_it_cannot_run(name: str) -> None:
    if name.lower().replace(" ", "-") == "grounding-dino":
        try:
            check_decoder(GroundingDinoTransformerDecoder(1, {}, post_norm_cfg=None))
        except ValueError as error:
            pytest.skip(str(error))


def model_config(name: str, language_model: Path | None = None) -> ConfigDict:
    """The config of a small detector with three encoder layers and nothing to download.

    Args:
        name: a key of DETECTORS.
        language_model: a folder with a BERT, for Grounding DINO.
    """
    skip_where_it_cannot_run(name)
    model = Config.fromfile(CONFIGS / DETECTORS[name]).model
    # A ResNet-18 of a quarter of the width has a sixteenth of a ResNet-50's channels.
    model.backbone.update(depth=18, base_channels=16, init_cfg=None)
    channels = model.panoptic_head if "panoptic_head" in model else model.neck
    channels.in_channels = [channel // 16 for channel in channels.in_channels]
    if "panoptic_head" in model:
        model.data_preprocessor.pop("batch_augments", None)  # it pads to 1024 pixels
        head = model.panoptic_head
        head.num_queries = 12
        head.pixel_decoder.encoder.num_layers = 3
        head.transformer_decoder.num_layers = 3
        head.pixel_decoder.encoder.layer_cfg.ffn_cfg.feedforward_channels = 64
        head.transformer_decoder.layer_cfg.ffn_cfg.feedforward_channels = 64
        if name == "Mask2Former":
            model.train_cfg.num_points = 32
        return model
    model.num_queries = 12
    model.encoder.num_layers, model.decoder.num_layers = 3, 2
    for coder in (model.encoder, model.decoder):
        coder.layer_cfg.ffn_cfg.feedforward_channels = 64
    model.encoder.num_cp = -1  # checkpoints need fairscale
    model.bbox_head.num_classes = len(CLASSES)
    model.test_cfg.max_per_img = 5
    if name == "DDQ":
        model.dense_topk_ratio = 1.0
    if language_model is not None:
        model.language_model.name = str(language_model)
        model.language_model.max_tokens = model.bbox_head.contrastive_cfg.max_text_len = 16
    return model


def with_batchformer(model: ConfigDict, **batchformer: Any) -> ConfigDict:
    model = copy.deepcopy(model)
    return ConfigDict({**model, "type": f"Plugin{model.type}", "batchformer": batchformer})


def build(model: ConfigDict, weights_of: nn.Module | None = None) -> nn.Module:
    """A detector, with the weights of another as far as that has them."""
    torch.manual_seed(0)
    detector = MODELS.build(copy.deepcopy(model))
    for parameter in detector.parameters():  # as some start at 0
        nn.init.normal_(parameter, std=0.02)
    if weights_of is not None:
        keys = detector.load_state_dict(weights_of.state_dict(), strict=False)
        assert not keys.unexpected_keys
        assert all(".batchformer." in f".{key}" for key in keys.missing_keys)
    return detector


def without_dropout(detector: nn.Module) -> nn.Module:
    for module in detector.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return detector


def batch(detector: nn.Module, training: bool, shapes: tuple = ((64, 96), (80, 64))) -> dict:
    """Preprocessed random images of different sizes, with objects."""
    panoptic = hasattr(detector, "panoptic_head")
    packed = demo_mm_inputs(
        len(shapes),
        [[3, *shape] for shape in shapes],
        num_items=[2, 3][: len(shapes)],
        num_classes=80 if panoptic else len(CLASSES),
        with_mask=panoptic,
        with_semantic=panoptic,
    )
    for sample in packed["data_samples"]:
        sample.set_metainfo({"text": CLASSES, "custom_entities": True})
    return detector.data_preprocessor(packed, training)


def write_tiny_bert(folder: Path) -> Path:
    """A BERT of random weights whose vocabulary is the letters and the classes."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *CLASSES]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    return folder
