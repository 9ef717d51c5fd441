"""Attention mask consistency as an auxiliary loss of Detectron2's detectors."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.layers import DeformConv
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    build_model,
)
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage
from small_rcnn import shrink

from d2_plugins import attention_mask_consistency, differentiable_regions
from d2_plugins.attention_mask_consistency import (
    AMCGeneralizedRCNN,
    AMCRetinaNet,
    _reach,
    annotated_classes,
)
from d2_plugins.datasets import register_coco
from d2_plugins.differentiable_regions import is_row_wise
from d2_plugins.preflight import check_config

MEAN, MAX = "loss_amc_mean", "loss_amc_max"
PLAIN = {"AMCGeneralizedRCNN": "GeneralizedRCNN", "AMCRetinaNet": "RetinaNet"}
KINDS = pytest.mark.parametrize("kind", ["Standard", "Cascade", "C4", "RetinaNet"])
SIZE = (96, 128)  # height and width of the images

# -------------------------------------------------------------------------------------- what is run


def small(cfg: CfgNode, kind: str, **settings: Any) -> CfgNode:
    """Make ``cfg`` that of a small detector with AMC, of all classes and always with a loss."""
    shrink(cfg, "Cascade" if kind == "Cascade" else "Standard")
    cfg.MODEL.META_ARCHITECTURE = "AMCGeneralizedRCNN"
    if kind == "C4":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
        cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64]]
    elif kind == "RetinaNet":
        cfg.MODEL.META_ARCHITECTURE = "AMCRetinaNet"
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
        cfg.MODEL.RETINANET.IN_FEATURES = ["p4", "p5", "p6", "p7"]
        cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    always = {"MEAN_MARGIN": 1.0, "MAX_MARGIN": 1.0, "MEAN_WEIGHT": 1.0, "MAX_WEIGHT": 1.0}
    settings = {"CLASSES": 0, **always, **settings}
    for key, value in settings.items():
        cfg.MODEL.AMC[key] = value
    return cfg


def build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    return build_model(cfg).train()


def plain_of(cfg: CfgNode) -> nn.Module:
    """Detectron2's own detector, with the same weights."""
    plain = cfg.clone()
    plain.MODEL.META_ARCHITECTURE = PLAIN[cfg.MODEL.META_ARCHITECTURE]
    return build(plain)


def image(boxes: list[list[float]], classes: list[int], size: tuple[int, int] = SIZE) -> dict:
    """An image with boxes, and proposals for a detector that wants them."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    proposals = Instances(size)
    corners = torch.rand(12, 2) * 50
    proposals.proposal_boxes = Boxes(torch.cat((corners, corners + 20 + torch.rand(12, 2) * 20), 1))
    proposals.objectness_logits = torch.zeros(12)
    pixels = torch.randint(256, (3, *size)).float()
    return {"image": pixels, "instances": instances, "proposals": proposals}


def batch() -> list[dict]:
    """Three classes in two images, of which the second is padded."""
    first = image([[4, 4, 60, 56], [70, 30, 120, 90], [66, 2, 100, 40]], [0, 2, 2])
    return [first, image([[10, 10, 90, 50]], [1], (64, 100))]


def losses(model: nn.Module, images: list[dict], step: int = 0) -> dict[str, Tensor]:
    """Losses of a step that draws the same regions for every model."""
    torch.manual_seed(3)
    with EventStorage(step):
        return model(images)


def amc(model: nn.Module, images: list[dict]) -> Tensor:
    found = losses(model, images)
    return found[MEAN] + found[MAX]


# ------------------------------------------------------------------------------------------ by hand


def by_hand(model: Any, images: list[dict]) -> tuple[Tensor, Tensor]:
    """Both losses without anything of AMC, from first derivatives of the detector's own scores."""
    kept: list[Tensor] = []
    module = model.backbone.bottom_up.res4
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
    torch.manual_seed(3)
    pixels = model.preprocess_image(images).tensor
    features = model.backbone(pixels)
    handle.remove()
    with EventStorage():
        logits = logits_by_hand(model, images, features)
    (activations,) = kept
    inside, outside, gaps = [], [], []
    for i, entry in enumerate(images):
        instances = entry["instances"]
        for label in sorted(set(instances.gt_classes.tolist())):
            score = max(part[i].select(1, label).max() for part in logits)
            (gradient,) = torch.autograd.grad(score, activations, retain_graph=True)
            assert all(not gradient[j].any() for j in range(len(images)) if j != i)
            gradient = gradient[i] / gradient[i].abs().max()
            heat = (activations[i] * gradient.relu()).mean(0).relu()
            heat = heat - heat.min()
            heat = heat / (heat.max() + 1e-7)
            size = pixels.shape[2:]
            heat = nn.functional.interpolate(heat[None, None], size, mode="bilinear")[0, 0]
            boxes = instances.gt_boxes.tensor[instances.gt_classes == label].tolist()
            within = cells_of(boxes, tuple(pixels.shape[2:]), tuple(heat.shape))
            assert within.any() and not within.all()
            inside.append(heat[within])
            outside.append(heat[~within])
            gaps.append(heat[~within].max() - heat[within].max() + 1)
    mean_loss = torch.cat(outside).mean() - torch.cat(inside).mean() + 1
    return mean_loss.relu(), torch.stack(gaps).relu().mean()


