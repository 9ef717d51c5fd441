"""Auxiliary losses of MMDetection's detectors: what they add, what they reach, what they leave."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import (
    CLASS_DETECTORS,
    build,
    images,
    kind_of,
    loss,
    model_config,
    regularized,
    samples,
)
from mmcv.ops import RoIAlign
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import MMDistributedDataParallel

from mm_plugins import scores as scores_module
from mm_plugins.activations import Activation, _NotingAttention
from mm_plugins.fusion import FusionAttention
from mm_plugins.scores import Scores
from mm_plugins.second_derivatives import second_derivatives
from plugin_core.kernels import sampling
from plugin_core.methods.functional_entropy import expand_target, repeat_samples
from plugin_core.stand_ins import acting_as

GROUNDING = ("grounding-dino", "glip")
CONV = {
    "type": "ConvModule",
    "in_channels": 64,
    "out_channels": 64,
    "kernel_size": 3,
    "padding": 1,
}
AMC = {"attention_mask_consistency": {"max_margin": 1.0, "mean_margin": 1.0}}
ENTROPY = {"functional_entropy": {"samples": 2, "weight": 1e-6}}


@pytest.fixture(autouse=True)
def _no_iteration_of_another_test():
    hub = MessageHub.get_current_instance()
    hub.runtime_info.pop("iter", None)
    yield
    hub.runtime_info.pop("iter", None)


def _total(losses: dict[str, Any]) -> Tensor:
    values = [v if isinstance(v, Tensor) else sum(v) for k, v in losses.items() if "loss" in k]
    return sum(value.sum() for value in values)


def reached(value: Tensor, detector: nn.Module) -> set[str]:
    """Names of the parameters that a loss has a gradient for."""
    named = [(n, p) for n, p in detector.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True, retain_graph=True)
    assert all(g is None or g.isfinite().all() for g in found)
    return {n for (n, _), g in zip(named, found, strict=True) if g is not None and g.any()}


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


# --- the detector stays the plain one -------------------------------------------------------- #


@pytest.mark.parametrize("name", [*GROUNDING, "faster-rcnn"])
def test_parameters_and_predictions_are_the_plain_detectors(name, config):
    plain = build(config(name)).eval()
    settings = {**AMC, **(ENTROPY if name in GROUNDING else {})}
    detector = build(regularized(config(name), **settings)).eval()
    assert detector.load_state_dict(plain.state_dict()) is not None
    with torch.no_grad():
        expected = plain.predict(images(), samples(kind_of(name), test=True))
        predicted = detector.predict(images(), samples(kind_of(name), test=True))
    for mine, other in zip(predicted, expected, strict=True):
        assert "phrase_heatmaps" not in mine
        assert torch.equal(mine.pred_instances.bboxes, other.pred_instances.bboxes)
        assert torch.equal(mine.pred_instances.scores, other.pred_instances.scores)


@pytest.mark.parametrize("name", ["grounding-dino", "faster-rcnn"])
def test_the_detectors_own_losses_stay_as_they_are(name, config):
    plain = build(config(name))
    detector = build(regularized(config(name), **AMC))
    expected = loss(plain, samples(kind_of(name)))
    losses = loss(detector, samples(kind_of(name)))
    assert set(losses) - set(expected) == {"loss_amc_mean", "loss_amc_max"}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, atol=1e-4, rtol=1e-4)


def padded(kind: str) -> list:
    """The second image is smaller than the batch, and its text shorter."""
    batch = samples(kind, boxes=((8.0, 8, 40, 40), (10.0, 20, 40, 44)))
    batch[1].set_metainfo({"img_shape": (48, 44), "ori_shape": (24, 22)})
    return batch


@pytest.mark.parametrize("name", ["grounding-dino", "glip", "faster-rcnn"])
def test_second_derivatives_change_no_value_and_no_gradient(name, config):
    detector = build(config(name))
    names = [n for n, p in detector.named_parameters() if p.requires_grad]
    found = []
    for twice in (False, True):
        batch = padded(kind_of(name))
        if twice:
            with second_derivatives(detector):
                value = _total(loss(detector, batch))
        else:
            value = _total(loss(detector, batch))
        parameters = [p for p in detector.parameters() if p.requires_grad]
        found.append((value, torch.autograd.grad(value, parameters, allow_unused=True)))
    (plain, expected), (value, gradients) = found
    torch.testing.assert_close(value, plain, atol=1e-3, rtol=1e-4)
    for parameter, mine, other in zip(names, gradients, expected, strict=True):
        if other is not None:
            scale = float(other.abs().max()) + 1e-6
            assert (mine - other).abs().max() <= 2e-3 * scale, parameter


def test_copies_and_pickles_are_of_their_own(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert type(other) is type(detector)
        nn.init.zeros_(other.text_feat_map.weight)
        assert "loss_amc_max" in loss(other, samples("phrases"))
    assert detector.text_feat_map.weight.any()


def traces(detector: nn.Module) -> list[Any]:
    """Whatever of a module can be exchanged for a step."""
    return [
        (type(m), list(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in detector.modules()
    ]


def test_nothing_that_is_exchanged_for_a_step_stays_also_after_an_error(config, monkeypatch):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    loss(detector, samples("phrases"))  # in which MMDetection's head gets attributes of its own
    before = traces(detector)
    assert not any(kind.__name__.startswith("_") for kind, *_ in before)
    loss(detector, samples("phrases"))
    assert traces(detector) == before

    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(detector.encoder.fusion_layers[-1].attn, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        loss(detector, samples("phrases"))
    monkeypatch.undo()
    assert traces(detector) == before


# --- attention mask consistency -------------------------------------------------------------- #


@pytest.mark.parametrize("masks", ["none", "booleans", "numbers"])
def test_noted_attention_computes_as_mmdetections(masks):
    attention = BiMultiHeadAttention(v_dim=16, l_dim=12, embed_dim=32, num_heads=4).eval()
    image, text = 4 * torch.randn(2, 10, 16), 4 * torch.randn(2, 6, 12)
    padding = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    padding[0][1, 7:], padding[1][0, 4:] = True, True
    given = {
        "none": (None, None),
        "booleans": padding,  # as Grounding DINO has them
        "numbers": (None, (~padding[1]).long()),  # as GLIP has them
    }[masks]
    expected = attention(image, text, *given)
    noted: list[Tensor] = []
    with acting_as(_NotingAttention, attention, noted=noted):
        torch.testing.assert_close(attention(image, text, *given), expected)
    assert noted[0].shape == (2, 4, 6, 10)
    torch.testing.assert_close(noted[0].sum(3), torch.ones(2, 4, 6))
    assert type(attention) is BiMultiHeadAttention and "noted" not in vars(attention)


def test_fusion_has_mmdetections_gradients_and_keeps_no_projection_of_the_image():
    attention = BiMultiHeadAttention(v_dim=16, l_dim=12, embed_dim=32, num_heads=4).eval().double()
    for bias in (p for name, p in attention.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    image = torch.randn(2, 10, 16, dtype=torch.double, requires_grad=True)
    text = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.long)
    given = (image, text, *attention.parameters())
    found, kept = [], []

    def keep(x: Tensor) -> Tensor:
        kept[-1].append(tuple(x.shape[-2:]))
        return x

    for kind in (BiMultiHeadAttention, FusionAttention):
        kept.append([])
        with acting_as(kind, attention):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                outputs = attention(image, text, None, mask)
                value = sum(x.tanh().sum() for x in outputs)
            first = torch.autograd.grad(value, given, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        found.append((*outputs, *first, *second))
    for other, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    projected = {(10, 8), (10, 32), (20, 32)}
    assert projected & set(kept[0]) and not projected & set(kept[1])


def test_fusion_calls_projections_that_are_not_plain_such_as_with_lora():
    torch.manual_seed(0)
    attention = BiMultiHeadAttention(8, 6, 16, 2, dropout=0.0).double()
    for name in ("v_proj", "values_v_proj", "out_v_proj"):
        projection = attention.get_submodule(name)
        low = nn.Linear(projection.in_features, 2, bias=False).double()
        added = nn.Linear(2, projection.out_features, bias=False).double()
        setattr(attention, name, WithLora(projection, nn.Sequential(low, added)))
    inputs = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 6).double()
    expected = attention(*inputs)
    with acting_as(FusionAttention, attention):
        torch.testing.assert_close(attention(*inputs), expected)


class WithLora(nn.Module):
    def __init__(self, base: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def test_acting_nests_and_gives_back_what_the_module_had():
    class Outer(nn.Linear):
        pass

    class Inner(nn.Linear):
        pass

    module = nn.Linear(2, 2)
    module.noted = "own"
    with acting_as(Outer, module, noted="outer"):
        with acting_as(Inner, module, noted="inner", more=1):
            assert type(module) is Inner and (module.noted, module.more) == ("inner", 1)
        assert type(module) is Outer and module.noted == "outer" and "more" not in vars(module)
    assert type(module) is nn.Linear and module.noted == "own"


def test_second_derivatives_nest(config):
    detector = build(config("faster-rcnn"))
    align = detector.roi_head.bbox_roi_extractor.roi_layers[0]
    with second_derivatives(detector, wanted=lambda: True):
        with second_derivatives(detector, wanted=lambda: False):
            assert align.wanted()
            total = _total(loss(detector, samples("classes")))
        assert type(align) is not RoIAlign
    assert type(align) is RoIAlign and "wanted" not in vars(align)
    weight = detector.neck.fpn_convs[0].conv.weight
    (slope,) = torch.autograd.grad(total, weight, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), weight)[0].isfinite().all()


def test_attention_and_its_gradient_are_those_of_the_product_rule(config):
    """What is projected is O = P V: so is ds/dP = ds/dO Vᵀ, and P the softmax of the queries."""
    detector = build(config("grounding-dino"))
    attention = detector.encoder.fusion_layers[-1].attn
    seen: dict[str, Tensor] = {}
    handles = [attention.out_l_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))]

    def project(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        image, text = args[:2] if args else (inputs["vision"], inputs["lang"])
        for name, x in (("v_proj", image), ("l_proj", text), ("values_v_proj", image)):
            seen[name] = getattr(attention, name)(x)

    handles.append(attention.register_forward_pre_hook(project, with_kwargs=True))
    activation, scores = Activation(detector), Scores(detector)
    with activation.record(2) as recorded, scores.record() as logits_of:
        loss(detector, samples("phrases"))
    score = torch.stack([logits[:, 1].amax() for logits in logits_of(2)]).sum()
    recorded.differentiate.create_graph = False
    heat = recorded.heatmaps(score)

    (slope,) = torch.autograd.grad(score, seen["out"], retain_graph=True)
    heads = attention.num_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    queries, keys = split(seen["l_proj"]), split(seen["v_proj"] * attention.scale)
    probability = (queries @ keys.transpose(2, 3)).softmax(3)
    gradient = split(slope) @ split(seen["values_v_proj"]).transpose(2, 3)
    useful = (probability * gradient.relu()).mean((1, 2))
    sizes = [(8, 8), (4, 4), (2, 2)]
    maps = [
        nn.functional.interpolate(x.view(2, 1, *size), sizes[0], mode="bilinear")
        for x, size in zip(useful.split([64, 16, 4], 1), sizes, strict=True)
    ]
    expected = torch.stack(maps).mean(0)
    low, high = expected.amin((2, 3), True), expected.amax((2, 3), True)
    torch.testing.assert_close(heat, (expected - low) / (high - low), atol=5e-3, rtol=0)


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


@pytest.mark.parametrize("name", ["faster-rcnn", "cascade-rcnn"])
def test_only_the_regions_of_the_best_scores_are_differentiated_twice(name, config, monkeypatch):
    settings = {**AMC["attention_mask_consistency"], "phrases": None}
    model = regularized(config(name), attention_mask_consistency=settings)
    detector, batch = build(model), samples("classes")
    named = [(n, p) for n, p in detector.named_parameters() if p.requires_grad]
    regions: list[int] = []

    def pool(maps: Any, like: Any, gradient: Tensor) -> Any:
        regions.append(len(gradient))
        return differentiate(maps, like, gradient)

    differentiate = sampling._Adjoint.apply
    monkeypatch.setattr(sampling._Adjoint, "apply", pool)
    found = []
    for alone in (True, False):
        assert Scores(detector).is_of_each_region is alone
        losses = loss(detector, batch)
        value = losses["loss_amc_mean"] + losses["loss_amc_max"]
        parameters = [p for _, p in named]
        found.append((value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)))
        # Two classes in each of two images
        assert max(regions) <= 4 if alone else max(regions) > 8
        regions.clear()
        monkeypatch.setattr(scores_module, "_ROW_WISE", frozenset())
    (value, gradients), (expected, all_gradients) = found
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for (parameter, _), mine, other in zip(named, gradients, all_gradients, strict=True):
        if other is not None and other.any():
            assert (mine - other).abs().max() <= 2e-3 * other.abs().max() + 1e-6, parameter


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
    "extractor",
    [
        {"type": "SingleRoIExtractor"},
        {"type": "GenericRoIExtractor", "aggregation": "sum", "pre_cfg": CONV, "post_cfg": CONV},
    ],
    ids=["single", "generic"],
)
def test_second_derivatives_change_no_gradient_of_a_region_extractor(extractor, config):
    model = config("faster-rcnn")
    model.roi_head.bbox_roi_extractor.update(extractor)
    detector = build(model)
    found = []
    for twice in (False, True):
        context = second_derivatives(detector) if twice else contextlib.nullcontext()
        with context:
            value = _total(loss(detector, samples("classes")))
        parameters = [p for p in detector.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(value, parameters, allow_unused=True))
    for mine, other in zip(found[1], found[0], strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert (mine - other).abs().max() <= 1e-3 * (float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize(
    ("model", "settings", "activation", "name"),
    [
        (
            "faster-rcnn",
            {"roi_head.bbox_roi_extractor.roi_layer.pool_mode": "max"},
            None,
            "roi_head.bbox_roi_extractor.roi_layers.0 is a RoIAlign",
        ),
        (
            "retinanet",
            {
                "backbone.dcn": {"type": "DCNv2", "deform_groups": 1},
                "backbone.stage_with_dcn": (False, False, False, True),
                "backbone.depth": 50,
                "neck.in_channels": [32, 64, 128, 256],
            },
            "backbone.layer3",
            r"backbone.layer4.0.conv2 is a ModulatedDeformConv2dPack",
        ),
    ],
    ids=["pooling", "convolution"],
)
def test_what_cannot_be_differentiated_twice_is_named(model, settings, activation, name, config):
    cfg = Config({"model": config(model)})
    cfg.merge_from_dict({f"model.{key}": value for key, value in settings.items()})
    heatmap = {"activation": activation}
    detector = build(regularized(cfg.model, **AMC, heatmap=heatmap))
    with pytest.raises(ValueError, match=f"{name}.*model.heatmap.activation"):
        loss(detector, samples("classes"))


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
    assert _total(loss(detector, samples("phrases"))).isfinite()
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


def test_nothing_of_a_step_stays_alive(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    seen: list[Any] = []
    attention = detector.encoder.fusion_layers[-1].attn
    handle = attention.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(y[0])))
    gc.disable()  # nothing that only the collector would find
    try:
        _total(loss(detector, samples("phrases"))).backward()
        assert seen and all(reference() is None for reference in seen)
    finally:
        gc.enable()
        handle.remove()


def test_it_trains_in_bfloat16(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    with torch.autocast("cpu", torch.bfloat16):
        losses = loss(detector, samples("phrases"))
    _total(losses).backward()
    assert losses["loss_amc_max"] > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_an_empty_caption_is_warned_of_and_the_rest_trains(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    said: list[str] = []
    detector._warn = lambda kind, text: said.append(text)
    batch = samples("phrases")
    batch[0].set_metainfo({"text": "", "tokens_positive": {0: [[0, 0]], 1: [[0, 0]]}})
    losses = loss(detector, batch)
    assert _total(losses).isfinite() and losses["loss_amc_max"] > 0
    assert len(said) == 1
    assert "image0.jpg: the spans [[0, 0]] of phrase 0 are no part of its text ''" in said[0]
    assert len(batch[0].gt_instances) == 0


def test_without_gradients_there_is_the_plain_loss(config):
    detector = build(regularized(config("grounding-dino"), **AMC, **ENTROPY))
    with torch.no_grad():
        losses = loss(detector, samples("phrases"))
    assert not {"loss_amc_max", "loss_functional_entropy"} & set(losses)
    assert _total(losses) > 0


def test_it_is_taken_in_every_nth_step_of_the_run(config):
    detector = build(
        regularized(
            config("grounding-dino"),
            attention_mask_consistency={"every": 2},
            functional_entropy={"every": 3, "samples": 1},
        )
    )
    hub = MessageHub.get_current_instance()
    for step, amc, entropy in ((0, True, True), (3, False, True), (4, True, False)):
        hub.update_info("iter", step)
        losses = loss(detector, samples("phrases"))
        assert ("loss_amc_max" in losses, "loss_functional_entropy" in losses) == (amc, entropy)
    del hub.runtime_info["iter"]  # without a runner it counts itself
    taken = ["loss_amc_max" in loss(detector, samples("phrases")) for _ in range(3)]
    assert taken in ([True, False, True], [False, True, False])


# --- functional entropy ---------------------------------------------------------------------- #


@pytest.mark.parametrize("name", GROUNDING)
def test_information_is_logged_and_the_terms_gradient_reaches_image_and_text(name, config):
    detector = build(regularized(config(name), functional_entropy={"samples": 1, "weight": 1e-9}))
    losses = loss(detector, samples(kind_of(name)))
    assert losses["information_image"] > 0 and losses["information_text"] > 0
    assert losses["loss_functional_entropy"] > 0
    names = reached(losses["loss_functional_entropy"], detector)
    assert {"backbone", "neck", "language_model"} <= parts(names)
    _, logged = detector.parse_losses(losses)
    assert float(logged["information_text"]) == pytest.approx(float(losses["information_text"]))


@pytest.mark.parametrize("name", GROUNDING)
def test_as_published_targets_are_differentiated(name, config, monkeypatch):
    targets = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        targets.append(expand_target(*args, **kwargs))
        return targets[-1]

    monkeypatch.setattr("plugin_core.methods.functional_entropy.expand_target", watched)
    settings = {"samples": 1, "weight": 1e-9, "as_published": True}
    detector = build(regularized(config(name), functional_entropy=settings))
    losses = loss(detector, samples(kind_of(name)))
    assert targets[0].requires_grad
    detector.parse_losses(losses)[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


class NoNoise:
    """In place of the regularizer: gives the modalities as they are."""

    samples, as_published = 2, False

    def __call__(self, run, modalities, logits, masks, valid):
        repeated = {
            name: repeat_samples(x, 2)
            if isinstance(x, Tensor)
            else tuple(repeat_samples(level, 2) for level in x)
            for name, x in modalities.items()
        }
        self.clean, self.again = repeat_samples(logits, 2), run(repeated)
        self.valid = repeat_samples(valid.expand(logits.shape), 2)
        self.masks = masks
        return logits.sum(), {}


@pytest.mark.parametrize("name", GROUNDING)
def test_without_noise_the_copies_have_the_logits_of_the_image(name, config):
    detector = build(regularized(config(name)))
    batch = padded(kind_of(name))
    if name == "grounding-dino":
        batch[1].set_metainfo(
            {"text": TEXT_WITH_PADDING, "tokens_positive": {0: [[0, 8]], 1: [[0, 8]]}}
        )
    with detector._record() as recording:
        loss(detector, batch)
    stub = NoNoise()
    detector._regularize(stub, recording())
    torch.testing.assert_close(stub.again[stub.valid], stub.clean[stub.valid], atol=1e-4, rtol=1e-4)
    assert 0 < stub.valid.sum() < stub.valid.numel(), "padding of the shorter text does not count"
    if name == "grounding-dino":
        assert not stub.masks["image"][1].all(), "nor does that of the smaller image"
    assert stub.masks["text"].any() and not stub.masks["text"].all()


TEXT_WITH_PADDING = "the disk."


# --- predictions with heatmaps --------------------------------------------------------------- #


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


# --- two processes --------------------------------------------------------------------------- #


def step(rank: int, text_model: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Take a step in a process whose images have boxes, or have none."""
    register_all_modules()
    detector = build(regularized(model_config("grounding-dino", text_model), **AMC, **ENTROPY))
    joined = MMDistributedDataParallel(detector.train(), find_unused_parameters=True)
    boxes = ((8.0, 8, 40, 40), (30.0, 20, 60, 62)) if rank == 0 else ()
    torch.manual_seed(rank)
    losses = joined(images(1), samples("phrases", boxes=boxes, count=1), mode="loss")
    _total(losses).backward()
    gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
    return sorted(losses), gradients


def test_processes_train_together_though_one_has_no_phrases(tmp_path, text_models):
    function = partial(step, text_model=text_models["grounding-dino"])
    (names, mine), (other_names, others) = two_processes.run(function, tmp_path)
    assert names == other_names, "of losses, which are averaged by name"
    assert mine.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in mine.items())
    assert any(g.any() for n, g in mine.items() if n.startswith("language_model"))
