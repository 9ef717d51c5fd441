"""Plugins in Detectron2's ResNets: where they sit, and that nothing else has changed."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from backbones import (
    ALL_STAGES,
    DEPTHS,
    attention_of,
    is_attention,
    randomize,
    set_depth,
    without_plugins,
)
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, deform_conv
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from torchvision.ops import deform_conv2d

from d2_plugins.block_plugins import check_resnet_plugins, insert_after_residual_branch
from plugin_core import TripletAttention

# ------------------------------------------------------------------------------- where attention is


@DEPTHS
@pytest.mark.parametrize("stages", [("res3", "res5"), ALL_STAGES])
def test_every_block_of_the_named_stages_and_no_other_has_attention(resnet_cfg, depth, stages):
    set_depth(resnet_cfg, depth)
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = stages
    backbone = build_backbone(resnet_cfg)
    for stage_name, stage in zip(backbone.stage_names, backbone.stages, strict=True):
        for block in stage:
            children = [n for n, m in block.named_modules() if isinstance(m, TripletAttention)]
            assert children == (["triplet_attention"] if stage_name in stages else [])
    inside = sum(len(getattr(backbone, name)) for name in stages)
    assert sum(isinstance(m, TripletAttention) for m in backbone.modules()) == inside


@DEPTHS
def test_parameters_are_the_plain_backbones_and_the_attentions(resnet_cfg, depth):
    set_depth(resnet_cfg, depth)
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res2",)
    names = list(build_backbone(resnet_cfg).state_dict())
    plain = list(build_backbone(without_plugins(resnet_cfg)).state_dict())
    assert [n for n in names if not is_attention(n)] == plain
    blocks = {18: 2}.get(depth, 3)
    expected = [
        f"res2.{block}.triplet_attention.{name}"
        for block in range(blocks)
        for name in TripletAttention().state_dict()
    ]
    assert [n for n in names if is_attention(n)] == expected
    assert "res2.0.triplet_attention.cw.conv.conv.weight" in names


def test_settings_reach_the_attention(resnet_cfg):
    node = resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION
    node.KERNEL_SIZE, node.NO_SPATIAL, node.WARM_START, node.NORM = 5, True, True, "SyncBN"
    for module in build_backbone(resnet_cfg).modules():
        if isinstance(module, TripletAttention):
            assert module.kernel_size == 5 and module.hw is None and module.alpha is not None
            assert module.norm == "SyncBN"
    node.NO_SPATIAL = node.WARM_START = False
    attention = build_backbone(resnet_cfg).res2[0].triplet_attention
    assert attention.hw is not None and attention.alpha is None


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_norm_of_the_gates_is_not_the_backbones(resnet_cfg, norm):
    resnet_cfg.MODEL.RESNETS.NORM = "FrozenBN" if norm == "BN" else "BN"
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.NORM = norm
    backbone = build_backbone(resnet_cfg).train()
    backbone(torch.randn(2, 3, 32, 32))
    bn = backbone.res2[0].triplet_attention.cw.conv.bn
    assert bn.num_batches_tracked == (norm == "BN")
    assert bn.weight.requires_grad == (norm == "BN")
    own = backbone.res2[0].conv1.norm
    assert isinstance(own, FrozenBatchNorm2d if norm == "BN" else nn.BatchNorm2d)


def test_every_block_has_an_attention_of_its_own(resnet_cfg):
    backbone = build_backbone(resnet_cfg)
    found = [m for m in backbone.modules() if isinstance(m, TripletAttention)]
    assert len({id(m) for m in found}) == 3 + 4 + 6 + 3


@DEPTHS
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_warm_start_gives_exactly_the_plain_backbones_features(resnet_cfg, depth, mode):
    set_depth(resnet_cfg, depth)
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    plain = build_backbone(without_plugins(resnet_cfg)).train(mode)
    randomize(plain)
    warm = build_backbone(resnet_cfg).train(mode)
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert all(is_attention(n) for n in missing) and not unexpected
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, expected = warm(x), plain(x)
    assert features.keys() == expected.keys() == set(ALL_STAGES)
    for name, feature in features.items():
        assert torch.equal(feature, expected[name]), name


def test_attention_changes_the_features_without_warm_start(resnet_cfg):
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    cold = build_backbone(resnet_cfg).eval()
    cold.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 32, 32)
    for name, feature in cold(x).items():
        assert not torch.allclose(feature, plain(x)[name]), name


def conv_and_norm(conv: Conv2d, x: Tensor) -> Tensor:
    return conv.norm(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_follows_the_last_norm_and_precedes_the_sum_in_a_basic_block(stride):
    block = BasicBlock(4, 4 * stride, stride=stride, norm="BN")
    insert_after_residual_branch(block, "triplet_attention", TripletAttention(3))
    randomize(block.eval())
    x = torch.randn(2, 4, 8, 8)
    out = F.relu(conv_and_norm(block.conv1, x))
    out = block.triplet_attention(conv_and_norm(block.conv2, out))
    shortcut = x if block.shortcut is None else conv_and_norm(block.shortcut, x)
    torch.testing.assert_close(block(x.clone()), F.relu(out + shortcut))


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_follows_the_last_norm_and_precedes_the_sum_in_a_bottleneck_block(stride):
    block = BottleneckBlock(8, 8 * stride, bottleneck_channels=4, stride=stride, norm="BN")
    insert_after_residual_branch(block, "triplet_attention", TripletAttention(3))
    randomize(block.eval())
    x = torch.randn(2, 8, 8, 8)
    out = F.relu(conv_and_norm(block.conv1, x))
    out = F.relu(conv_and_norm(block.conv2, out))
    out = block.triplet_attention(conv_and_norm(block.conv3, out))
    shortcut = x if block.shortcut is None else conv_and_norm(block.shortcut, x)
    torch.testing.assert_close(block(x.clone()), F.relu(out + shortcut))


def torchvision_deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    deformable_groups: int,
) -> Tensor:
    return deform_conv2d(x, offset, weight, None, stride, padding, dilation)


def torchvision_modulated_deform_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> Tensor:
    stride, padding, dilation, _groups, _deformable_groups = args
    return deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


@pytest.mark.parametrize("modulated", [False, True], ids=["deform", "modulated"])
def test_attention_is_in_deformable_blocks_too(resnet_cfg, modulated, monkeypatch):
    # Detectron2 without its compiled operators has no deformable convolution.
    monkeypatch.setattr(deform_conv, "deform_conv", torchvision_deform_conv)
    monkeypatch.setattr(deform_conv, "modulated_deform_conv", torchvision_modulated_deform_conv)
    resnet_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    resnet_cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    backbone = build_backbone(resnet_cfg).eval()
    randomize(backbone)
    block = backbone.res3[1]
    assert isinstance(block, DeformBottleneckBlock)
    x = torch.randn(1, 32, 6, 6)
    y = block(x.clone())

    out = F.relu(conv_and_norm(block.conv1, x))
    offset = block.conv2_offset(out)
    if modulated:
        x_offset, y_offset, mask = offset.chunk(3, dim=1)
        out = block.conv2(out, torch.cat((x_offset, y_offset), 1), mask.sigmoid())
    else:
        out = block.conv2(out, offset)
    out = block.triplet_attention(conv_and_norm(block.conv3, F.relu(out)))
    torch.testing.assert_close(y, F.relu(out + x))
    assert all(torch.isfinite(f).all() for f in backbone(torch.randn(1, 3, 32, 32)).values())


# ----------------------------------------------------------------------------------------- builders


@pytest.mark.parametrize(
    ("builder", "levels"),
    [
        ("build_resnet_plugin_backbone", list(ALL_STAGES)),
        ("build_resnet_plugin_fpn_backbone", ["p2", "p3", "p4", "p5", "p6"]),
        ("build_retinanet_resnet_plugin_fpn_backbone", ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_builder_gives_detectron2s_backbone_with_attention(resnet_cfg, builder, levels):
    resnet_cfg.MODEL.BACKBONE.NAME = builder
    if "retinanet" in builder:
        resnet_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    warm = build_backbone(resnet_cfg).eval()
    assert type(warm) is type(plain)
    assert warm.output_shape() == plain.output_shape()
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == attention_of(warm)
    assert len(missing) == 16 * (1 + 3 * 5) and not unexpected
    x = torch.randn(1, 3, 64, 64)
    features, expected = warm(x), plain(x)
    assert sorted(features) == levels
    assert all(torch.equal(features[n], expected[n]) for n in levels)


@pytest.mark.parametrize(
    ("architecture", "builder"),
    [
        ("GeneralizedRCNN", "build_resnet_plugin_fpn_backbone"),
        ("RetinaNet", "build_retinanet_resnet_plugin_fpn_backbone"),
    ],
)
def test_detector_with_attention_gives_finite_losses_and_gradients(
    resnet_cfg, architecture, builder
):
    cfg = resnet_cfg
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = architecture, builder
    if architecture == "RetinaNet":
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    else:
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
        cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    model = build_model(cfg)
    with EventStorage():
        losses = model([one_labelled_image()])
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in model.named_parameters():
        if is_attention(name):
            assert torch.isfinite(parameter.grad).all(), name
    attention = model.backbone.bottom_up.res2[0].triplet_attention
    assert attention.cw.conv.conv.weight.grad.abs().sum() > 0


def one_labelled_image() -> dict[str, Any]:
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
    instances.gt_classes = torch.tensor([3])
    return {"image": torch.rand(3, 64, 64) * 255, "instances": instances}


# --------------------------------------------------------------------------------- C4's RoI head


@pytest.fixture
def c4_cfg(resnet_cfg: CfgNode) -> CfgNode:
    """A C4 detector: the backbone ends in res4, and res5 is in the RoI head."""
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    resnet_cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
    return resnet_cfg


@pytest.mark.parametrize("stages", [("res4", "res5"), ("res5",), ("res4",), ()])
def test_roi_heads_res5_has_attention_exactly_where_the_stages_name_it(c4_cfg, stages):
    c4_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = stages
    c4_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    model = build_model(c4_cfg)
    assert {".".join(n.split(".")[:2]) for n in model.state_dict() if is_attention(n)} == {
        {"res4": "backbone.res4", "res5": "roi_heads.res5"}[stage] for stage in stages
    }
    for block in model.roi_heads.res5 if "res5" in stages else ():
        attention = block.triplet_attention
        assert attention.kernel_size == 3 and attention.alpha is not None


def test_c4_detector_with_attention_in_its_roi_head_trains_and_detects(c4_cfg):
    c4_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(c4_cfg)
    image = one_labelled_image()
    with EventStorage():
        sum(model([image]).values()).backward()
    gate = model.roi_heads.res5[2].triplet_attention.cw
    assert gate.conv.conv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        (output,) = model.eval()([image])
    assert len(output["instances"]) > 0


def test_warm_start_gives_exactly_the_plain_c4_detectors_boxes(c4_cfg):
    c4_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    c4_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    plain_cfg = without_plugins(c4_cfg)
    plain_cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    plain, warm = build_model(plain_cfg).eval(), build_model(c4_cfg).eval()
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == attention_of(warm) and not unexpected
    image = one_labelled_image()
    with torch.no_grad():
        instances, expected = (model([image])[0]["instances"] for model in (warm, plain))
    assert len(instances) > 0
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.scores, expected.scores)


# --------------------------------------------------------------------- what frameworks do to models


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"]
)
def test_copy_of_a_backbone_is_independent(resnet_cfg, copy_of):
    backbone = build_backbone(resnet_cfg).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = backbone(x)["res5"]
    twin = copy_of(backbone)
    assert torch.equal(twin(x)["res5"], expected)
    for block in twin.res2:  # a block that still called the original's attention would not notice
        nn.init.constant_(block.triplet_attention.cw.conv.bn.bias, 9.0)
    assert torch.equal(backbone(x)["res5"], expected)
    assert not torch.allclose(twin(x)["res2"], backbone(x)["res2"])


def test_backbone_compiles_without_a_graph_break(resnet_cfg):
    set_depth(resnet_cfg, 18)
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res2",)
    backbone = build_backbone(resnet_cfg).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(compiled(x)["res2"], backbone(x)["res2"])


# ------------------------------------------------------------------------------------------- frozen


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 4])
def test_frozen_stages_freeze_their_attention_and_warn(resnet_cfg, freeze_at, caplog):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    with caplog.at_level(logging.WARNING, logger="d2_plugins.block_plugins"):
        backbone = build_backbone(resnet_cfg)
    frozen = ALL_STAGES[: max(freeze_at - 1, 0)]
    for name in ALL_STAGES:
        for block in getattr(backbone, name):
            attention = block.triplet_attention
            norms = [g.conv.bn for g in (attention.cw, attention.hc, attention.hw)]
            trainable = [p.requires_grad for p in attention.parameters()]
            if name in frozen:
                assert not any(trainable)
                assert all(isinstance(n, FrozenBatchNorm2d) for n in norms)
            else:
                assert all(trainable) and len(trainable) == 9
                assert all(isinstance(n, nn.BatchNorm2d) for n in norms)
    warnings = [r.getMessage() for r in caplog.records]
    assert [w.split()[0] for w in warnings] == list(frozen)
    assert all("FREEZE_AT" in w and "TRIPLET_ATTENTION.STAGES" in w for w in warnings)


def test_frozen_stage_without_attention_gives_no_warning(resnet_cfg, caplog):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res3", "res4", "res5")
    with caplog.at_level(logging.WARNING, logger="d2_plugins.block_plugins"):
        build_backbone(resnet_cfg)
    assert not caplog.records


def test_frozen_attention_stays_as_it_is_in_training(resnet_cfg):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    backbone = build_backbone(resnet_cfg).train()
    before = copy.deepcopy(backbone.res2.state_dict())
    sum(f.sum() for f in backbone(torch.randn(2, 3, 32, 32)).values()).backward()
    for name, value in backbone.res2.state_dict().items():
        assert torch.equal(value, before[name]), name


# --------------------------------------------------------------------------------------------- cost


class Classifier(nn.Module):
    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(backbone.output_shape()["res5"].channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone(x)["res5"].mean((2, 3)))


def classifier(cfg: CfgNode, depth: int, stages: tuple[str, ...]) -> Classifier:
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.STRIDE_IN_1X1 = depth, "BN", False
    resnets.OUT_FEATURES = ["res5"]
    resnets.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    resnets.TRIPLET_ATTENTION.STAGES = stages
    return Classifier(build_backbone(cfg, ShapeSpec(channels=3))).eval()


@pytest.mark.parametrize(
    ("depth", "stages", "parameters", "gflops"),
    [
        (50, ALL_STAGES, 25_561_832, 4.1587),
        (50, (), 25_557_032, 4.1114),
        (18, ALL_STAGES, 11_691_912, 1.8256),
    ],
)
def test_classifier_has_the_published_size_and_cost(cfg, depth, stages, parameters, gflops):
    model = classifier(cfg, depth, stages)
    assert sum(p.numel() for p in model.parameters()) == parameters
    flops = FlopCountAnalysis(model, torch.zeros(1, 3, 224, 224)).unsupported_ops_warnings(False)
    assert round(flops.total() / 1e9, 4) == gflops


# ----------------------------------------------------------------------------------- wrong settings


def error_of(cfg: CfgNode) -> str:
    with pytest.raises(ValueError) as error:
        build_backbone(cfg)
    with pytest.raises(ValueError) as same:
        check_resnet_plugins(cfg)
    assert str(same.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", ["res6", "res1", "stem", "layer1", 2])
def test_unknown_stage_is_named_with_those_that_exist(resnet_cfg, stage):
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res2", stage)
    assert error_of(resnet_cfg) == (
        f"MODEL.RESNETS.TRIPLET_ATTENTION.STAGES: unknown stage {stage!r}; ResNet-50 with "
        f"MODEL.RESNETS.OUT_FEATURES {list(ALL_STAGES)} has res2, res3, res4, res5"
    )


def test_stage_that_is_not_built_is_named(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    message = error_of(resnet_cfg)
    assert "MODEL.RESNETS.TRIPLET_ATTENTION.STAGES: unknown stage 'res5'" in message
    assert "MODEL.RESNETS.OUT_FEATURES ['res4'] has res2, res3, res4" in message
    assert "'Res5PluginROIHeads' as MODEL.ROI_HEADS.NAME" in message


def test_features_that_are_no_stages_count_for_none(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res3"]
    assert error_of(resnet_cfg).endswith("OUT_FEATURES ['stem', 'res3'] has res2, res3")
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ("res2", "res3")
    assert set(build_backbone(resnet_cfg).output_shape()) == {"stem", "res3"}


@pytest.mark.parametrize(
    "builder",
    [
        "build_resnet_plugin_backbone",
        "build_resnet_plugin_fpn_backbone",
        "build_retinanet_resnet_plugin_fpn_backbone",
    ],
)
def test_unknown_depth_is_named_with_those_that_exist(resnet_cfg, builder):
    resnet_cfg.MODEL.BACKBONE.NAME = builder
    resnet_cfg.MODEL.RESNETS.DEPTH = 42
    assert error_of(resnet_cfg) == (
        "MODEL.RESNETS.DEPTH: no ResNet of depth 42; there are 18, 34, 50, 101, 152"
    )


@pytest.mark.parametrize("kernel_size", [4, 0, -3])
def test_wrong_kernel_size_is_named(resnet_cfg, kernel_size):
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.KERNEL_SIZE = kernel_size
    message = error_of(resnet_cfg)
    assert message.startswith("MODEL.RESNETS.TRIPLET_ATTENTION.KERNEL_SIZE: ")
    assert "positive odd number" in message and message.endswith(f"got {kernel_size}")


@pytest.mark.parametrize("norm", ["GN", "bn", ""])
def test_wrong_norm_is_named(resnet_cfg, norm):
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.NORM = norm
    assert error_of(resnet_cfg) == (
        "MODEL.RESNETS.TRIPLET_ATTENTION.NORM: "
        f"norm must be one of BN, SyncBN, FrozenBN, got {norm!r}"
    )


def test_the_hint_is_for_the_roi_head_that_has_res5(c4_cfg):
    c4_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    assert error_of(c4_cfg).endswith("MODEL.RESNETS.OUT_FEATURES ['res4'] has res2, res3, res4")


def test_no_stages_is_the_plain_backbone(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ()
    backbone = build_backbone(resnet_cfg)
    assert not any(isinstance(m, TripletAttention) for m in backbone.modules())
    assert backbone.res2[0].conv3.activation is None