def logits_by_hand(model: Any, images: list[dict], features: dict[str, Tensor]) -> list[Any]:
    """Parts of the logits, each a sequence over the images, the classes second."""
    if isinstance(model, AMCRetinaNet):
        levels, _ = model.head([features[name] for name in model.head_in_features])
        return [x.reshape(len(images), -1, 3, *x.shape[2:]) for x in levels]
    heads = model.roi_heads
    proposals = [entry["proposals"] for entry in images]
    proposals = heads.label_and_sample_proposals(proposals, [x["instances"] for x in images])
    maps = [features[name] for name in heads.box_in_features]
    pooled = heads.box_pooler(maps, [x.proposal_boxes for x in proposals])
    scores, _ = heads.box_predictor(heads.box_head(pooled))
    return [scores.split([len(x) for x in proposals])]


def cells_of(
    boxes: list[list[float]], input_size: tuple[int, ...], size: tuple[int, ...]
) -> Tensor:
    """Cells of a map over the input whose centre is in a box."""
    within = torch.zeros(size, dtype=torch.bool)
    for row in range(size[0]):
        for column in range(size[1]):
            y = (row + 0.5) * input_size[0] / size[0]
            x = (column + 0.5) * input_size[1] / size[1]
            within[row, column] = any(x1 <= x < x2 and y1 <= y < y2 for x1, y1, x2, y2 in boxes)
    return within


@pytest.fixture(params=["Standard", "RetinaNet"])
def exact(request: pytest.FixtureRequest, cfg: CfgNode) -> Any:
    """A detector in float64, the regions of an R-CNN given, whatever its weights are.

    An image's features depend on no other image.
    """
    small(cfg, request.param, ACTIVATION="backbone.bottom_up.res4")
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    return build(cfg).double()


