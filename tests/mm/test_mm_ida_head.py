"""IDA as the classifier of regions in MMDetection's box heads."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

from mm_plugins import IDABBoxHead
from mm_plugins.analysis import load_config
from mm_plugins.weights import check_weights
from plugin_core import IDAClassifier

HEAVY = pytest.mark.parametrize("heavy", [False, True], ids=["light", "heavy"])


# ----------------------------------------------------------------------------------- the head alone

SMALL_HEAD = {"in_channels": 16, "roi_feat_size": 3, "num_classes": 4, "fc_out_channels": 12}


def head(kind: str = "IDABBoxHead", **changed: Any) -> nn.Module:
    return MODELS.build({"type": kind, **SMALL_HEAD, **changed})


def regions(count: int = 6) -> Tensor:
    return torch.randn(count, 16, 3, 3)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """The framework's loss, of which half of the regions are the background."""
    scores, deltas = model(x)
    foreground = len(x) // 2
    labels = torch.arange(len(x)) % model.num_classes
    labels[foreground:] = model.num_classes
    targets, weights = torch.randn(len(x), 4), torch.zeros(len(x), 4)
    weights[:foreground] = 1
    losses = model.loss(
        scores, deltas, torch.rand(len(x), 5), labels, torch.ones(len(x)), targets, weights
    )
    return sum(value for name, value in losses.items() if "loss" in name)


def with_weights_of(plain: nn.Module, model: nn.Module) -> nn.Module:
    """Load a plain head's weights, of which those of its classifier alone are left over."""
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {f"fc_cls.{name}" for name in model.fc_cls.state_dict()}
    assert set(unexpected) == {"fc_cls.weight", "fc_cls.bias"}
    return model


@pytest.mark.parametrize("reg_class_agnostic", [False, True])
def test_boxes_are_those_of_the_plain_head_and_scores_those_of_the_map(reg_class_agnostic):
    plain = head("Shared2FCBBoxHead", reg_class_agnostic=reg_class_agnostic)
    model = with_weights_of(plain, head(reg_class_agnostic=reg_class_agnostic))
    x = regions()
    scores, deltas = model(x)
    assert torch.equal(deltas, plain(x)[1])
    assert scores.shape == (6, 5) and torch.equal(scores, model.fc_cls(x))


def test_classifier_sees_the_map_after_the_shared_and_its_own_convolutions():
    branches = dict.fromkeys(("num_cls_convs", "num_reg_convs", "num_reg_fcs"), 1)
    arguments = {"num_shared_convs": 1, "num_shared_fcs": 0, "conv_out_channels": 8, **branches}
    plain = head("ConvFCBBoxHead", **arguments)
    model = with_weights_of(plain, head(**arguments))
    x = regions()
    scores, deltas = model(x)
    torch.testing.assert_close(deltas, plain(x)[1])
    expected = model.fc_cls(model.cls_convs[0](model.shared_convs[0](x)))
    torch.testing.assert_close(scores, expected)
    assert model.fc_cls.in_channels == 8


def test_shared_layers_leave_the_classifiers_convolutions_their_map():
    model, x = head(num_shared_convs=1, num_cls_convs=2, conv_out_channels=8), regions()
    shared = model.shared_convs[0](x)
    scores, deltas = model(x)
    torch.testing.assert_close(scores, model.fc_cls(model.cls_convs[1](model.cls_convs[0](shared))))
    flat = shared.flatten(1)
    for layer in model.shared_fcs:
        flat = layer(flat).relu()
    torch.testing.assert_close(deltas, model.fc_reg(flat))


@HEAVY
def test_initialization_leaves_the_classifier_as_it_is_and_the_rest_as_in_the_plain_head(heavy):
    model = head(heavy=heavy)
    assert (model.fc_cls.out_proj is not None) == heavy
    drawn = copy.deepcopy(model.fc_cls.state_dict())
    model.init_weights()
    torch.testing.assert_close(model.fc_cls.state_dict(), drawn, rtol=0, atol=0)
    norms = [conv.weight.flatten(1).norm(dim=1) for conv in model.fc_cls.head]
    assert torch.stack(norms).min() > 4 * model.fc_cls.beta  # far from where the scores break down
    assert model.fc_reg.weight.std() < 0.002
    assert not any(layer.bias.any() for layer in model.shared_fcs)


def test_settings_reach_the_classifier():
    settings = {"num_heads": 2, "beta": 0.5, "sample_order": "interleaved", "last_head_norm": True}
    classifier = head(**settings).fc_cls
    assert settings == {name: getattr(classifier, name) for name in settings}


def test_defaults_of_the_settings_are_the_classifiers_own():
    own, of_head = (inspect.signature(k).parameters for k in (IDAClassifier, IDABBoxHead))
    assert [*own][-1] == "num_mixers"  # which a region's classifier has and an image's has not
    for name in [*own][2:-1]:
        assert of_head[name].default == own[name].default
    assert of_head["num_mixers"].default == 2  # as in Detectron2


