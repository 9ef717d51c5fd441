"""IDA in MMDetection: the block as a plugin of backbones, and the head that classifies regions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

import plugin_core
from mm_plugins import IDABBoxHead, IDABlock
from mm_plugins.analysis import load_config

NARROW = {"stem_channels": 8, "base_channels": 8}
# A backbone, MMDetection's own of the same weights, the position of plugins, the stages that get
# them here, and the channels that these have.
BACKBONES = {
    "ResNet-50": (
        {"type": "ResNet", "depth": 50, **NARROW},
        {"type": "ResNet", "depth": 50, **NARROW},
        "after_conv3",
        {3: 128, 4: 256},
        4,
    ),
    "PluginResNet-18": (
        {"type": "PluginResNet", "depth": 18, **NARROW},
        {"type": "ResNet", "depth": 18, **NARROW},
        "after_conv2",
        {3: 32, 4: 64},
        4,
    ),
    "PluginMobileNetV2": (
        {"type": "PluginMobileNetV2", "widen_factor": 0.25},
        {"type": "MobileNetV2", "widen_factor": 0.25},
        "after_linear_conv",
        {5: 24, 6: 40},
        7,
    ),
}
EVERY_BACKBONE = pytest.mark.parametrize("name", BACKBONES)
HEAVY = pytest.mark.parametrize("heavy", [False, True], ids=["light", "heavy"])


def plugin(name: str, kind: str = "IDABlock", **layer: Any) -> dict:
    position, channels, num_stages = BACKBONES[name][2:]
    stages = tuple(stage in channels for stage in range(1, num_stages + 1))
    arguments = {"num_queries": 5} if kind == "IDABlock" else {}
    return {"cfg": {"type": kind, **arguments, **layer}, "position": position, "stages": stages}


def build(name: str, *plugins: dict, **changed: Any) -> nn.Module:
    """The backbone with these plugins, or MMDetection's own where there are none."""
    cfg = dict(BACKBONES[name][0], plugins=list(plugins)) if plugins else BACKBONES[name][1]
    return MODELS.build(copy.deepcopy({**cfg, **changed}))


def ida_blocks(model: nn.Module) -> list[IDABlock]:
    return [module for module in model.modules() if isinstance(module, IDABlock)]


def let_in(model: nn.Module) -> None:
    """Let attention have an influence, as training does."""
    for block in ida_blocks(model):
        nn.init.constant_(block.gamma, 0.5)


def assert_equal_features(model: nn.Module, other: nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for feature, expected in zip(model(x), other(x), strict=True):
            assert torch.isfinite(expected).all()
            assert torch.equal(feature, expected)


# -------------------------------------------------------------------------------- in the backbones


@EVERY_BACKBONE
def test_blocks_of_the_chosen_stages_have_it_for_their_channels(name):
    model, channels = build(name, plugin(name, num_heads=2)), BACKBONES[name][3]
    for stage in range(1, BACKBONES[name][4] + 1):
        for block in getattr(model, f"layer{stage}"):
            assert hasattr(block, "ida") == (stage in channels)
            if stage in channels:
                assert isinstance(block.ida, plugin_core.IDABlock)
                assert block.ida.in_channels == channels[stage]
                assert (block.ida.num_classes, block.ida.num_heads) == (5, 2)


@EVERY_BACKBONE
def test_it_is_the_identity_after_the_weights_are_initialized(name):
    model = build(name, plugin(name))
    drawn = [block.proj.weight.clone() for block in ida_blocks(model)]
    model.init_weights()
    assert drawn
    for block, before in zip(ida_blocks(model), drawn, strict=True):
        assert not torch.equal(block.proj.weight, before)  # as all convolutions of the backbone
        x = torch.randn(2, block.in_channels, 3, 3)
        assert torch.equal(block(x), x)


@EVERY_BACKBONE
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_plain_weights_give_exactly_the_plain_backbones_features(name, mode, tmp_path):
    plain = build(name)
    path = str(tmp_path / "plain.pth")
    torch.save({"state_dict": plain.state_dict()}, path)
    model = build(name, plugin(name), init_cfg={"type": "Pretrained", "checkpoint": path})
    model.init_weights()
    for network in (plain, model):
        network.train(mode)
    assert_equal_features(model, plain)


@EVERY_BACKBONE
def test_names_are_the_plain_backbones_and_those_of_the_blocks(name):
    names = build(name, plugin(name)).state_dict()
    assert [n for n in names if ".ida." not in n] == list(build(name).state_dict())
    assert len(names) > len(build(name).state_dict())


@EVERY_BACKBONE
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # of MMDetection's blocks
def test_recomputed_activations_give_equal_gradients(name):
    model = build(name, plugin(name)).double()
    recomputing = build(name, plugin(name), with_cp=True).double()
    let_in(model)
    recomputing.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64).double()
    for network in (model, recomputing):
        network.train()
        sum(feature.square().mean() for feature in network(x)).backward()
    expected = dict(model.named_parameters())
    for parameter_name, parameter in recomputing.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter_name].grad, msg=parameter_name
        )
    assert all(block.proj.weight.grad.any() for block in ida_blocks(recomputing))