def test_losses_are_those_computed_by_hand(exact):
    images = [*batch(), image([], [])]
    found = losses(exact, images)
    mean_loss, max_loss = by_hand(exact, images)
    assert mean_loss > 0.1 and max_loss > 0.1
    torch.testing.assert_close(found[MEAN].double(), mean_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[MAX].double(), max_loss, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_losses_computed_by_hand(exact):
    """By finite differences of losses of which only first derivatives were taken."""
    images = batch()
    amc(exact, images).backward()
    head = "head.cls_subnet.0" if isinstance(exact, AMCRetinaNet) else "roi_heads.box_head.fc1"
    stages = "backbone.bottom_up"
    for name in (f"{stages}.res4.1.conv2", f"{stages}.res5.0.conv1", head):
        parameter = exact.get_parameter(f"{name}.weight")
        gradient = parameter.grad
        assert gradient is not None and gradient.any(), name
        start, step = parameter.detach().clone(), 1e-6 * gradient / gradient.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(start + sign * step)
            ends.append(sum(by_hand(exact, images)).detach())
        with torch.no_grad():
            parameter.copy_(start)
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(slope, gradient.norm(), rtol=2e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["Standard", "Cascade", "C4"])
def test_only_the_regions_of_the_best_scores_are_differentiated_twice(cfg, kind, monkeypatch):
    small(cfg, kind).MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"  # also in float64
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    model, images = build(cfg).double(), batch()
    pooled: list[int] = []
    twice = differentiable_regions.TwiceDifferentiablePooler

    def forward(self, maps, boxes):
        pooled.append(sum(map(len, boxes)))
        return pool(self, maps, boxes)

    pool = twice.forward
    monkeypatch.setattr(twice, "forward", forward)
    found = []
    for regions in ("of the best scores", "all"):
        model.zero_grad()
        value = amc(model, images)
        value.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((value.detach(), {n: g for n, g in gradients.items() if g.any()}))
        assert pooled[0] == 3 if regions == "of the best scores" else pooled[0] > 12
        pooled.clear()
        monkeypatch.setattr(differentiable_regions, "_ROW_WISE", ())
    (value, gradients), (expected, all_gradients) = found
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == all_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(all_gradients[name].abs().max())
        assert (gradient - all_gradients[name]).abs().max() <= 1e-6 * scale, name


def test_heads_that_mix_regions_are_differentiated_as_a_whole(cfg):
    small(cfg, "Standard")
    assert is_row_wise(build(cfg).roi_heads)
    cfg.MODEL.ROI_HEADS.NAME = "StandardPluginROIHeads"
    assert is_row_wise(build(cfg).roi_heads)
    cfg.MODEL.ROI_BOX_HEAD.BATCHFORMER.ENABLED = True
    model = build(cfg)
    assert not is_row_wise(model.roi_heads)
    amc(model, batch()).backward()
    assert model.roi_heads.box_head.fc1.weight.grad.any()


@pytest.mark.parametrize("norm", ["", "FrozenBN"])
def test_only_what_a_retinanets_best_position_sees_is_differentiated_twice(cfg, norm, monkeypatch):
    small(cfg, "RetinaNet").MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.RETINANET.NUM_CONVS, cfg.MODEL.RETINANET.NORM = 2, norm
    model, images = build(cfg).double(), batch()
    assert _reach(model.head) == (None if norm else 3)
    seen: list[tuple[int, ...]] = []
    model.head.cls_score.register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape))
    found = []
    for kind in (_reach, lambda head: None):
        monkeypatch.setattr(attention_mask_consistency, "_reach", kind)
        model.zero_grad()
        value = amc(model, images)
        value.backward()
        named = model.named_parameters()
        found.append((value.detach(), {n: p.grad for n, p in named if p.grad is not None}))
    again = seen[4:-4]  # besides the levels
    assert len(again) == (0 if norm else 3) and all(max(x[2:]) <= 7 for x in again)
    (value, gradients), (expected, all_gradients) = found
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in all_gradients.items():
        assert (gradient - gradients[name]).abs().max() <= 1e-6 * gradient.abs().max(), name


# --------------------------------------------------------------------------------- what is trained


@KINDS
def test_losses_alone_train_the_backbone_and_the_classifier(cfg, kind):
    model = build(small(cfg, kind))
    amc(model, batch()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    stages = "backbone" if kind == "C4" else "backbone.bottom_up"
    assert {f"{stages}.stem.conv1.weight", f"{stages}.res4.0.conv1.weight"} <= reached
    assert HEADS[kind] <= reached
    boxes = ("bbox_pred", "bbox_subnet", "proposal_generator", "head.0", "head.1", "predictor.1")
    assert not [name for name in reached if any(part in name for part in boxes)]


HEADS = {
    "Standard": {"roi_heads.box_head.fc1.weight", "roi_heads.box_predictor.cls_score.weight"},
    "Cascade": {"roi_heads.box_head.2.fc1.weight", "roi_heads.box_predictor.2.cls_score.weight"},
    "C4": {"roi_heads.res5.0.conv1.weight", "roi_heads.box_predictor.cls_score.weight"},
    "RetinaNet": {"head.cls_subnet.0.weight", "head.cls_score.weight"},
}


@KINDS
def test_training_by_the_other_losses_is_the_plain_detectors(cfg, kind):
    small(cfg, kind)
    cfg.MODEL.MASK_ON = kind != "RetinaNet"
    model, plain = build(cfg), plain_of(cfg)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    images = batch()
    for entry in images:
        masks = torch.zeros(len(entry["instances"]), *entry["instances"].image_size)
        entry["instances"].gt_masks = BitMasks(masks > 0)
    found, expected = losses(model, images), losses(plain, images)
    assert set(found) == {*expected, MEAN, MAX}
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, msg=name)
    sum(found[name] for name in expected).backward()
    sum(expected.values()).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=f"{name}"
        )


@KINDS
def test_evaluation_is_the_plain_detectors(cfg, kind, monkeypatch):
    small(cfg, kind)
    model, plain = build(cfg).eval(), plain_of(cfg).eval()
    plain.load_state_dict(model.state_dict())
    for name in ("record_calls", "GradientHeatmap"):
        monkeypatch.setattr(attention_mask_consistency, name, None)
    monkeypatch.setattr(differentiable_regions, "linear_operator", None)
    images = batch()
    for got, expected in zip(model(images), plain(images), strict=True):
        got, expected = got["instances"], expected["instances"]
        assert len(got) > 0 and torch.equal(got.scores, expected.scores)
        assert torch.equal(got.pred_boxes.tensor, expected.pred_boxes.tensor)