def test_checkpoint_of_other_mixers_is_one_line(tmp_path):
    path = str(tmp_path / "model.pth")
    torch.save({"state_dict": head(num_mixers=0).state_dict()}, path)
    with pytest.raises(ValueError, match=r"^load_from: .* 0 mixers .*; build it with 0"):
        check_weights(head(), path, "load_from", whole=False)
    assert check_weights(head(num_mixers=0), path, "load_from", whole=True) == []


@HEAVY
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reg_class_agnostic": True, "num_shared_convs": 1, "num_cls_convs": 1},
        {"num_shared_fcs": 0, "num_cls_convs": 1, "num_reg_convs": 1, "num_reg_fcs": 1},
    ],
    ids=["default", "shared convs", "branches"],
)
def test_every_parameter_gets_a_gradient(heavy, arguments):
    model = head(heavy=heavy, **arguments)
    loss(model, regions()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_nothing_is_built_that_a_plain_classifier_would_need():
    with_linear = {name for name, m in head().named_modules() if isinstance(m, nn.Linear)}
    assert "fc_cls" not in with_linear and {"shared_fcs.0", "fc_reg"} <= with_linear
    assert head().with_cls


@HEAVY
def test_no_regions_give_no_scores(heavy):
    model = head(heavy=heavy)
    scores, deltas = model(regions(0))
    assert scores.shape == (0, 5) and deltas.shape == (0, 16)
    (scores.sum() + deltas.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_mixed_precision_gives_a_finite_loss():
    model = head()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, regions())
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_loss_with_channels_of_its_own_gets_them():
    model = head(loss_cls={"type": "SeesawLoss", "num_classes": 4, "p": 0.8, "q": 2.0})
    assert model(regions())[0].shape == (6, 6)  # two for the objectness
    loss(model, regions()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_mixers": -1}, "num_mixers must be 0 or a positive integer, got -1"),
        ({"num_cls_fcs": 2}, "num_cls_fcs must be 0, .* got 2"),
        ({"with_avg_pool": True}, "with_avg_pool must be False, .* got True"),
        ({"with_cls": False}, "with_cls must be True, .* got False"),
        ({"with_reg": False}, "with_reg must be True, .* got False"),
        ({"cls_predictor_cfg": {"type": "NormedLinear"}}, "cls_predictor_cfg must be .*Linear"),
        ({"num_reg_convs": 1}, "num_shared_fcs must be 0 where num_reg_convs is not, .* got 2"),
        ({"num_heads": 3}, "num_heads must divide the 16 channels, got 3"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"beta": -1.0}, "beta must be positive, got -1.0"),
        ({"sample_order": "rows"}, "sample_order must be 'heads' or 'interleaved', got 'rows'"),
        ({"last_head_norm": 1}, "last_head_norm must be True or False, got 1"),
    ],
)
def test_argument_that_cannot_work_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        IDABBoxHead(**SMALL_HEAD, **argument)


@pytest.mark.parametrize("name", ["with_avg_pool", "with_cls", "cls_predictor_cfg"])
def test_argument_that_says_what_holds_anyway_is_accepted(name):
    value = {"with_avg_pool": False, "with_cls": True}.get(name, {"type": "Linear"})
    assert head(**{name: value})(regions())[0].shape == (6, 5)


# ------------------------------------------------------------------------- the head in its RoI head


def roi_head(kind: str) -> nn.Module:
    """A RoI head of MMDetection's own config, narrow, with IDA."""
    base = {
        "StandardRoIHead": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
        "CascadeRoIHead": "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    }[kind]
    model = load_config(base).model
    cfg = copy.deepcopy(model.roi_head)
    assert cfg.type == kind
    cfg.bbox_roi_extractor.out_channels = 16
    small = {"type": "IDABBoxHead", **SMALL_HEAD, "roi_feat_size": 7}
    for single in cfg.bbox_head if isinstance(cfg.bbox_head, list) else [cfg.bbox_head]:
        single.update(small)
    cfg.update(train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn | {"score_thr": 0.0})
    return MODELS.build(ConfigDict(cfg))


def predictions(model: nn.Module, *counts: int) -> list[InstanceData]:
    """What it detects in images of 64 pixels with so many proposals."""
    model.eval()
    features = tuple(torch.randn(len(counts), 16, 64 // s, 64 // s) for s in (4, 8, 16, 32))
    shape = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)}
    samples = [DetDataSample(metainfo=shape) for _ in counts]
    corners = [torch.rand(count, 2) * 30 for count in counts]
    proposals = [InstanceData(bboxes=torch.cat([c, c + 20], dim=1)) for c in corners]
    with torch.no_grad():
        return model.predict(features, proposals, samples)


@pytest.mark.parametrize("kind", ["StandardRoIHead", "CascadeRoIHead"])
def test_roi_head_predicts_with_and_without_proposals(kind):
    model = roi_head(kind)
    for counts in ((3, 0), (0, 0), (4,)):
        for found, count in zip(predictions(model, *counts), counts, strict=True):
            assert bool(len(found)) == bool(count)
            assert ((0 <= found.scores) & (found.scores <= 1)).all()
            assert torch.isfinite(found.bboxes).all()
