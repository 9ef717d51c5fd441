"""Detectors of MMDetection whose gradients are differentiated again."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import build, kind_of, loss, regularized, samples
from mmcv.ops import RoIAlign
from mmengine.config import Config
from regularized_detectors import AMC, padded, total

from mm_plugins import scores as scores_module
from mm_plugins.scores import Scores
from mm_plugins.second_derivatives import second_derivatives
from plugin_core.kernels import sampling
from plugin_core.stand_ins import acting_as

pytestmark = pytest.mark.usefixtures("no_iteration_of_another_test")

CONV = {
    "type": "ConvModule",
    "in_channels": 64,
    "out_channels": 64,
    "kernel_size": 3,
    "padding": 1,
}


@pytest.mark.parametrize("name", ["grounding-dino", "glip", "faster-rcnn"])
def test_second_derivatives_change_no_value_and_no_gradient(name, config):
    detector = build(config(name))
    names = [n for n, p in detector.named_parameters() if p.requires_grad]
    found = []
    for twice in (False, True):
        batch = padded(kind_of(name))
        if twice:
            with second_derivatives(detector):
                value = total(loss(detector, batch))
        else:
            value = total(loss(detector, batch))
        parameters = [p for p in detector.parameters() if p.requires_grad]
        found.append((value, torch.autograd.grad(value, parameters, allow_unused=True)))
    (plain, expected), (value, gradients) = found
    torch.testing.assert_close(value, plain, atol=1e-3, rtol=1e-4)
    for parameter, mine, other in zip(names, gradients, expected, strict=True):
        if other is not None:
            scale = float(other.abs().max()) + 1e-6
            assert (mine - other).abs().max() <= 2e-3 * scale, parameter


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
            value = total(loss(detector, samples("classes")))
        assert type(align) is not RoIAlign
    assert type(align) is RoIAlign and "wanted" not in vars(align)
    weight = detector.neck.fpn_convs[0].conv.weight
    (slope,) = torch.autograd.grad(value, weight, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), weight)[0].isfinite().all()


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
            value = total(loss(detector, samples("classes")))
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
