"""IDA in Detectron2 as the classifier of regions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, LazyCall, get_cfg, instantiate
from detectron2.export import TracingAdapter
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_rcnn import example, predictors, shrink

from d2_plugins import add_plugin_config
from d2_plugins.checkpointer import check_weights
from d2_plugins.config import merge_config
from d2_plugins.preflight import check_config
from d2_plugins.roi_heads import IDABoxHead, IDAOutputLayers
from plugin_core import IDAClassifier
from plugin_core.training import RunError


@pytest.fixture(params=["Standard", "Cascade"])
def head_cfg(request: pytest.FixtureRequest, cfg: CfgNode) -> CfgNode:
    """A small detector on an FPN with masks and keypoints, whose regions IDA classifies."""
    shrink(cfg, request.param)
    cfg.MODEL.ROI_BOX_HEAD.NAME = "IDABoxHead"
    return cfg


@pytest.mark.parametrize("part", ["MASK_ON", "KEYPOINT_ON"])
def test_detector_trains_every_parameter_and_predicts(head_cfg, part):
    head_cfg.MODEL[part] = True
    model = build_model(head_cfg)
    batch = [example() for _ in range(2)]
    with EventStorage():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    assert {"loss_mask" if part == "MASK_ON" else "loss_keypoint"} <= set(losses)
    heads = dict(model.roi_heads.named_parameters())
    assert heads and all(p.grad is not None for p in heads.values())
    (output,) = model.eval()([{"image": batch[0]["image"]}])
    assert len(output["instances"]) > 0 and output["instances"].scores.isfinite().all()


def test_a_plain_detectors_weights_load_but_for_the_classifier(head_cfg):
    model = build_model(head_cfg)
    without = head_cfg.clone()
    without.MODEL.ROI_HEADS.NAME = head_cfg.MODEL.ROI_HEADS.NAME.replace("Plugin", "")
    without.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    keys = model.load_state_dict(build_model(without).state_dict(), strict=False)
    assert all(".cls_score." in n for n in keys.missing_keys + keys.unexpected_keys)
    assert {n.rpartition("cls_score.")[2] for n in keys.unexpected_keys} == {"weight", "bias"}


def test_checkpoint_of_other_mixers_is_one_line(head_cfg, tmp_path):
    earlier = head_cfg.clone()
    earlier.MODEL.ROI_BOX_HEAD.IDA.NUM_MIXERS = 0
    path = str(tmp_path / "model.pth")
    torch.save({"model": build_model(earlier).state_dict()}, path)
    with pytest.raises(RunError, match=r"^MODEL\.WEIGHTS: .* 0 mixers .*; build it with 0"):
        check_weights(build_model(head_cfg), path, "MODEL.WEIGHTS", whole=True)
    check_weights(build_model(earlier), path, "MODEL.WEIGHTS", whole=True)


def test_a_config_that_version_0_2_wrote_is_read(tmp_path):
    written = get_cfg()
    add_plugin_config(written)
    del written.MODEL.ROI_BOX_HEAD.IDA["NUM_MIXERS"]
    written.MODEL.ROI_BOX_HEAD.IDA.NUM_FC = 0
    (tmp_path / "config.yaml").write_text(written.dump())
    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, str(tmp_path / "config.yaml"))
    assert cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_MIXERS == 2
    assert "NUM_FC" not in cfg.MODEL.ROI_BOX_HEAD.IDA


def test_a_lazy_config_has_the_same_mixers(head_cfg):
    own = inspect.signature(IDAOutputLayers.__init__).parameters["num_mixers"]
    assert own.default == head_cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_MIXERS == 2


def test_boxes_are_regressed_as_without_ida_and_classes_by_the_pooled_map(head_cfg):
    model = build_model(head_cfg)
    heads = model.roi_heads.box_head
    head = heads[0] if isinstance(heads, nn.ModuleList) else heads
    reference = FastRCNNConvFCHead(
        ShapeSpec(channels=16, height=7, width=7), conv_dims=[], fc_dims=[32, 32]
    )
    reference.load_state_dict(head.state_dict())
    predictor, pooled = predictors(model)[0], torch.randn(5, 16, 7, 7)
    scores, deltas = predictor(head(pooled))
    assert torch.equal(deltas, predictor.bbox_pred(reference(pooled)))
    assert isinstance(predictor.cls_score, IDAClassifier)
    assert torch.equal(scores, predictor.cls_score(pooled)) and scores.shape == (5, 4)


def test_convolutions_of_the_head_come_before_ida(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, head_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 2, 24
    model = build_model(head_cfg)
    heads = model.roi_heads.box_head
    head = heads[0] if isinstance(heads, nn.ModuleList) else heads
    pooled = torch.randn(3, 16, 7, 7)
    _, feature_map = head(pooled)
    assert torch.equal(feature_map, head.conv2(head.conv1(pooled)))
    assert predictors(model)[0].cls_score.in_channels == 24


def test_head_without_linear_layers_regresses_from_the_map(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.NUM_FC, head_cfg.MODEL.ROI_BOX_HEAD.NUM_CONV = 0, 1
    head_cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 8
    model = build_model(head_cfg).eval()
    (output,) = model([{"image": torch.zeros(3, 64, 64)}])
    assert len(output["instances"]) > 0


def test_box_transforms_of_a_cascade_are_kept(head_cfg):
    weights = [p.box2box_transform.weights for p in predictors(build_model(head_cfg))]
    if "Cascade" in head_cfg.MODEL.ROI_HEADS.NAME:
        assert weights == list(head_cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS)
    else:
        assert weights == [head_cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS]


def test_settings_reach_the_classifiers(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS = 2
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.HEAVY = True
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.BETA = 0.5
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.NUM_MIXERS = 1
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.SAMPLE_ORDER = "interleaved"
    head_cfg.MODEL.ROI_BOX_HEAD.IDA.LAST_HEAD_NORM = True
    for predictor in predictors(build_model(head_cfg)):
        classifier = predictor.cls_score
        assert classifier.num_heads == 2 and classifier.out_proj is not None
        assert classifier.beta == 0.5 and len(classifier.mixers) == 1
        assert classifier.sample_order == "interleaved" and classifier.last_head_norm


def test_no_proposal_and_no_object_give_no_detection_and_a_finite_loss(head_cfg):
    model = build_model(head_cfg)
    features = {f"p{i}": torch.randn(1, 16, 8, 8) for i in (4, 5)}
    none = Instances(
        (64, 64), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0)
    )
    (output,), _ = model.roi_heads.eval()(None, features, [none])
    assert len(output) == 0
    target = Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)))
    target.gt_classes = torch.zeros(0, dtype=torch.long)
    with EventStorage():
        _, losses = model.roi_heads.train()(None, features, [none], [target])
    loss = sum(losses.values())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in model.roi_heads.parameters())


def test_plugin_heads_without_ida_are_the_frameworks_own(head_cfg):
    head_cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    assert all(isinstance(p.cls_score, nn.Linear) for p in predictors(build_model(head_cfg)))


@pytest.mark.parametrize("head_cfg", ["Cascade"], indirect=True)
def test_detector_is_traced(head_cfg):
    model = build_model(head_cfg).eval()
    inputs = [{"image": torch.randint(256, (3, 64, 64)).float()}]
    adapter = TracingAdapter(model, inputs, lambda m, x: m.inference(x, do_postprocess=False)[0])
    traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    expected = adapter(*adapter.flattened_inputs)
    for got, want in zip(traced(*adapter.flattened_inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_lazy_config_names_both_parts():
    head = LazyCall(IDABoxHead)(
        input_shape=LazyCall(ShapeSpec)(channels=16, height=7, width=7), conv_dims=[], fc_dims=[8]
    )
    layers = LazyCall(IDAOutputLayers)(
        input_shape=LazyCall(ShapeSpec)(channels=8),
        map_channels=16,
        num_heads=2,
        box2box_transform=None,
        num_classes=3,
    )
    layers.box2box_transform = LazyCall(_Transform)(weights=(10.0, 10.0, 5.0, 5.0))
    scores, deltas = instantiate(layers)(instantiate(head)(torch.randn(4, 16, 7, 7)))
    assert scores.shape == (4, 4) and deltas.shape == (4, 12)


class _Transform:
    def __init__(self, weights: Any) -> None:
        self.weights = weights


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"MODEL.ROI_HEADS.NAME": "StandardROIHeads"},
            "MODEL.ROI_HEADS.NAME: 'StandardROIHeads' takes no MODEL.ROI_BOX_HEAD.NAME "
            "'IDABoxHead'; use 'StandardPluginROIHeads'",
        ),
        ({"MODEL.ROI_HEADS.NAME": "CascadeROIHeads"}, "use 'CascadePluginROIHeads'"),
        ({"MODEL.ROI_HEADS.NAME": "Res5PluginROIHeads"}, "use 'StandardPluginROIHeads'"),
        ({"MODEL.ROI_HEADS.NAME": "RROIHeads"}, "use 'StandardPluginROIHeads'"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, "a RetinaNet has no RoI heads"),
        ({"MODEL.META_ARCHITECTURE": "ProposalNetwork"}, "a ProposalNetwork has no RoI heads"),
        (
            {
                "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
                "MODEL.ROI_BOX_HEAD.IDA.HEAVY": True,
            },
            "MODEL.ROI_BOX_HEAD.IDA is set, but MODEL.ROI_BOX_HEAD.NAME is 'FastRCNNConvFCHead'",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS": 3},
            "MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS: must divide the 16 channels, got 3",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.IDA.BETA": 0.0},
            "MODEL.ROI_BOX_HEAD.IDA.BETA: must be positive, got 0.0",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.IDA.SAMPLE_ORDER": "rows"},
            "MODEL.ROI_BOX_HEAD.IDA.SAMPLE_ORDER: must be 'heads' or 'interleaved', got 'rows'",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 10},
            "MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS: must divide the 10 channels, got 4",
        ),
    ],
)
@pytest.mark.parametrize("head_cfg", ["Standard"], indirect=True)
def test_wrong_setting_of_the_head_is_named(head_cfg, settings, reason):
    head_cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(head_cfg, eval_only=True, resume=False)
    assert reason in str(error.value)


@pytest.mark.parametrize("head_cfg", ["Standard"], indirect=True)
def test_scores_do_not_depend_on_other_regions(head_cfg):
    head = predictors(build_model(head_cfg))[0].cls_score.eval()
    pooled: Tensor = torch.randn(6, 16, 7, 7)
    torch.testing.assert_close(head(pooled)[2:3], head(pooled[2:3]))
