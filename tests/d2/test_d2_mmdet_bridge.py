"""Detectors of MMDetection as a meta-architecture of Detectron2: the same in both frameworks."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

import numpy as np
from bridged_detectors import (
    SMALL,
    as_detectron2,
    losses_of,
    run_in_mmdetection,
    use,
    with_semantic,
)
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from mmengine.logging import MessageHub


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_those_of_mmdetection(cfg, name, packed):
    inputs = [as_detectron2(sample) for sample in packed]
    if name == "maskformer":
        packed, inputs = with_semantic(packed, inputs)
    model = build_model(use(cfg, name)).train()
    reference = copy.deepcopy(model.detector)
    raw = run_in_mmdetection(reference, packed, training=True)
    total, values = reference.parse_losses(raw)
    losses = losses_of(model, inputs)
    assert set(losses) == {key for key in raw if "loss" in key}
    assert all(torch.equal(losses[key], values[key]) for key in losses)
    assert torch.equal(sum(losses.values()), total) and total > 0
    total.backward()
    sum(losses.values()).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_those_of_mmdetection_on_the_image_of_the_file(cfg, name, packed):
    model = build_model(use(cfg, name)).eval()
    with torch.no_grad():
        expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=False)
        outputs = model([as_detectron2(sample) for sample in packed])
    for output, sample in zip(outputs, expected, strict=True):
        found, theirs = output["instances"], sample.pred_instances
        height, width = sample.ori_shape
        assert found.image_size == (height, width) and len(found) == len(theirs) > 5
        assert torch.equal(found.scores, theirs.scores)
        assert torch.equal(found.pred_classes, theirs.labels)
        limits = torch.tensor([width, height, width, height])
        clipped = theirs.bboxes.clamp(min=torch.zeros(4), max=limits)
        assert torch.equal(found.pred_boxes.tensor, clipped)
        assert found.has("pred_masks") == name.startswith("mask")
        if found.has("pred_masks"):
            assert torch.equal(found.pred_masks, theirs.masks)
            assert found.pred_masks.shape[1:] == (height, width)


def test_what_is_no_loss_is_logged_and_not_added(cfg, packed):
    model = build_model(use(cfg, "mask_rcnn")).train()
    with EventStorage() as storage:
        losses = model([as_detectron2(sample) for sample in packed])
    assert "acc" not in losses and 0 <= storage.latest()["acc"][0] <= 100


def test_detector_is_told_the_iteration(cfg, packed):
    model = build_model(use(cfg, "retinanet")).train()
    with EventStorage(41):
        model([as_detectron2(packed[0])])
    assert MessageHub.get_current_instance().get_info("iter") == 41


def test_order_of_channels_does_not_matter(cfg, packed):
    bgr = [as_detectron2(sample) for sample in packed]
    rgb = [{**one, "image": one["image"][[2, 1, 0]]} for one in bgr]
    model = build_model(use(cfg, "retinanet"))
    cfg.INPUT.FORMAT = "RGB"
    twin = build_model(cfg)
    twin.load_state_dict(model.state_dict())
    expected, losses = losses_of(model, bgr), losses_of(twin, rgb)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert not torch.equal(losses_of(twin, bgr)["loss_cls"], expected["loss_cls"])


def test_detectron2s_mean_and_deviation_are_not_used(cfg, packed):
    inputs = [as_detectron2(sample) for sample in packed]
    model = build_model(use(cfg, "retinanet"))
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    twin = build_model(cfg)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(losses_of(model, inputs)["loss_cls"], losses_of(twin, inputs)["loss_cls"])


def test_images_go_where_the_model_is(cfg):
    model = build_model(use(cfg, "retinanet")).eval()
    model.detector.data_preprocessor._device = torch.device("meta")  # which .to() does not change
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 64, 64)}])
    assert output["instances"].scores.device == model.device == torch.device("cpu")


def test_image_of_which_no_other_size_is_known_keeps_its_own(cfg):
    model = build_model(use(cfg, "retinanet")).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.randint(256, (3, 48, 72), dtype=torch.uint8)}])
    assert output["instances"].image_size == (48, 72)


def test_polygons_become_the_bitmaps_that_detectron2_makes_of_them(cfg):
    corners = np.array([8.0, 8, 24, 8, 24, 20, 8, 20])
    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 24, 20]])))
    target.gt_classes = torch.tensor([0])
    bitmap = torch.zeros(1, 64, 64, dtype=torch.bool)
    bitmap[0, 8:20, 8:24] = True
    losses = []
    model = build_model(use(cfg, "mask_rcnn"))
    for masks in (PolygonMasks([[corners]]), BitMasks(bitmap)):
        target.gt_masks = masks
        image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
        losses.append(losses_of(copy.deepcopy(model), [{"image": image, "instances": target}]))
    assert torch.equal(losses[0]["loss_mask"], losses[1]["loss_mask"])


@pytest.mark.parametrize("name", SMALL)
def test_image_without_objects_trains_beside_one_with_objects(cfg, name, packed):
    empty = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}
    empty["instances"] = annotations_to_instances([], (64, 64))  # as the mapper has it
    empty["sem_seg"] = torch.full((64, 64), 255)
    _, inputs = with_semantic(packed, [as_detectron2(sample) for sample in packed])
    model = build_model(use(cfg, name))
    for batch in ([*inputs, empty], [empty]):
        losses = losses_of(model, batch)
        assert all(loss.isfinite() for loss in losses.values())


def test_losses_are_finite_in_mixed_precision(cfg, packed):
    model = build_model(use(cfg, "retinanet"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, [as_detectron2(sample) for sample in packed])
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
