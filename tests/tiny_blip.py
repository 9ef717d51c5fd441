"""A tiny BLIP of MMPretrain, its text model, and phrases of drawn scenes in RefCOCO's files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from make_tiny_text_model import make_text_model
from transformers import AutoTokenizer

SIZE, PATCH, WIDTH = 32, 8, 16


def make_bert(folder: Path, words: str) -> int:
    """Write a tiny BERT with BLIP's tokens for boxes; returns the number of tokens BLIP counts."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    texts = folder.with_suffix(".txt")
    texts.write_text(words)
    make_text_model(folder, [texts], hidden_size=WIDTH)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"[unused{i}]" for i in range(339, 981)])
    tokenizer.save_pretrained(folder)
    return len(tokenizer) + 2  # BLIP's own [DEC] and [ENC]


def grounding(bert: Path, tokens: int, **settings: Any) -> dict[str, Any]:
    """Give the parts of a BlipGrounding's config that are small here."""
    encoder = {"type": "XBertEncoder", "med_config": med_config(tokens)}
    decoder = {"type": "XBertLMHeadDecoder", "med_config": med_config(tokens)}
    return dict(
        visual_encoder=vision(),
        text_encoder=encoder,
        multimodal_encoder=encoder,
        tokenizer={"type": "BlipTokenizer", "name_or_path": str(bert)},
        head={"type": "GroundingHead", "decoder": decoder},
        heatmap_layer=1,
        **settings,
    )


def retrieval(bert: Path, tokens: int, **settings: Any) -> dict[str, Any]:
    """Give the parts of a BlipRetrieval's config that are small here."""
    neck = {"type": "Linear", "in_features": WIDTH, "out_features": 8}
    return dict(
        tokenizer={"type": "BlipTokenizer", "name_or_path": str(bert)},
        vision_backbone=vision(),
        text_backbone={"type": "XBertEncoder", "med_config": med_config(tokens)},
        vision_neck=neck,
        text_neck=neck,
        head={"type": "ITCHead", "embed_dim": 8, "queue_size": 4},
        multimodal_head={"type": "ITMHead", "hidden_size": WIDTH, "with_pooler": False},
        max_txt_len=8,
        heatmap_layer=1,
        **settings,
    )


def vision() -> dict[str, Any]:
    arch = {"embed_dims": WIDTH, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
    return {
        "type": "VisionTransformer",
        "arch": arch,
        "img_size": SIZE,
        "patch_size": PATCH,
        "out_type": "raw",
    }


def med_config(tokens: int) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": WIDTH,
        "initializer_range": 0.3,
        "intermediate_size": 32,
        "max_position_embeddings": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "vocab_size": tokens,
        "encoder_width": WIDTH,
        "add_cross_attention": True,
    }


def write_refcoco(coco: Path, folder: Path) -> set[str]:
    """Write drawn scenes' classes as RefCOCO's expressions; returns their words."""
    folder.mkdir(parents=True)
    words: set[str] = set()
    for split in ("train", "val"):
        content = json.loads((coco / f"annotations/instances_{split}2017.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        seen: set[int] = set()  # one expression an image, as negatives are other images
        refs = []
        for number, annotation in enumerate(content["annotations"]):
            if annotation["image_id"] in seen:
                continue
            seen.add(annotation["image_id"])
            text = f"the {names[annotation['category_id']]} on the left"
            words.update(text.split())
            sentence = {"sent": text, "raw": text, "sent_id": number}
            refs.append(
                {
                    "ref_id": number,
                    "ann_id": annotation["id"],
                    "image_id": annotation["image_id"],
                    "split": split,
                    "sentences": [sentence],
                }
            )
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
        (folder / f"refs_{split}.p").write_bytes(pickle.dumps(refs))
    return words
