"""Attention mask consistency of MMDetection's detectors: what it reaches, reads and leaves out."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import CLASS_DETECTORS, build, images, kind_of, loss, regularized, samples
from regularized_detectors import AMC, GROUNDING, parts, reached, total

from mm_plugins.scores import Scores

pytestmark = pytest.mark.usefixtures("no_iteration_of_another_test")


@pytest.mark.parametrize("name", GROUNDING)
def test_its_gradient_reaches_image_and_text(name, config):
    detector = build(regularized(config(name), **AMC))
    losses = loss(detector, samples(kind_of(name)))
    for key in ("loss_amc_mean", "loss_amc_max"):
        assert losses[key] > 0
        names = reached(losses[key], detector)
        assert {"backbone", "neck", "language_model"} <= parts(names), key
        fusion = [n for n in names if re.search(r"\.attn\.(v|l)_proj\.weight", n)]
        assert len({n.split(".")[-2] for n in fusion}) == 2


@pytest.mark.parametrize("name", CLASS_DETECTORS)
def test_class_detectors_have_it_too(name, config):
    detector = build(regularized(config(name), **AMC))
    losses = loss(detector, samples("classes"))
    names = reached(losses["loss_amc_max"] + losses["loss_amc_mean"], detector)
    assert "backbone" in parts(names)
    head = {"roi_head", "bbox_head"} & parts(names)
    assert head, "the second derivative reaches what makes the score"


def test_class_scores_of_regions_are_each_images_own(config):
    detector = build(regularized(config("faster-rcnn"), **AMC))
    scores = Scores(detector)
    seen: dict[str, Any] = {}
    roi_head = detector.roi_head
    handles = [
        roi_head.bbox_head.register_forward_hook(lambda m, a, y: seen.update(scores=y[0])),
        roi_head.bbox_roi_extractor.register_forward_hook(lambda m, a, y: seen.update(rois=a[1])),
    ]
    with scores.record() as logits_of:
        loss(detector, samples("classes"))
    for handle in handles:
        handle.remove()
    for i, of_image in enumerate(logits_of(2)):
        assert len(of_image) and torch.equal(of_image, seen["scores"][seen["rois"][:, 0] == i])


def test_class_scores_of_anchors_are_those_of_all_positions(config):
    """By hand: two anchors, three classes, levels of 2×1 and 1×1 cells."""
    scores = Scores(build(config("retinanet")))
    head = scores.detector.bbox_head
    head.cls_out_channels = 3
    fine = torch.arange(12.0).view(1, 6, 2, 1)  # channel · 2 + row
    coarse = 100 + torch.arange(6.0).view(1, 6, 1, 1)
    logits = scores._dense_logits(head, [fine, coarse])[0]
    expected = {(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11), (100, 101, 102), (103, 104, 105)}
    assert {tuple(int(x) for x in row) for row in logits} == expected


def test_scores_of_queries_leave_denoising_queries_out(config):
    detector = build(config("grounding-dino"))
    scores = Scores(detector)
    seen: list[Tensor] = []
    handle = detector.bbox_head.register_forward_hook(lambda m, a, y: seen.append(y[0]))
    with scores.record() as logits_of:
        loss(detector, samples("phrases"))
    handle.remove()
    (output,) = seen
    assert output.shape[2] > detector.num_queries, "denoising queries come first"
    for i, of_image in enumerate(logits_of(2)):
        assert torch.equal(of_image, output[-1, i, output.shape[2] - detector.num_queries :])


def test_a_head_without_class_scores_is_named(config):
    scores = Scores(build(config("retinanet")))
    with pytest.raises(ValueError, match="RetinaHead gives no class scores as"):
        scores._dense_logits(scores.detector.bbox_head, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("head", ["BatchFormerBBoxHead", "IDABBoxHead"])
def test_it_goes_with_the_other_plugins(head, config):
    model = config("faster-rcnn")
    model.roi_head.bbox_head.type = head
    layer = {"cfg": {"type": "TripletAttention"}, "position": "after_conv2"}
    model.backbone.plugins = [layer]
    heatmap = {"activation": "backbone.layer3"}
    detector = build(regularized(model, **AMC, heatmap=heatmap))
    names = reached(loss(detector, samples("classes"))["loss_amc_max"], detector)
    assert any("layer4" in n and "triplet_attention" in n for n in names)
    assert any(n.startswith("roi_head.bbox_head") for n in names)
    assert not any("batchformer" in n for n in names)


@pytest.mark.parametrize(
    ("activation", "levels"),
    [
        ("encoder.fusion_layers.0", None),
        ("encoder.fusion_layers.1.attn", [0]),
        ("neck", None),
        ("neck", (1, 2)),
        ("backbone.layer4", None),
    ],
)
def test_the_activation_is_chosen_by_name(activation, levels, config):
    heatmap = {"activation": activation, "levels": levels}
    detector = build(regularized(config("grounding-dino"), **AMC, heatmap=heatmap))
    losses = loss(detector, samples("phrases"))
    assert losses["loss_amc_max"] > 0
    assert "backbone" in parts(reached(losses["loss_amc_max"], detector))


def test_images_without_boxes_are_not_touched(config):
    plain = build(config("grounding-dino"))
    detector = build(regularized(config("grounding-dino"), **AMC))
    expected = loss(plain, samples("phrases", boxes=()))
    losses = loss(detector, samples("phrases", boxes=()))
    assert losses.pop("loss_amc_max") == losses.pop("loss_amc_mean") == 0
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value)


def test_what_cannot_be_used_is_warned_of_once_by_name(config):
    detector = build(regularized(config("grounding-dino"), **AMC))
    outside = ((8.0, 8, 40, 40), (70.0, 20, 90, 62))
    said: list[str] = []
    detector._warn = lambda kind, text, of=detector._warn: (said.append(text), of(kind, text))
    losses = loss(detector, samples("phrases", boxes=outside))
    assert losses["loss_amc_max"] > 0  # of the other phrase
    assert "image image0.jpg: the boxes of phrase 1 are outside of the image (64×64)" in said[0]
    assert detector._warned == {"boxes"}


def test_a_region_ends_where_the_image_ends(config):
    detector = build(regularized(config("retinanet"), **AMC))
    batch = samples("classes", boxes=((4.0, 4, 64, 64),), count=1)
    batch[0].set_metainfo({"img_shape": (48, 44)})
    logits = torch.zeros(5, 3)
    (region,) = detector._visible_phrases(batch[0], logits, Scores(detector))
    assert region.boxes.tolist() == [[4, 4, 44, 48]]


def test_a_phrase_behind_the_texts_last_token_is_warned_of(config):
    model = regularized(config("grounding-dino"), **AMC)
    model.language_model.max_tokens = 5
    detector = build(model)
    said: list[str] = []
    detector._warn = lambda kind, text: said.append(text)
    assert total(loss(detector, samples("phrases"))).isfinite()
    assert "image image0.jpg: phrase 1 has no token" in said[0]


def test_a_box_without_a_span_is_left_out(config):
    detector = build(regularized(config("grounding-dino"), **AMC))
    said: list[str] = []
    detector._warn = lambda kind, text: said.append(text)
    batch = samples("phrases")
    batch[0].set_metainfo({"tokens_positive": {0: [[0, 12]]}})
    loss(detector, batch)
    assert "the spans None of phrase 1 are no part of its text" in said[0]
    assert batch[0].gt_instances.labels.tolist() == [0]


@pytest.mark.parametrize("name", [*GROUNDING, "faster-rcnn", "retinanet"])
def test_predictions_have_heatmaps_of_what_an_image_is_annotated_with(name, config):
    plain = build(config(name)).eval()
    detector = build(regularized(config(name), heatmap={"in_test": True})).eval()
    batch = samples(kind_of(name), test=True)
    if name == "grounding-dino":
        for sample in batch:
            sample.set_metainfo({"phrase_ids": [1, 0]})
    with torch.no_grad():
        expected = plain.predict(images(), copy.deepcopy(batch))
        results = detector.predict(images(), batch)
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(
            result.pred_instances.scores, other.pred_instances.scores, atol=1e-5, rtol=1e-4
        )
        assert not any(
            v.requires_grad for v in result.pred_instances.values() if isinstance(v, Tensor)
        )
        heat = result.phrase_heatmaps
        assert heat.labels.tolist() == [0, 1]
        assert heat.heatmaps.shape == (2, 32, 32)
        assert heat.heatmaps.amin() >= 0 and heat.heatmaps.amax() <= 1


def test_an_expression_is_one_phrase(config):
    detector = build(regularized(config("grounding-dino"), heatmap={"in_test": True})).eval()
    batch = samples("phrases", boxes=((8.0, 8, 40, 40),))
    for sample in batch:
        sample.set_metainfo({"text": "the red disk", "tokens_positive": -1})
    results = detector.predict(images(), batch)
    assert [r.phrase_heatmaps.labels.tolist() for r in results] == [[0], [0]]
    (phrase,) = Scores(detector).phrases(results[0], torch.zeros(1, 64))
    assert phrase.columns == [1, 2, 3]


@pytest.mark.parametrize("name", ["grounding-dino", "retinanet"])
def test_heatmaps_need_no_parameter_that_is_trained(name, config):
    detector = build(regularized(config(name), heatmap={"in_test": True})).eval()
    expected = detector.predict(images(), samples(kind_of(name), test=True))
    detector.requires_grad_(False)
    results = detector.predict(images(), samples(kind_of(name), test=True))
    for result, other in zip(results, expected, strict=True):
        heat, plain = result.phrase_heatmaps.heatmaps, other.phrase_heatmaps.heatmaps
        assert heat.any()
        torch.testing.assert_close(heat, plain, atol=1e-3, rtol=0)
