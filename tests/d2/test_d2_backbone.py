"""Plugins in Detectron2's ResNets: where they sit, and that nothing else has changed."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, deform_conv
from detectron2.modeling import ResNet, build_backbone, build_model
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from torchvision.ops import deform_conv2d

from d2_plugins.backbone import (
    build_resnet_with_plugins,
    check_resnet_plugins,
    insert_after_residual_branch,
    insert_triplet_attention,
)
from plugin_core import TripletAttention

ALL_STAGES = ("res2", "res3", "res4", "res5")
DEPTHS = pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])


def set_depth(cfg: CfgNode, depth: int) -> None:
    cfg.MODEL.RESNETS.DEPTH = depth
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64  # Detectron2 asks for it


def without_plugins(cfg: CfgNode) -> CfgNode:
    plain = cfg.clone()
    plain.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("_plugin", "")
    plain.MODEL.RESNETS.TRIPLET_ATTENTION.STAGES = ()
    return plain


def is_attention(name: str) -> bool:
    return ".triplet_attention." in name


def attention_of(model: nn.Module) -> set[str]:
    """Names that a checkpoint has to hold for the attention (a count of batches is no loss)."""
    names = set(filter(is_attention, model.state_dict()))
    return {n for n in names if not n.endswith("num_batches_tracked")}


def randomize(module: nn.Module) -> None:
    """Give norms and gates values that differ from their initial ones, as training does."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for tensor in (m.weight, m.bias, m.running_mean, m.running_var):
                    tensor.uniform_(0.5, 1.5)


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


# ---------------------------------------------------------------------------------------- insertion


class Times(nn.Module):
    def __init__(self, factor: float, plus: float) -> None:
        super().__init__()
        self.factor, self.plus = factor, plus

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.plus


def test_two_modules_are_applied_in_the_order_of_their_insertion():
    block = BottleneckBlock(8, 8, bottleneck_channels=4, norm="BN").eval()
    x = torch.randn(2, 8, 5, 5)
    branch = block.conv3(F.relu(block.conv2(F.relu(block.conv1(x)))))
    insert_after_residual_branch(block, "first", Times(2, 1))
    insert_after_residual_branch(block, "second", Times(3, 0))
    torch.testing.assert_close(block(x.clone()), F.relu((branch * 2 + 1) * 3 + x))
    assert [n for n, _ in block.named_children()][-2:] == ["first", "second"]


def test_replaced_child_takes_effect():
    block = BasicBlock(4, 4, norm="BN").eval()
    x = torch.randn(2, 4, 5, 5)
    expected = block(x.clone())
    insert_after_residual_branch(block, "scale", Times(2, 1))
    block.scale = nn.Identity()
    assert torch.equal(block(x.clone()), expected)


def test_module_is_registered_once_and_the_block_keeps_its_class():
    block = BasicBlock(4, 4, norm="BN")
    names = set(block.state_dict())
    insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    assert type(block) is BasicBlock
    added = set(block.state_dict()) - names
    assert added == {f"triplet_attention.{n}" for n in TripletAttention().state_dict()}


@pytest.mark.parametrize("name", ["conv1", "shortcut", "forward", "stride"])
def test_insertion_under_a_taken_name_is_refused(name):
    block = BasicBlock(4, 4, norm="BN")
    with pytest.raises(ValueError, match=f"block already has a '{name}'"):
        insert_after_residual_branch(block, name, nn.Identity())


def test_second_insertion_of_one_name_is_refused():
    block = BasicBlock(4, 4, norm="BN")
    insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    with pytest.raises(ValueError, match="block already has a 'triplet_attention'"):
        insert_after_residual_branch(block, "triplet_attention", TripletAttention())


def test_every_block_of_a_stage_gets_an_attention_of_its_own(caplog):
    blocks = [BasicBlock(4, 4, norm="BN") for _ in range(3)]
    with caplog.at_level(logging.WARNING, logger="d2_plugins.backbone"):
        insert_triplet_attention(iter(blocks), "res2", kernel_size=5, no_spatial=True)
    found = [block.triplet_attention for block in blocks]
    assert len({id(attention) for attention in found}) == 3
    assert all(a.kernel_size == 5 and a.hw is None and a.alpha is None for a in found)
    assert not caplog.records


def test_stage_that_is_frozen_in_part_keeps_that_part_frozen(caplog):
    frozen, trained = BasicBlock(4, 4, norm="BN").freeze(), BasicBlock(4, 4, norm="BN")
    with caplog.at_level(logging.WARNING, logger="d2_plugins.backbone"):
        insert_triplet_attention([frozen, trained], "res2")
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["res2 is frozen"]


