"""Auxiliary losses of MMDetection's detectors: settings that are wrong are named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from batchformer_detectors import model_config
from grounding_detectors import build, loss, regularized, samples
from mmdet.registry import MODELS
from mmengine.config import Config

from mm_plugins.preflight import check_config
from plugin_core.errors import ArgumentError

AMC = {"attention_mask_consistency": {}}
ENTROPY = {"functional_entropy": {"samples": 1}}


@pytest.mark.parametrize("settings", [AMC, ENTROPY], ids=["amc", "entropy"])
def test_activation_checkpoints_are_refused_by_name(settings, config):
    model = regularized(config("glip"), **settings)
    model.bbox_head.use_checkpoint = True
    with pytest.raises(ValueError, match="^bbox_head.use_checkpoint must be 0 or False"):
        MODELS.build(model)


def test_a_text_in_chunks_is_refused_by_name(config):
    model = regularized(config("grounding-dino"), heatmap={"in_test": True})
    model.test_cfg.chunked_size = 2
    with pytest.raises(
        ValueError, match="^heatmap.in_test must be False .*test_cfg.chunked_size=-1"
    ):
        MODELS.build(model)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"attention_mask_consistency": {"mean_margin": 2}},
            "attention_mask_consistency.mean_margin must be from 0 to 1",
        ),
        (
            {"attention_mask_consistency": {"margin": 0.1}},
            r"attention_mask_consistency\.margin is no argument; .*did you mean .*_margin'",
        ),
        (
            {"functional_entropy": {"bound": "poincare"}},
            "functional_entropy.bound must be 'entropy' or 'variance', got 'poincare'",
        ),
        (
            {"functional_entropy": {"method": "max"}},
            "functional_entropy.method must be 'max_ent', .* got 'max'",
        ),
        (
            {"functional_entropy": {"as_published": 1}},
            "functional_entropy.as_published must be True or False, got 1",
        ),
        (
            {"functional_entropy": {"every": 0}},
            "functional_entropy.every must be a positive integer",
        ),
        ({"attention_mask_consistency": 1}, r"attention_mask_consistency must be dict\(…\)"),
        (
            {**AMC, "heatmap": {"activation": "encoder.fusion_layer.1"}},
            "heatmap.activation must .*got 'encoder.fusion_layer.1'; similar names: encoder.fus",
        ),
        (
            {**AMC, "heatmap": {"activation": "encoder"}},
            "heatmap.activation must name one fusion layer, got 'encoder' with 2",
        ),
        ({**AMC, "heatmap": {"levels": 1}}, "heatmap.levels must be a tuple"),
        ({"heatmap": {"layer": "neck"}}, r"heatmap\.layer is no argument; there are activation"),
    ],
)
def test_bad_settings_are_named_when_the_detector_is_built(settings, text, config):
    with pytest.raises(ArgumentError, match=f"^{text}"):
        MODELS.build(regularized(config("grounding-dino"), **settings))


def test_a_missing_tokenizer_of_the_data_is_known_before_a_run_writes_anything(config):
    model = regularized(config("grounding-dino"), **AMC, **ENTROPY)
    transforms = [{"type": "RandomSamplingNegPos", "tokenizer_name": model.language_model.name}]
    cfg = Config({"model": model, "train_dataloader": {"transforms": transforms}})
    check_config(cfg, train=True, resumes=False)
    transforms[0]["tokenizer_name"] = "nowhere"
    cfg = Config({"model": model, "train_dataloader": {"transforms": transforms}})
    where = r"train_dataloader.transforms\[0\].tokenizer_name"
    with pytest.raises(ValueError, match=f"{where}: the text model 'nowhere' .*hf down"):
        check_config(cfg, train=True, resumes=False)


def test_a_level_that_is_not_there_is_named(config):
    detector = build(regularized(config("grounding-dino"), **AMC, heatmap={"levels": (0, 3)}))
    with pytest.raises(
        ValueError, match=r"^heatmap.levels must be among .* 0 to 2 .*, got \(0, 3\)$"
    ):
        loss(detector, samples("phrases"))


def test_an_activation_that_the_scores_do_not_depend_on_is_named(config):
    heatmap = {"activation": "roi_head.bbox_roi_extractor"}
    detector = build(regularized(config("faster-rcnn"), **AMC, heatmap=heatmap))
    with pytest.raises(ValueError, match="^heatmap.activation .*got 'roi_head.bbox_roi_extractor'"):
        loss(detector, samples("classes"))


def test_an_activation_without_a_graph_says_what_may_be_the_reason(config):
    detector = build(regularized(config("grounding-dino"), **AMC))
    layer = detector.encoder.fusion_layers[-1]
    forward = layer.forward
    layer.forward = lambda **kwargs: torch.utils.checkpoint.checkpoint(
        forward, *kwargs.values(), use_reentrant=True
    )
    with pytest.raises(ValueError, match=r"activation checkpoints \(model.encoder.num_cp=0"):
        loss(detector, samples("phrases"))


def test_functional_entropy_is_for_detectors_that_read_a_text(config):
    with pytest.raises(
        ValueError, match="^functional_entropy is for .* read a text.*; PluginFasterRCNN is none"
    ):
        MODELS.build(regularized(config("faster-rcnn"), **ENTROPY))


def test_attention_mask_consistency_needs_scores():
    model = model_config("MaskFormer")
    with pytest.raises(
        ValueError, match="^attention_mask_consistency is for .* PluginMaskFormer is none"
    ):
        MODELS.build(regularized(model, **AMC))


def test_gathering_batchformers_and_attention_mask_consistency_do_not_meet(config):
    model = regularized(config("deformable-detr"), **AMC, batchformer={"gather": True})
    with pytest.raises(ValueError, match="^batchformer.gather must be False with attention_mask"):
        MODELS.build(model)


@pytest.mark.parametrize(
    ("name", "where"), [("faster-rcnn", "bbox_head"), ("cascade-rcnn", r"bbox_head\[1\]")]
)
def test_nor_does_one_in_a_roi_head(name, where, config):
    model = config(name)
    heads = model.roi_head.bbox_head
    head = heads[1] if isinstance(heads, list) else heads
    head.update(type="BatchFormerBBoxHead", batchformer={"gather": True})
    with pytest.raises(ArgumentError, match=f"^roi_head.{where}.batchformer.gather must be False"):
        MODELS.build(regularized(model, **AMC))


def test_checkpoints_of_the_backbone_are_refused_behind_the_activation(config):
    model = config("retinanet")
    model.backbone.with_cp = True
    detector = build(regularized(model, **AMC))  # the last stage has nothing behind it
    assert loss(detector, samples("classes"))["loss_amc_max"].isfinite()
    model = regularized(model, **AMC, heatmap={"activation": "backbone.layer2"})
    with pytest.raises(ArgumentError, match="^backbone.with_cp must be False behind heatmap.act"):
        MODELS.build(model)


@MODELS.register_module()
class BackboneWithoutItsFile(torch.nn.Module):
    def __init__(self) -> None:
        raise FileNotFoundError("no file weights.pth")


def test_only_a_detector_with_a_text_model_is_told_that_it_is_missing(config):
    model = regularized(config("retinanet"), **AMC)
    model.backbone = {"type": "BackboneWithoutItsFile"}
    with pytest.raises(FileNotFoundError, match="no file weights.pth"):
        MODELS.build(model)


def test_a_missing_text_model_says_what_to_fetch_and_where_to_name_it(config, tmp_path):
    model = regularized(config("grounding-dino"), **AMC)
    model.language_model.name = str(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"language_model.name: the text model .*nothing.* `hf down"
    ):
        MODELS.build(model)
