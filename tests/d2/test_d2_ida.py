"""IDA in Detectron2: in a ResNet's blocks, and as the classifier of regions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.export import TracingAdapter
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from small_rcnn import example, predictors, shrink

from d2_plugins.backbones import build_resnet_with_plugins
from d2_plugins.block_plugins import check_resnet_plugins
from d2_plugins.preflight import check_config
from d2_plugins.roi_heads import IDABoxHead, IDAOutputLayers
from plugin_core import IDABlock, IDAClassifier, TripletAttention

# ------------------------------------------------------------------------------------- in a ResNet


@pytest.fixture
def ida_cfg(resnet_cfg: CfgNode) -> CfgNode:
    """A narrow ResNet-50 with IDA, and nothing else, in its last two stages."""
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ()
    resnet_cfg.MODEL.RESNETS.IDA.STAGES = ("res4", "res5")
    resnet_cfg.MODEL.RESNETS.IDA.NUM_QUERIES = 5
    return resnet_cfg


def plain(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.IDA.STAGES = cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ()
    return cfg


def test_every_block_of_the_named_stages_and_no_other_has_ida(ida_cfg):
    backbone = build_backbone(ida_cfg)
    names = [n for n, m in backbone.named_modules() if isinstance(m, IDABlock)]
    assert names == [f"res4.{i}.ida" for i in range(6)] + [f"res5.{i}.ida" for i in range(3)]


def test_settings_reach_the_block(ida_cfg):
    node = ida_cfg.MODEL.RESNETS.IDA
    node.NUM_QUERIES, node.NUM_HEADS, node.HEAVY = 7, 2, True
    block = build_backbone(ida_cfg).res4[0].ida
    assert (block.in_channels, block.num_classes, block.num_heads) == (64, 7, 2)
    assert block.out_proj is not None


@pytest.mark.parametrize("training", [False, True])
def test_plain_weights_give_the_plain_features_exactly(ida_cfg, training, tmp_path):
    reference = build_backbone(plain(ida_cfg)).train(training)
    with_ida = build_backbone(ida_cfg).train(training)
    torch.save({"model": reference.state_dict()}, tmp_path / "plain.pth")
    DetectionCheckpointer(with_ida).load(str(tmp_path / "plain.pth"))
    x = torch.randn(2, 3, 64, 64)
    expected, features = reference(x.clone()), with_ida(x)
    assert all(torch.equal(features[name], expected[name]) for name in expected)
    missing = with_ida.load_state_dict(reference.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all(".ida." in n for n in missing.missing_keys)


def test_block_acts_on_the_residual_branch_before_the_shortcut(ida_cfg):
    block = build_backbone(ida_cfg).res4[1].eval()
    nn.init.ones_(block.ida.gamma)
    x = torch.randn(2, 64, 5, 6)
    branch = block.conv1(x)
    branch = F.conv2d(F.relu_(block.conv2(F.relu_(branch))), block.conv3.weight)
    branch = block.ida(block.conv3.norm(branch))
    torch.testing.assert_close(block(x), F.relu(branch + x))


@pytest.mark.parametrize(
    "order", [("TRIPLET_ATTENTION", "IDA"), ("IDA", "TRIPLET_ATTENTION"), ("IDA",), ()]
)
def test_both_attentions_are_applied_in_the_order_of_one_key(ida_cfg, order):
    ida_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res5",)
    ida_cfg.MODEL.RESNETS.PLUGIN_ORDER = order
    backbone = build_backbone(ida_cfg)
    seen: list[str] = []
    for module in backbone.modules():
        if isinstance(module, (TripletAttention, IDABlock)):
            kind = "IDA" if isinstance(module, IDABlock) else "TRIPLET_ATTENTION"
            module.register_forward_hook(lambda *_, kind=kind: seen.append(kind))
    backbone(torch.randn(2, 3, 32, 32))
    expected = list(dict.fromkeys((*order, "TRIPLET_ATTENTION", "IDA")))
    assert seen == ["IDA"] * 6 + expected * 3


def test_block_with_both_attentions_survives_deepcopy(ida_cfg):
    ida_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res5",)
    backbone = build_backbone(ida_cfg).eval()
    x = torch.randn(1, 3, 32, 32)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".ida." in name:
                parameter.fill_(float("nan"))
        assert twin(x)["res5"].isfinite().all()


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("IDA.STAGES", ("res6",), "IDA.STAGES: unknown stage 'res6'"),
        (
            "IDA.NUM_HEADS",
            3,
            "IDA.NUM_HEADS: num_heads must divide in_channels, got num_heads=3 and in_channels=64",
        ),
        ("IDA.NUM_HEADS", 0, "IDA.NUM_HEADS: num_heads must be a positive integer, got 0"),
        ("IDA.NUM_QUERIES", 0, "IDA.NUM_QUERIES: num_queries must be a positive integer, got 0"),
        ("PLUGIN_ORDER", ("ADI",), "PLUGIN_ORDER: expected some of TRIPLET_ATTENTION, IDA, each"),
        ("PLUGIN_ORDER", ("IDA", "IDA"), "got ['IDA', 'IDA']"),
    ],
)
def test_wrong_setting_is_named(ida_cfg, setting, value, reason):
    ida_cfg.merge_from_list([f"MODEL.RESNETS.{setting}", value])
    with pytest.raises(ValueError) as error:
        check_resnet_plugins(ida_cfg)
    assert str(error.value).startswith("MODEL.RESNETS.") and reason in str(error.value)


def test_stages_of_ida_want_a_builder_with_plugins(ida_cfg):
    ida_cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    with pytest.raises(ValueError, match=r"IDA.STAGES is .*use 'build_resnet_plugin_fpn_backbone'"):
        check_config(ida_cfg, eval_only=False, resume=False)


def test_c4_head_takes_ida_in_res5(cfg):
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16, 4
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.IDA.STAGES = ("res4", "res5")
    names = [n for n, m in build_model(cfg).named_modules() if isinstance(m, IDABlock)]
    assert names == [f"backbone.res4.{i}.ida" for i in range(6)] + [
        f"roi_heads.res5.{i}.ida" for i in range(3)
    ]


def lazy_resnet(**plugins: Any) -> ResNet:
    stages = ResNet.make_default_stages(18, norm="BN")
    stem = nn.Conv2d(3, 64, 3)
    stem.stride = 4  # which Detectron2 reads
    return build_resnet_with_plugins(stem=stem, stages=stages, **plugins)


def test_lazy_config_takes_ida_and_an_order():
    both = {"triplet_attention": {"stages": ["res5"]}, "ida": {"stages": ["res4", "res5"]}}
    for order in (("triplet_attention", "ida"), ("ida", "triplet_attention")):
        model = lazy_resnet(**both, plugin_order=order)
        assert [n for n, _ in model.res5[0].named_children()][-2:] == list(order)
        assert isinstance(model.res4[0].ida, IDABlock) and not hasattr(model.res3[0], "ida")


@pytest.mark.parametrize(
    ("plugins", "reason"),
    [
        ({"ida": {"stages": ["res1"]}}, "ida.stages: unknown stage 'res1'"),
        ({"ida": {"stages": ["res5"], "num_heads": 5}}, "ida: num_heads must divide in_channels"),
        ({"plugin_order": ["adi"]}, "plugin_order: expected some of triplet_attention, ida, each"),
        ({"ida": ["res5"]}, r"ida: expected dict\(stages="),
    ],
)
def test_wrong_plugin_of_a_lazy_config_is_named(plugins, reason):
    with pytest.raises(ValueError, match=reason):
        lazy_resnet(**plugins)


# ------------------------------------------------------------------------------------ in RoI heads


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
    for predictor in predictors(build_model(head_cfg)):
        assert predictor.cls_score.num_heads == 2 and predictor.cls_score.out_proj is not None


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
            "MODEL.ROI_BOX_HEAD.IDA.NUM_HEADS: num_heads must divide in_channels, got num_heads=3 "
            "and in_channels=16",
        ),
        (
            {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 10},
            "num_heads=4 and in_channels=10",
        ),
    ],
)
def test_wrong_setting_of_the_head_is_named(head_cfg, settings, reason):
    head_cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(head_cfg, eval_only=False, resume=False)
    assert reason in str(error.value)


def test_scores_do_not_depend_on_other_regions(head_cfg):
    head = predictors(build_model(head_cfg))[0].cls_score.eval()
    pooled: Tensor = torch.randn(6, 16, 7, 7)
    torch.testing.assert_close(head(pooled)[2:3], head(pooled[2:3]))