def block_with_activation() -> BasicBlock:
    block = BasicBlock(4, 4, norm="BN")
    block.conv2.activation = F.relu
    return block


@pytest.mark.parametrize(
    "make_block", [BasicStem, lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), block_with_activation]
)
def test_insertion_into_another_kind_of_block_is_refused(make_block):
    block = make_block()
    children = list(block.state_dict())
    with pytest.raises(ValueError, match=f"expected a residual block.*{type(block).__name__}"):
        insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    assert list(block.state_dict()) == children


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


# --------------------------------------------------------------------------------- for a LazyConfig


def lazy_resnet(freeze_at: int = 0, **attention: Any) -> ResNet:
    stages = ResNet.make_default_stages(18, norm="BN")
    return build_resnet_with_plugins(
        triplet_attention=attention or None,
        stem=BasicStem(norm="BN"),
        stages=stages,
        out_features=["res2", "res5"],
        freeze_at=freeze_at,
    )


def test_resnet_of_a_lazy_config_is_detectron2s_with_attention():
    resnet = lazy_resnet(stages=["res2", "res4"], kernel_size=3, warm_start=True)
    assert type(resnet) is ResNet and set(resnet.output_shape()) == {"res2", "res5"}
    found = {n: m for n, m in resnet.named_modules() if isinstance(m, TripletAttention)}
    expected = [f"{s}.{i}.triplet_attention" for s in ("res2", "res4") for i in (0, 1)]
    assert list(found) == expected
    assert all(m.kernel_size == 3 and m.alpha is not None for m in found.values())


@pytest.mark.parametrize("attention", [{}, {"stages": []}, {"kernel_size": 3}])
def test_resnet_of_a_lazy_config_without_stages_is_plain(attention):
    assert not any(isinstance(m, TripletAttention) for m in lazy_resnet(**attention).modules())


def test_unknown_stage_in_a_lazy_config_is_named_with_those_that_exist():
    with pytest.raises(ValueError) as error:
        lazy_resnet(stages=["res3", "res6"])
    assert str(error.value) == (
        "triplet_attention.stages: unknown stage 'res6'; this ResNet has res2, res3, res4, res5"
    )


def test_wrong_argument_in_a_lazy_config_is_named():
    with pytest.raises(TypeError, match="'kernal_size'"):
        lazy_resnet(stages=["res3"], kernal_size=3)
    with pytest.raises(ValueError, match="kernel_size must be a positive odd number.*got 4"):
        lazy_resnet(stages=["res3"], kernel_size=4)
    with pytest.raises(ValueError, match="norm must be one of BN, SyncBN, FrozenBN, got 'GN'"):
        lazy_resnet(stages=["res3"], norm="GN")


def test_frozen_stage_of_a_lazy_config_freezes_its_attention_and_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="d2_plugins.backbone"):
        resnet = lazy_resnet(freeze_at=2, stages=["res2", "res3"])
    assert not any(p.requires_grad for p in resnet.res2.parameters())
    assert all(p.requires_grad for p in resnet.res3.parameters())
    (record,) = caplog.records
    assert record.getMessage().startswith("res2 is frozen")
    assert "freeze_at and triplet_attention.stages" in record.getMessage()


# -------------------------------------------------------------------------------------- checkpoints

SECOND_SPELLING = {
    "cw.conv.": "ChannelGateH.spatial.",
    "hc.conv.": "ChannelGateW.spatial.",
    "hw.conv.": "SpatialGate.spatial.",
}


def in_second_spelling(name: str) -> str:
    for ours, published in SECOND_SPELLING.items():
        name = name.replace(f".triplet_attention.{ours}", f".triplet_attention.{published}")
    return name


class Detector(nn.Module):
    """The keys of a detection checkpoint: ``backbone.bottom_up.res2.0.…``."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)


def fpn_detector(cfg: CfgNode) -> Detector:
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_fpn_backbone"
    model = Detector(cfg).eval()
    randomize(model)
    return model


def load_checkpoint(model: nn.Module, path: Path) -> tuple[list[str], list[str]]:
    """Load with Detectron2's checkpointer; names that it found missing, and those unexpected."""
    found = []
    checkpointer = DetectionCheckpointer(model)
    checkpointer._log_incompatible_keys = found.append
    checkpointer.load(str(path))
    (incompatible,) = found
    return incompatible.missing_keys, incompatible.unexpected_keys