@KINDS
def test_mixed_precision_trains(cfg, kind):
    model = build(small(cfg, kind))
    exact = amc(model, batch())
    with torch.autocast("cpu", torch.bfloat16):
        loss = amc(model, batch())
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss > 0 and all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    assert loss.dtype == torch.float32 and exact.dtype == torch.float32


@pytest.mark.usefixtures("whole_draws")
def test_steps_lower_the_losses(cfg):
    small(cfg, "RetinaNet")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model, images = build(cfg), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    record = []
    for _ in range(6):
        loss = amc(model, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record.append(loss.item())
    assert record[-1] < record[0] - 0.1


def test_frozen_backbone_still_teaches_what_follows(cfg):
    small(cfg, "RetinaNet")
    cfg.MODEL.BACKBONE.FREEZE_AT = 5
    model = build(cfg)
    amc(model, batch()).backward()
    assert model.backbone.fpn_lateral5.weight.grad.any()
    assert all(p.grad is None for p in model.backbone.bottom_up.parameters())


# ------------------------------------------------------------------------------- what has a part


def test_batch_without_boxes_has_losses_of_zero(cfg):
    found = losses(build(small(cfg, "Standard")), [image([], []), image([], [])])
    assert found[MEAN] == 0 and found[MAX] == 0
    assert all(loss.isfinite() for loss in found.values())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What AMC warns of, whatever other tests have set up of its loggers."""
    logger = logging.getLogger("d2_plugins.attention_mask_consistency")
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    disabled, level = logger.disabled, logger.level
    logger.disabled = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)
    logger.disabled = disabled
    logger.setLevel(level)


def test_box_outside_of_its_image_is_left_out_and_warned_of_once(warned, monkeypatch):
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", type(detectron2_logger._LOG_COUNTER)())
    boxes = [[10, 10, 20, 20], [130, 5, 150, 20], [-30, 0, 0, 40], [120, 80, 140, 99]]
    entry = {**image(boxes, [0, 0, 1, 2]), "file_name": "photo.jpg"}
    found = [annotated_classes(entry, torch.device("cpu"), "") for _ in range(2)][0]
    assert [(label, boxes.tolist()) for label, boxes in found] == [
        (0, [[10, 10, 20, 20]]),
        (2, [[120, 80, 128, 96]]),  # cut off where the padding begins
    ]
    (text,) = warned
    assert "[130.0, 5.0, 150.0, 20.0] in photo.jpg (128x96 pixels)" in text


def test_image_whose_boxes_are_all_outside_has_no_part(cfg):
    model = build(small(cfg, "RetinaNet"))
    images = [batch()[0], image([[200, 200, 220, 220]], [1])]
    found = losses(model, images)
    images[1]["instances"] = image([], [])["instances"]
    expected = losses(model, images)
    assert torch.equal(found[MEAN], expected[MEAN]) and torch.equal(found[MAX], expected[MAX])


def test_classes_of_an_image_are_drawn_at_random(cfg):
    """RetinaNet, which draws nothing else."""
    model, images = build(small(cfg, "RetinaNet")), batch()[:1]
    both = losses(model, images)[MAX]
    model.amc.phrases = 1
    drawn = set()
    for seed in range(12):
        torch.manual_seed(seed)
        with EventStorage():
            drawn.add(round(model(images)[MAX].item(), 5))
    assert len(drawn) == 2
    assert sum(drawn) / 2 == pytest.approx(both.item(), abs=1e-4)


def test_losses_are_taken_in_every_nth_step(cfg):
    model, images = build(small(cfg, "RetinaNet", EVERY=3)), batch()
    due = [MEAN in losses(model, images, step) for step in (0, 1, 2, 3, 30, 31)]
    assert due == [True, False, False, True, True, False]
    assert [model._is_due() for _ in range(5)] == [True, False, False, True, False]  # no storage


def test_without_gradients_there_are_the_plain_losses_only(cfg):
    model = build(small(cfg, "Standard"))
    with torch.no_grad():
        assert MEAN not in losses(model, batch())


def test_weights_are_factors(cfg):
    images = batch()
    single = losses(build(small(cfg, "Standard")), images)
    weighted = losses(build(small(cfg, "Standard", MEAN_WEIGHT=0.5, MAX_WEIGHT=3.0)), images)
    torch.testing.assert_close(weighted[MEAN], single[MEAN] * 0.5)
    torch.testing.assert_close(weighted[MAX], single[MAX] * 3)


# --------------------------------------------------------------------------- the model as an object


@KINDS
def test_hooks_are_gone_after_a_forward_also_a_failed_one(cfg, kind):
    model = build(small(cfg, kind))
    amc(model, batch())
    assert not [m for m in model.modules() if m._forward_hooks]
    broken = batch()
    del broken[1]["instances"]
    with pytest.raises(KeyError):
        losses(model, broken)
    assert not [m for m in model.modules() if m._forward_hooks]


@KINDS
def test_copies_train_alike(cfg, kind):
    model, images = build(small(cfg, kind)), batch()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = amc(model, images)
    assert all(torch.equal(amc(twin, images), expected) for twin in twins)


def test_detector_is_built_from_arguments_too(cfg):
    arguments = GeneralizedRCNN.from_config(small(cfg, "Standard"))
    model = AMCGeneralizedRCNN(**arguments, amc={"every": 4, "activation": "backbone"})
    assert model.amc.every == 4 and model.amc.phrases == 1
    assert MEAN in losses(model.train(), batch())
    assert AMCGeneralizedRCNN(**arguments).amc_activation == "backbone.bottom_up.res5"


# -------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("Standard", "backbone.bottom_up.res5"),
        ("Cascade", "backbone.bottom_up.res5"),
        ("C4", "backbone.res4"),
        ("RetinaNet", "backbone.bottom_up.res5"),
    ],
)
def test_activation_is_the_last_stage_where_none_is_named(cfg, kind, module):
    assert build(small(cfg, kind)).amc_activation == module


@pytest.mark.parametrize("kind", ["Standard", "RetinaNet"])
def test_a_level_is_the_feature_map_of_its_name(cfg, kind):
    images = batch()
    level = build(small(cfg, kind, ACTIVATION="backbone", LEVELS=("p4",)))
    module = build(small(cfg, kind, ACTIVATION="backbone.fpn_output4", LEVELS=()))
    assert torch.equal(amc(level, images), amc(module, images))
    level.amc_levels = ()  # all
    assert amc(level, images) > 0 and not torch.equal(amc(level, images), amc(module, images))


def test_levels_may_be_the_calls_of_one_module(cfg):
    model = build(small(cfg, "RetinaNet", ACTIVATION="head.cls_subnet"))
    amc(model, batch()).backward()
    assert model.head.cls_subnet[0].weight.grad.any()


@pytest.mark.parametrize(
    ("kind", "module", "reason"),
    [
        ("RetinaNet", "head.bbox_pred", "the score does not depend on the activations"),
        ("Standard", "roi_heads.box_pooler", "it puts out (16, 16, 7, 7), expected a feature map"),
        ("Standard", "roi_heads.box_predictor", "it puts out tuple, expected a feature map"),
        ("Cascade", "roi_heads.box_head", "it is not called in training"),
    ],
)
def test_activation_that_is_not_before_the_scores_is_named(cfg, kind, module, reason):
    model = build(small(cfg, kind, ACTIVATION=module))
    with pytest.raises(ValueError) as error:
        losses(model, batch())
    assert str(error.value).startswith(f"MODEL.AMC.ACTIVATION {module!r}: {reason}")


class Deformable(DeformConv):
    """Stands for a deformable convolution, which needs a GPU."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_deformable_convolution_after_the_activation_is_named(cfg):
    model = build(small(cfg, "Standard", ACTIVATION="backbone.bottom_up.res4"))
    model.backbone.bottom_up.res5.insert(0, Deformable())
    with pytest.raises(ValueError, match=r"res5\.0 comes after it, a deformable convolution"):
        losses(model, batch())
    model.amc_activation = "backbone.bottom_up.res5"
    assert MEAN in losses(model, batch())


# ----------------------------------------------------------------------------------- wrong settings


@ROI_HEADS_REGISTRY.register()
class HeadsWithoutAPooler(StandardROIHeads):
    """Stands for RoI heads of the user's own."""

    def __init__(self, cfg: CfgNode, input_shape: Any) -> None:
        super().__init__(cfg, input_shape)
        del self.box_pooler


@META_ARCH_REGISTRY.register()
class OwnAMCDetector(AMCGeneralizedRCNN):
    """Stands for a detector of the user's own."""


@pytest.mark.parametrize("build_it", [False, True], ids=["preflight", "construction"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"MODEL.AMC.ACTIVATION": "backbone.bottom_up.res6"},
            "MODEL.AMC.ACTIVATION: the detector has no module 'backbone.bottom_up.res6'; did you "
            "mean 'backbone.bottom_up.res5'",
        ),
        (
            {"MODEL.AMC.ACTIVATION": "backbone", "MODEL.AMC.LEVELS": ("p5", "p9")},
            "MODEL.AMC.LEVELS: 'p9' is no feature map of 'backbone', which has p4, p5, p6",
        ),
        ({"MODEL.AMC.MEAN_MARGIN": 1.5}, "MODEL.AMC.MEAN_MARGIN: must be from 0 to 1"),
        ({"MODEL.AMC.MAX_MARGIN": -0.1}, "MODEL.AMC.MAX_MARGIN: must be from 0 to 1"),
        ({"MODEL.AMC.MEAN_WEIGHT": -1.0}, "MODEL.AMC.MEAN_WEIGHT: must be at least 0"),
        ({"MODEL.AMC.MAX_WEIGHT": -1.0}, "MODEL.AMC.MAX_WEIGHT: must be at least 0"),
        ({"MODEL.AMC.EVERY": 0}, "MODEL.AMC.EVERY: must be a number of steps of at least 1"),
        ({"MODEL.AMC.CLASSES": -1}, "MODEL.AMC.CLASSES: must be how many classes of an image"),
        ({"MODEL.AMC.BOXES": "one"}, "MODEL.AMC.BOXES: must be 'all' or 'random', got 'one'"),
        ({"MODEL.AMC.RESOLUTION": "mask"}, "MODEL.AMC.RESOLUTION: must be 'auto', 'image'"),
        (
            {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"},
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE: AMC differentiates twice through RoIAlign, not "
            "through RoIPool; use 'ROIAlignV2'",
        ),
    ],
    ids=lambda value: str(list(value)[-1]) if isinstance(value, dict) else "",
)
def test_wrong_setting_is_named(cfg, settings, reason, build_it):
    small(cfg, "Standard")
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        build(cfg) if build_it else check_config(cfg, eval_only=True, resume=False)
    assert str(error.value).startswith(reason)


