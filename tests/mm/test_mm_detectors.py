"""Detectors on which all methods meet: a step, an evaluation, copies, and one's own detector."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import build, images, kind_of, loss, regularized, samples
from mmdet.models.detectors import DETR
from mmdet.registry import MODELS

from mm_plugins import AMCMixin, BatchFormerMixin, FunctionalEntropyMixin, detectors
from mm_plugins.scores import Scores
from plugin_core.errors import ArgumentError

BATCHFORMER = {"batchformer": {"insert_after": (0,)}}
# All phrases, as to choose one takes a random number
AMC = {"attention_mask_consistency": {"max_margin": 1.0, "mean_margin": 1.0, "phrases": None}}
ENTROPY = {"functional_entropy": {"samples": 1, "weight": 1e-6}}
TOGETHER = {
    "grounding-dino": {**BATCHFORMER, **AMC, **ENTROPY},
    "deformable-detr": {**BATCHFORMER, **AMC},
}
EVERY_COMBINATION = pytest.mark.parametrize("name", TOGETHER)


def together(name: str, config: Any, **more: Any) -> Any:
    return build(regularized(config(name), **TOGETHER[name], **more))


def parameters(detector: nn.Module, part: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in detector.named_parameters() if part in name}


def total(losses: dict[str, Any]) -> Tensor:
    values = [v if isinstance(v, Tensor) else sum(v) for k, v in losses.items() if "loss" in k]
    return sum(value.sum() for value in values)


# The last fusion layer sees both streams, and the backbone comes before them.
@pytest.mark.parametrize("activation", [None, "backbone.layer4"])
@EVERY_COMBINATION
def test_a_step_trains_with_all_methods(name, activation, config):
    detector = together(name, config, heatmap={"activation": activation})
    losses = loss(detector, samples(kind_of(name)))
    added = {"loss_amc_mean", "loss_amc_max"}
    if "functional_entropy" in TOGETHER[name]:
        added |= {"loss_functional_entropy", "information_image", "information_text"}
    assert added <= set(losses) and losses["loss_amc_max"] > 0
    total(losses).backward()
    assert total(losses).isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
    of_batchformer = parameters(detector, ".batchformer.")
    assert of_batchformer
    assert all(p.grad is not None and p.grad.any() for p in of_batchformer.values())


def seed_the_noise(detector: nn.Module) -> None:
    """Draw functional entropy's noise alike, whatever a step has drawn before it."""

    def regularize(*args: Any) -> Any:
        torch.manual_seed(2)
        return type(detector)._regularize(detector, *args)

    detector._regularize = regularize


@pytest.mark.parametrize("activation", [None, "backbone.layer4"])
@EVERY_COMBINATION
def test_auxiliary_losses_are_the_first_streams(name, activation, config):
    """What they are without BatchFormerV2, and no parameter of it has a gradient of them."""
    found = []
    settings = {**TOGETHER[name], "heatmap": {"activation": activation}}
    plain = build(regularized(config(name), **settings | {"batchformer": None}))
    related = build(regularized(config(name), **settings))
    related.load_state_dict(plain.state_dict(), strict=False)
    for detector in (plain, related):
        seed_the_noise(detector)
        losses = loss(detector, samples(kind_of(name)))
        found.append({k: v for k, v in losses.items() if "amc" in k or "information" in k})
        amc = losses["loss_amc_mean"] + losses["loss_amc_max"]
        of_batchformer = list(parameters(detector, ".batchformer.").values())
        if of_batchformer:
            slopes = torch.autograd.grad(amc, of_batchformer, allow_unused=True)
            assert all(slope is None or not slope.any() for slope in slopes)
    information = [{k: f.pop(k) for k in list(f) if "information" in k} for f in found]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(information[1], information[0], rtol=1e-3, atol=0)