@pytest.mark.parametrize("freeze_at", [0, 3])
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_published_detection_checkpoint_loads_whole(resnet_cfg, tmp_path, freeze_at, warm_start):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    source = fpn_detector(resnet_cfg)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    state = {in_second_spelling(k): v for k, v in source.state_dict().items()}
    assert "backbone.bottom_up.res2.0.triplet_attention.ChannelGateH.spatial.conv.weight" in state
    torch.save({"model": state}, tmp_path / "model.pth")
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = warm_start
    target = Detector(resnet_cfg).eval()
    assert load_checkpoint(target, tmp_path / "model.pth") == ([], [])
    x = torch.randn(1, 3, 64, 64).double()
    expected = source.double().backbone(x)
    for name, feature in target.double().backbone(x).items():
        torch.testing.assert_close(feature, expected[name])


@DEPTHS
@pytest.mark.parametrize("file", ["model.pth", "R.pkl"])
def test_plain_checkpoint_lacks_the_attention_only(resnet_cfg, tmp_path, file, depth):
    set_depth(resnet_cfg, depth)
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    randomize(plain)
    state = plain.state_dict()
    path = tmp_path / file
    if path.suffix == ".pkl":  # as Detectron2's model zoo has ResNets of ImageNet
        model = {k: v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
        zoo = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(zoo))
    else:
        torch.save({"model": state}, path)
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    warm = build_backbone(resnet_cfg).eval()
    missing, unexpected = load_checkpoint(warm, path)
    assert set(missing) == attention_of(warm)
    assert not unexpected
    x = torch.randn(1, 3, 32, 32)
    for name, feature in warm(x).items():
        assert torch.equal(feature, plain(x)[name]), name


def in_caffe2_spelling(name: str) -> str:
    if name.startswith("stem."):
        name = name.removeprefix("stem.").replace("conv1.norm", "res_conv1.norm")
    else:
        for ours, theirs in (("shortcut", "1"), ("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c")):
            name = name.replace(ours, f"branch{theirs}")
    name = name.replace("norm.weight", "bn_s").replace("norm.bias", "bn_b")
    return name.replace("weight", "w").replace(".", "_")


@DEPTHS
def test_warm_start_keeps_the_features_of_a_caffe2_checkpoint(resnet_cfg, tmp_path, depth):
    # What Detectron2's own configs start from, MSRA/R-50.pkl: scales and shifts, no statistics.
    set_depth(resnet_cfg, depth)
    resnet_cfg.MODEL.RESNETS.NORM = "FrozenBN"
    resnet_cfg.MODEL.RESNETS.TRIPLET_ATTENTION.WARM_START = True
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    for name, tensor in plain.state_dict().items():
        if name.endswith(("norm.weight", "norm.bias")):
            tensor.uniform_(0.5, 1.5)
    state = plain.state_dict().items()
    content = {in_caffe2_spelling(k): v.numpy() for k, v in state if ".running_" not in k}
    assert {"conv1_w", "res_conv1_bn_s", "res5_1_branch2b_bn_b"} < content.keys()
    (tmp_path / "R.pkl").write_bytes(pickle.dumps(content))
    assert load_checkpoint(plain, tmp_path / "R.pkl") == ([], [])
    warm = build_backbone(resnet_cfg).eval()
    missing, unexpected = load_checkpoint(warm, tmp_path / "R.pkl")
    assert set(missing) == attention_of(warm)
    assert not unexpected
    x = torch.randn(1, 3, 32, 32)
    for name, feature in warm(x).items():
        assert torch.equal(feature, plain(x)[name]), name


def test_converted_imagenet_checkpoint_brings_its_attention(resnet_cfg, tmp_path):
    # Detectron2's convert-torchvision-to-d2.py: names without the detector's prefix, to be matched.
    source = build_backbone(resnet_cfg).eval()
    randomize(source)
    model = {k: v.numpy() for k, v in source.state_dict().items()}
    zoo = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(zoo))
    target = fpn_detector(resnet_cfg)
    missing, unexpected = load_checkpoint(target, tmp_path / "R-50.pkl")
    assert not [n for n in missing if is_attention(n)] and not unexpected
    bottom_up = target.backbone.bottom_up.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(bottom_up[name], value), name


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
    with caplog.at_level(logging.WARNING, logger="d2_plugins.backbone"):
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
    with caplog.at_level(logging.WARNING, logger="d2_plugins.backbone"):
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