@EVERY_BACKBONE
def test_deep_copy_is_independent(name):
    model, x = build(name, plugin(name)), torch.randn(1, 3, 64, 64)
    model.eval()
    before = model(x)[-1].clone()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x)[-1], before)
    let_in(twin)
    assert torch.equal(model(x)[-1], before) and not torch.allclose(twin(x)[-1], before)


@EVERY_BACKBONE
def test_frozen_stages_freeze_it(name):
    frozen, training = BACKBONES[name][3]
    model = build(name, plugin(name), frozen_stages=frozen)
    model.train()
    for stage in (frozen, training):
        for block in getattr(model, f"layer{stage}"):
            assert block.ida.training == (stage == training)
            assert {p.requires_grad for p in block.ida.parameters()} == {stage == training}


@EVERY_BACKBONE
@pytest.mark.parametrize("ida_first", [True, False])
def test_two_plugins_are_applied_in_their_order(name, ida_first):
    kinds = ["IDABlock", "TripletAttention"] if ida_first else ["TripletAttention", "IDABlock"]
    model = build(name, *(plugin(name, kind) for kind in kinds))
    model.eval()
    let_in(model)
    block = getattr(model, f"layer{min(BACKBONES[name][3])}")[0]
    names = ["ida", "triplet_attention"] if ida_first else ["triplet_attention", "ida"]
    calls: list[tuple[str, Tensor, Tensor]] = []
    for layer in names[::-1]:
        getattr(block, layer).register_forward_hook(
            lambda _, args, out, layer=layer: calls.append((layer, args[0].clone(), out.clone()))
        )
    model(torch.randn(1, 3, 64, 64))
    (first, _, given), (second, taken, _) = calls
    assert [first, second] == names and torch.equal(given, taken)


def test_it_runs_where_the_images_are_smaller_than_its_stride():
    model = build("ResNet-50", plugin("ResNet-50"))
    let_in(model)
    model.eval()
    assert model(torch.randn(1, 3, 8, 8))[-1].shape == (1, 256, 1, 1)


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
        ({"num_cls_fcs": 1}, "num_cls_fcs must be 0, .* feature map .* got 1"),
        ({"with_avg_pool": True}, "with_avg_pool must be False, .* got True"),
        ({"with_cls": False}, "with_cls must be True, .* got False"),
        ({"with_reg": False}, "with_reg must be True, .* got False"),
        ({"cls_predictor_cfg": {"type": "NormedLinear"}}, "cls_predictor_cfg must be .*Linear"),
        ({"num_reg_convs": 1}, "num_shared_fcs must be 0 where num_reg_convs is not, .* got 2"),
        ({"num_heads": 3}, "num_heads must divide in_channels, got num_heads=3 and in_channels=16"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
    ],
)
def test_argument_that_cannot_work_is_named(argument, message):
    with pytest.raises(ValueError, match=message):
        IDABBoxHead(**SMALL_HEAD, **argument)


@pytest.mark.parametrize("name", ["num_cls_fcs", "with_avg_pool", "with_cls", "cls_predictor_cfg"])
def test_argument_that_says_what_holds_anyway_is_accepted(name):
    value = {"num_cls_fcs": 0, "with_avg_pool": False, "with_cls": True}.get(
        name, {"type": "Linear"}
    )
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