@EVERY_COMBINATION
def test_evaluation_is_the_plain_detectors_to_the_last_bit(name, config):
    model = config(name)
    model.test_cfg.max_per_img = 5
    plain = build(model)
    detector = build(regularized(model, **TOGETHER[name]))
    loss(detector, samples(kind_of(name)))  # a training step leaves nothing behind but statistics
    detector.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        results = [
            model.eval().predict(images(), samples(kind_of(name), test=True))
            for model in (detector, plain)
        ]
    for mine, other in zip(*results, strict=True):
        for key in ("scores", "bboxes", "labels"):
            assert torch.equal(mine.pred_instances[key], other.pred_instances[key])


@EVERY_COMBINATION
def test_copies_and_pickles_are_of_their_own(name, config):
    detector = together(name, config)
    expected = total(loss(detector, samples(kind_of(name))))
    for other in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert type(other) is type(detector)
        torch.testing.assert_close(total(loss(other, samples(kind_of(name)))), expected)
        for parameter in parameters(other, ".batchformer.").values():
            nn.init.constant_(parameter, 0.5)
        assert not torch.allclose(total(loss(other, samples(kind_of(name)))), expected)
    torch.testing.assert_close(total(loss(detector, samples(kind_of(name)))), expected)


def test_every_class_is_named_after_the_one_without_plugins():
    made = [k for k in vars(detectors) if k.startswith("Plugin")]
    assert len(made) == 15
    for name in made:
        kind = MODELS.get(name)
        assert kind is getattr(detectors, name)
        assert issubclass(kind, MODELS.get(name.removeprefix("Plugin")))


class MyDETR(DETR):
    pass


class MyDETR2(BatchFormerMixin, MyDETR):
    pass


@pytest.mark.parametrize(
    "bases",
    [
        (BatchFormerMixin, AMCMixin, MyDETR),
        (AMCMixin, FunctionalEntropyMixin, MyDETR),
        (BatchFormerMixin, FunctionalEntropyMixin, MyDETR),
        (MyDETR, AMCMixin),
    ],
    ids=lambda bases: "-".join(base.__name__ for base in bases),
)
def test_mixins_in_another_order_are_refused(bases):
    with pytest.raises(TypeError, match=r"Mine: its bases must be .* and then the detector"):
        type("Mine", bases, {})
    detectors_last = sorted(bases, key=lambda base: getattr(base, "place", 3))
    kind = type("Mine", tuple(detectors_last), {})
    assert type("Mine2", (kind,), {}).__mro__[1] is kind


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("PluginRetinaNet", "batchformer"),
        ("PluginFasterRCNN", "functional_entropy"),
        ("PluginGLIP", "batchformer"),
        ("PluginDINO", "functional_entropy"),
        ("PluginMask2Former", "attention_mask_consistency"),
        ("PluginMaskFormer", "heatmap"),
    ],
)
def test_a_setting_that_a_detector_does_not_take_is_refused_in_a_line(kind, setting):
    with pytest.raises(ArgumentError, match=f"^{setting} is for detectors .*; {kind} is none$"):
        getattr(detectors, kind)(**{setting: {}})


def test_the_distinct_queries_of_ddq_are_scored():
    from batchformer_detectors import batch, model_config

    model = model_config("DDQ")
    model.update(type="PluginDDQDETR", **AMC, heatmap={"activation": "backbone.layer4"})
    detector = build(model).train()
    seen = []
    detector.bbox_head.register_forward_hook(lambda m, a, y: seen.append(y[0][-1]))
    with Scores(detector).record() as logits_of:
        losses = detector(**batch(detector, True), mode="loss")
    (logits,) = seen
    assert logits.shape[1] > 24  # denoising queries, and then 12 distinct and 12 dense ones
    assert torch.equal(torch.stack(logits_of(2)), logits[:, -24:-12])
    assert losses["loss_amc_max"] > 0


def test_ones_own_detector_takes_a_mixin(config):
    from batchformer_detectors import batch, model_config

    model = model_config("DETR")
    model.update(type=MyDETR2, batchformer={})
    detector = build(model).train()
    losses = detector(**batch(detector, True), mode="loss")
    detector.parse_losses(losses)[0].backward()
    assert all(p.grad.any() for p in parameters(detector, ".batchformer.").values())
