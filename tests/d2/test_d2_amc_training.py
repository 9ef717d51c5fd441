"""Attention mask consistency in Detectron2: what it trains, and what has a part in it."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BitMasks
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.events import EventStorage
from small_amc import KINDS, MAX, MEAN, amc, batch, build, image, losses, plain_of, small

from d2_plugins import attention_mask_consistency, differentiable_regions
from d2_plugins.attention_mask_consistency import AMCGeneralizedRCNN, annotated_classes

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
