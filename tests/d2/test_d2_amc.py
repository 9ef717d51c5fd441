"""Attention mask consistency in Detectron2: losses by hand, and gradients of the regions alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from small_amc import MAX, MEAN, amc, batch, build, image, losses, small

from d2_plugins import attention_mask_consistency, differentiable_regions
from d2_plugins.attention_mask_consistency import AMCRetinaNet, _reach
from d2_plugins.differentiable_regions import is_row_wise


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
