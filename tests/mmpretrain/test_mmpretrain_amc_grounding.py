"""AMC of MMPretrain's BLIP: heatmaps, losses, the pointing game, training by the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_blip import PATCH, SIZE, grounding, make_bert, retrieval

pytest.importorskip("mmpretrain")

from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import DATASETS, METRICS, MODELS
from mmpretrain.structures import DataSample

import mm_plugins  # noqa: F401
from plugin_core.errors import ArgumentError
from plugin_core.methods.attention_mask_consistency import (
    attention_mask_consistency_loss,
    gradient_heatmap,
    region_mask,
)

ROOT = Path(__file__).parents[2]
CELLS = SIZE // PATCH
PHRASES = ("the red circle", "person on the left side", "dog")
BOXES = [[2.0, 3.0, 20.0, 30.0], [10.0, 2.0, 30.0, 12.0], [1.0, 17.0, 15.0, 31.0]]
TINY = {"AMCBlipGrounding": grounding, "AMCBlipRetrieval": retrieval}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("text") / "bert"
    return folder, make_bert(folder, " ".join(PHRASES))


def build(kind: str, bert: tuple[Path, int], **settings: Any) -> Any:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(dict(type=kind, **TINY[kind](*bert, **settings)))


def batch() -> tuple[torch.Tensor, list[DataSample]]:
    samples = []
    for number, (phrase, box) in enumerate(zip(PHRASES[:2], BOXES, strict=False)):
        sample = DataSample(text=phrase, gt_bboxes=np.array([box]), scale_factor=(2.0, 0.5))
        sample.set_field(number, "image_id", field_type="metainfo")
        samples.append(sample)
    return torch.rand(2, 3, SIZE, SIZE), samples


@pytest.mark.parametrize("kind", TINY)
def test_the_losses_are_those_of_the_layers_attention_and_reach_the_encoders(
    kind: str, bert: tuple[Path, int]
) -> None:
    model = build(kind, bert, attention_mask_consistency={})
    images, samples = batch()
    seen: dict[str, Any] = {}
    layer = model._text_encoder().encoder.layer[1]
    heads = layer.crossattention.self

    # BERT keeps its attention and its gradient itself, as the authors' code reads them.
    heads.save_attention = True

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.setdefault("attention", module.get_attention_map())

    heads.register_forward_hook(keep)
    losses = model.loss(images, list(samples))
    terms = {name: loss for name, loss in losses.items() if "amc" in name}
    assert set(terms) == {"loss_amc_mean", "loss_amc_max"} and sum(terms.values()) > 0

    sum(terms.values()).backward()
    assert layer.crossattention.self.key.weight.grad.abs().sum() > 0
    assert model._vision_encoder().layers[0].attn.qkv.weight.grad.abs().sum() > 0

    # The score, computed in another way, and the formula's functions
    score = independent_score(model, images, samples)
    attention = seen["attention"][:2]
    maps = heads.get_attention_map()
    (slope,) = torch.autograd.grad(score.sum(), maps)
    words = model._words(samples)
    assert words.sum() < words.numel()  # there is padding
    space = [x[..., 1:].unflatten(3, (CELLS, CELLS)) for x in (attention, slope)]
    slopes = space[1] / space[1].abs().flatten(1).amax(1)[:, None, None, None, None]
    heat = gradient_heatmap(space[0], slopes, words, (SIZE, SIZE))
    mask = region_mask([torch.tensor([box]) for box in BOXES[:2]], (SIZE, SIZE), (SIZE, SIZE))
    mean_loss, max_loss = attention_mask_consistency_loss(heat, mask)
    torch.testing.assert_close(terms["loss_amc_mean"], 0.2 * mean_loss)
    torch.testing.assert_close(terms["loss_amc_max"], 0.8 * max_loss)


def independent_score(model: Any, images: torch.Tensor, samples: list[DataSample]) -> torch.Tensor:
    texts = model.tokenizer(
        [sample.text for sample in samples], padding="longest", return_tensors="pt"
    )
    if hasattr(model, "multimodal_head"):
        texts = model.preprocess_text(samples)
        texts.input_ids[:, 0] = model.tokenizer.additional_special_tokens_ids[0]
        patches = model.vision_backbone(images)[0]
        fused = model.text_backbone(
            texts.input_ids, texts.attention_mask, encoder_hidden_states=patches, return_dict=True
        )
        return model.multimodal_head.fc(fused.last_hidden_state[:, 0])[:, 1]
    patches = model.visual_encoder(images)[0]
    words = model.text_encoder(
        texts.input_ids, texts.attention_mask, mode="text", return_dict=True
    ).last_hidden_state
    fused = model.multimodal_encoder(
        encoder_embeds=words,
        attention_mask=texts.attention_mask,
        encoder_hidden_states=patches,
        return_dict=True,
    ).last_hidden_state
    x1, y1, x2, y2 = torch.tensor(BOXES[:2]).unbind(1)
    centres = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1) / SIZE
    bins = (centres * 640).long()
    head = model.grounding_head
    tokens = torch.cat([head.prefix_ids.expand(2, 1), bins + head.bin_start_idx], 1)
    logits = head.decoder(
        tokens,
        encoder_hidden_states=torch.cat([patches, fused], 1),
        encoder_attention_mask=torch.cat(
            [torch.ones(patches.shape[:2], dtype=torch.long), texts.attention_mask], 1
        ),
        return_dict=True,
    ).logits[:, :4]
    of_bins = logits[:, :, head.bin_start_idx : head.bin_start_idx + 641].log_softmax(2)
    return of_bins.gather(2, bins[:, :, None]).sum((1, 2))


@pytest.mark.parametrize("kind", TINY)
def test_without_the_setting_losses_are_plain_blips(kind: str, bert: tuple[Path, int]) -> None:
    model = build(kind, bert)
    images, samples = batch()
    assert not [name for name in model.loss(images, samples) if "amc" in name]


def test_one_step_in_every_so_many_has_the_losses(bert: tuple[Path, int]) -> None:
    from mmengine.logging import MessageHub

    model = build("AMCBlipRetrieval", bert, attention_mask_consistency={"every": 2})
    hub = MessageHub.get_current_instance()
    found = []
    try:
        for step in range(3):
            hub.update_info("iter", step)
            found.append("loss_amc_max" in model.loss(*batch()))
    finally:
        hub.runtime_info.pop("iter")
    assert found == [True, False, True]


@pytest.mark.parametrize("kind", TINY)
def test_predictions_have_heatmaps_and_boxes_over_the_file(
    kind: str, bert: tuple[Path, int]
) -> None:
    model = build(kind, bert).eval()
    images, samples = batch()
    with torch.no_grad():
        found = model(images, samples, mode="predict")
    for sample, box in zip(found, BOXES, strict=False):
        assert sample.heatmap.shape == (2 * SIZE, SIZE // 2) and not sample.heatmap.requires_grad
        assert 0 <= sample.heatmap.min() < sample.heatmap.max() <= 1
        x1, y1, x2, y2 = box
        expected = torch.tensor([[x1 / 2, y1 * 2, x2 / 2, y2 * 2]])
        torch.testing.assert_close(torch.as_tensor(sample.gt_bboxes).float(), expected)


def test_the_pointing_game_counts_maxima_in_boxes() -> None:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        metric = METRICS.build({"type": "HeatmapPointingGame"})
    heatmap = torch.zeros(4, 8)
    heatmap[1, 6] = 1
    hit = {"heatmap": heatmap, "gt_bboxes": np.array([[5.0, 0, 8, 4]]), "gt_bboxes_labels": [3]}
    miss = {"heatmap": heatmap, "gt_bboxes": np.array([[0.0, 0, 2, 4]]), "gt_bboxes_labels": [3]}
    metric.process(None, [hit, miss, dict(miss, gt_bboxes_labels=[1])])
    found = metric.evaluate(3)
    assert found["pointing_game/accuracy"] == pytest.approx(1 / 3)
    assert found["pointing_game/chance"] == pytest.approx((12 + 8 + 8) / 32 / 3)
    assert found["pointing_game/accuracy/3"] == 0.5 and found["pointing_game/accuracy/1"] == 0
    with pytest.raises(ValueError, match="no heatmap; let the config's model be"):
        metric.process(None, [{"gt_bboxes": []}])


@pytest.mark.parametrize("kind", TINY)
def test_a_wrong_setting_is_one_clear_line(kind: str, bert: tuple[Path, int]) -> None:
    with pytest.raises(ArgumentError, match="attention_mask_consistency.mean_margin must be from"):
        build(kind, bert, attention_mask_consistency={"mean_margin": 2})
    settings = TINY[kind](*bert)
    for layer in (3, -1, "8"):
        expected = re.escape(f"layer of the text encoder, from 0 to 2, got {layer!r}")
        with pytest.raises(ArgumentError, match=expected):
            MODELS.build(dict(settings, type=kind, heatmap_layer=layer))
    for missing in ("no-such-text-model", "./no/such/folder"):
        with pytest.raises(ArgumentError, match=r"tokenizer\.name_or_path must be the folder"):
            tokenizer = dict(settings["tokenizer"], name_or_path=missing)
            MODELS.build(dict(settings, type=kind, tokenizer=tokenizer))


def test_a_text_model_without_tokens_for_boxes_is_refused(tmp_path: Path) -> None:
    from make_tiny_text_model import make_text_model

    (tmp_path / "words.txt").write_text("red circle")
    tokens = make_text_model(tmp_path / "bert", [tmp_path / "words.txt"], hidden_size=16)
    with pytest.raises(ArgumentError, match=r"tokens for boxes, \[unused339\] to \[unused980\]"):
        build("AMCBlipGrounding", (tmp_path / "bert", tokens + 2))


def test_the_flickr30k_config_reads_each_phrase_alone(drawn_coco: Path) -> None:
    cfg = Config.fromfile(
        ROOT / "configs/mmpretrain/amc/blip-base-amc-itm_pointing-game_flickr30k.py"
    )
    dataset = cfg.test_dataloader.dataset | {
        "data_root": "",
        "data_prefix": {"img": f"{drawn_coco}/val2017/"},
        "ann_file": str(drawn_coco / "annotations/grounding_val2017_flickr30k.json"),
    }
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        phrases = DATASETS.build(dataset)
        plain = DATASETS.build(dataset | {"type": "mmdet.Flickr30kDataset"})
        sample = phrases[0]["data_samples"]
    assert len(phrases) > len(plain) == 3
    of_first = plain.get_data_info(0)["phrase_ids"].count(0)
    assert sample.gt_bboxes.shape == (of_first, 4) and len(sample.gt_bboxes_labels) == of_first
    info = phrases.get_data_info(0)
    scale = (384 / info["width"], 384 / info["height"])
    assert sample.scale_factor == pytest.approx(scale) and sample.text == info["text"]
    box = np.array(info["instances"][0]["bbox"]) * (scale * 2)
    np.testing.assert_allclose(sample.gt_bboxes[0], box, rtol=1e-5)