def test_levels_of_a_single_feature_map_are_named(cfg):
    model = build(small(cfg, "Standard", LEVELS=("p4",)))
    with pytest.raises(ValueError, match=r"MODEL.AMC.LEVELS: 'p4' .* which has only one, without"):
        losses(model, batch())


def test_roi_heads_of_another_make_are_named(cfg):
    small(cfg, "Standard")
    cfg.MODEL.ROI_HEADS.NAME = "HeadsWithoutAPooler"
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NAME: HeadsWithoutAPooler has no box_po"):
        build(cfg)


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("GeneralizedRCNN", "use 'AMCGeneralizedRCNN'"),
        ("RetinaNet", "use 'AMCRetinaNet'"),
        (
            "MMDetDetector",
            "a detector of MMDetection has AMC in its own config, MODEL.MMDET.CONFIG",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(cfg, architecture, hint):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.AMC.EVERY = architecture, 2
    with pytest.raises(ValueError) as error:
        check_config(cfg, eval_only=False, resume=False)
    assert str(error.value) == (
        f"MODEL.AMC is set, but MODEL.META_ARCHITECTURE is {architecture!r}, which does not read "
        f"it; {hint}"
    )


@KINDS
def test_good_settings_pass(cfg, kind, registered, tiny_coco):
    small(cfg, kind, EVERY=2)
    register_coco("amc_train", *tiny_coco)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS = ("amc_train",), (), ""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 1
    before = cfg.clone()
    check_config(cfg, eval_only=False, resume=False)
    assert cfg == before
    if kind == "Standard":
        cfg.MODEL.META_ARCHITECTURE = "OwnAMCDetector"
        check_config(cfg, eval_only=False, resume=False)


def test_attention_in_the_res5_of_a_c4_is_known(cfg):
    small(cfg, "C4")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.RESNETS.PLUGINS = [{"NAME": "triplet_attention", "STAGES": ["res4", "res5"]}]
    amc(build(cfg), batch()).backward()


def test_retinanet_has_no_roi_heads_to_plug_into(cfg):
    small(cfg, "RetinaNet")
    cfg.MODEL.ROI_BOX_HEAD.NAME = "IDABoxHead"
    with pytest.raises(ValueError, match="an AMCRetinaNet has no RoI heads"):
        check_config(cfg, eval_only=False, resume=False)
