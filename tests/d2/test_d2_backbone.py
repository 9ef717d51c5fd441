"""Plugins in Detectron2's ResNets: what is Detectron2's own about it, and the published costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from backbones import (
    ALL_STAGES,
    attention_of,
    by_state_dict,
    is_attention,
    randomize,
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
from detectron2.utils.events import EventStorage
from fvcore.nn import FlopCountAnalysis
from small_rcnn import example
from torchvision.ops import deform_conv2d

from d2_plugins.block_plugins import insert_after_residual_branch
from plugin_core import BlockPlugin, IDABlock, TripletAttention


def plugin(cfg: CfgNode) -> dict[str, Any]:
    """The one plugin of a config."""
    return cfg.MODEL.RESNETS.PLUGINS[0]


# ------------------------------------------------------------------------------- where plugins are


def test_parameters_are_the_plain_backbones_and_the_plugins(resnet_cfg):
    plugin(resnet_cfg)["STAGES"] = ["res2", "res5"]
    names = list(build_backbone(resnet_cfg).state_dict())
    plain = list(build_backbone(without_plugins(resnet_cfg)).state_dict())
    assert [n for n in names if not is_attention(n)] == plain
    assert [n for n in names if is_attention(n)] == [
        f"{stage}.{block}.triplet_attention.{name}"
        for stage in ("res2", "res5")
        for block in range(3)
        for name in TripletAttention().state_dict()
    ]
    assert "res2.0.triplet_attention.cw.conv.conv.weight" in names


def test_settings_reach_the_module(resnet_cfg):
    plugin(resnet_cfg).update(KERNEL_SIZE=5, NO_SPATIAL=True, WARM_START=True, NORM="SyncBN")
    inserted = build_backbone(resnet_cfg).res2[0].triplet_attention
    assert isinstance(inserted, BlockPlugin) and inserted.alpha is not None
    module = inserted.module
    assert (module.kernel_size, module.hw, module.norm) == (5, None, "SyncBN")


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_norm_of_the_gates_is_not_the_backbones(resnet_cfg, norm):
    resnet_cfg.MODEL.RESNETS.NORM = "FrozenBN" if norm == "BN" else "BN"
    plugin(resnet_cfg)["NORM"] = norm
    backbone = build_backbone(resnet_cfg).train()
    backbone(torch.randn(2, 3, 32, 32))
    bn = backbone.res2[0].triplet_attention.module.cw.conv.bn
    assert bn.num_batches_tracked == (norm == "BN")
    assert bn.weight.requires_grad == (norm == "BN")
    own = backbone.res2[0].conv1.norm
    assert isinstance(own, FrozenBatchNorm2d if norm == "BN" else nn.BatchNorm2d)


def conv_and_norm(conv: Conv2d, x: Tensor) -> Tensor:
    return conv.norm(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("kind", "arguments"), [(BasicBlock, {}), (BottleneckBlock, {"bottleneck_channels": 4})]
)
def test_module_follows_the_last_norm_and_precedes_the_sum(kind, arguments, stride):
    block = kind(8, 8 * stride, stride=stride, norm="BN", **arguments)
    insert_after_residual_branch(block, "triplet_attention", TripletAttention(kernel_size=3))
    randomize(block.eval())
    x = torch.randn(2, 8, 8, 8)
    *convs, last = [block.conv1, block.conv2, *([block.conv3] if arguments else [])]
    out = x
    for conv in convs:
        out = F.relu(conv_and_norm(conv, out))
    out = block.triplet_attention(conv_and_norm(last, out))
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


@pytest.mark.usefixtures("_deformable_convolution")
@pytest.mark.parametrize("modulated", [False, True], ids=["deform", "modulated"])
def test_plugin_is_in_deformable_blocks_too(resnet_cfg, modulated, monkeypatch):
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
def test_builder_gives_detectron2s_backbone_with_plugins(resnet_cfg, builder, levels):
    resnet_cfg.MODEL.BACKBONE.NAME = builder
    if "retinanet" in builder:
        resnet_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    plugin(resnet_cfg)["WARM_START"] = True
    plain = build_backbone(without_plugins(resnet_cfg)).eval()
    warm = build_backbone(resnet_cfg).eval()
    assert type(warm) is type(plain)
    assert warm.output_shape() == plain.output_shape()
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert by_state_dict(missing) == attention_of(warm)
    assert len(missing) == 16 * (1 + 3 * 5) and not unexpected
    x = torch.randn(1, 3, 64, 64)
    features, expected = warm(x), plain(x)
    assert sorted(features) == levels
    assert all(torch.equal(features[n], expected[n]) for n in levels)


def test_no_plugins_is_the_plain_backbone(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.PLUGINS = []
    backbone = build_backbone(resnet_cfg)
    assert not any(isinstance(m, BlockPlugin) for m in backbone.modules())
    assert backbone.res2[0].conv3.activation is None


# --------------------------------------------------------------------------------- C4's RoI head


@pytest.fixture
def c4_cfg(resnet_cfg: CfgNode) -> CfgNode:
    """A C4 detector: the backbone ends in res4, and res5 is in the RoI head."""
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    resnet_cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = resnet_cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 20
    resnet_cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 5
    resnet_cfg.MODEL.ROI_HEADS.NAME = "Res5PluginROIHeads"
    resnet_cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    resnet_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    resnet_cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    return resnet_cfg


@pytest.mark.parametrize("stages", [["res4", "res5"], ["res5"], ["res4"], []])
def test_roi_heads_res5_has_the_plugins_exactly_where_the_stages_name_it(c4_cfg, stages):
    c4_cfg.MODEL.RESNETS.PLUGINS = [
        {"NAME": "triplet_attention", "STAGES": stages, "WARM_START": True, "KERNEL_SIZE": 3},
        {"NAME": "ida", "STAGES": stages, "NUM_QUERIES": 5},
    ]
    c4_cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(c4_cfg)
    found = {n: m for n, m in model.named_modules() if isinstance(m, BlockPlugin)}
    assert {".".join(n.split(".")[:2]) for n in found} == {
        {"res4": "backbone.res4", "res5": "roi_heads.res5"}[stage] for stage in stages
    }
    if "res5" in stages:
        *others, block = model.roi_heads.res5
        assert all(list(other._modules)[-1] == "triplet_attention" for other in others)
        assert list(block._modules)[-2:] == ["triplet_attention", "ida"]
        assert block.triplet_attention.module.kernel_size == 3
        assert block.triplet_attention.alpha is not None and block.ida.alpha is None
        assert isinstance(block.ida.module, IDABlock) and block.ida.module.num_classes == 5


def test_warm_start_gives_exactly_the_plain_c4_detectors_boxes_and_trains(c4_cfg):
    plugin(c4_cfg)["WARM_START"] = True
    plain_cfg = without_plugins(c4_cfg)
    plain_cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    plain, warm = build_model(plain_cfg).eval(), build_model(c4_cfg).eval()
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert by_state_dict(missing) == attention_of(warm) and not unexpected
    image = example()
    with torch.no_grad():
        instances, expected = (model([image])[0]["instances"] for model in (warm, plain))
    assert len(instances) > 0
    assert torch.equal(instances.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(instances.scores, expected.scores)
    with EventStorage():
        sum(warm.train()([image]).values()).backward()
    assert warm.roi_heads.res5[2].triplet_attention.alpha.grad != 0


# ------------------------------------------------------------------------------------------- frozen


def test_frozen_stage_is_as_it_was_after_training_and_only_its_plugins_are_warned_of(
    resnet_cfg, caplog
):
    resnet_cfg.MODEL.BACKBONE.FREEZE_AT = 2
    backbone = build_backbone(resnet_cfg).train()
    assert "res2 is frozen" in caplog.text and "MODEL.RESNETS.PLUGINS[0]" in caplog.text
    gates = backbone.res2[0].triplet_attention.module
    assert isinstance(gates.cw.conv.bn, FrozenBatchNorm2d)
    before = copy.deepcopy(backbone.res2.state_dict())
    sum(f.sum() for f in backbone(torch.randn(2, 3, 32, 32)).values()).backward()
    for name, value in backbone.res2.state_dict().items():
        assert torch.equal(value, before[name]), name
    caplog.clear()
    plugin(resnet_cfg)["STAGES"] = ["res3", "res4", "res5"]
    build_backbone(resnet_cfg)
    assert not caplog.records


# --------------------------------------------------------------------------------------------- cost


class Classifier(nn.Module):
    def __init__(self, backbone: ResNet) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(backbone.output_shape()["res5"].channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.backbone(x)["res5"].mean((2, 3)))


@pytest.mark.parametrize(
    ("depth", "stages", "parameters", "gflops"),
    [
        (50, ALL_STAGES, 25_561_832, 4.1587),
        (50, (), 25_557_032, 4.1114),
        (18, ALL_STAGES, 11_691_912, 1.8256),
    ],
)
def test_classifier_has_the_published_size_and_cost(cfg, depth, stages, parameters, gflops):
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.STRIDE_IN_1X1 = depth, "BN", False
    resnets.OUT_FEATURES = ["res5"]
    resnets.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    resnets.PLUGINS = [{"NAME": "triplet_attention", "STAGES": list(stages)}]
    with torch.device("meta"):  # without drawing numbers
        model = Classifier(build_backbone(cfg, ShapeSpec(channels=3)))
    model, image = model.to_empty(device="cpu").eval(), torch.zeros(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    flops = FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    assert round(flops.total() / 1e9, 4) == gflops


# ----------------------------------------------------------------------------------- wrong settings


def error_of(cfg: CfgNode) -> str:
    with pytest.raises(ValueError) as error:
        build_backbone(cfg)
    return str(error.value)


def test_stage_that_is_not_built_is_named_with_the_reason(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    assert error_of(resnet_cfg) == (
        "MODEL.RESNETS.PLUGINS[0].STAGES: unknown stage 'res5'; there are res2, res3, res4, as "
        "MODEL.RESNETS.OUT_FEATURES is ['res4']; the res5 of a C4 detector takes plugins with "
        "MODEL.ROI_HEADS.NAME 'Res5PluginROIHeads'"
    )
    resnet_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    assert error_of(resnet_cfg).endswith("as MODEL.RESNETS.OUT_FEATURES is ['res4']")
    plugin(resnet_cfg)["STAGES"] = ["res2", 2]
    assert "unknown stage 2; there are res2, res3, res4" in error_of(resnet_cfg)


def test_features_that_are_no_stages_count_for_none(resnet_cfg):
    resnet_cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res3"]
    assert "there are res2, res3, as MODEL.RESNETS.OUT" in error_of(resnet_cfg)
    plugin(resnet_cfg)["STAGES"] = ["res2", "res3"]
    assert set(build_backbone(resnet_cfg).output_shape()) == {"stem", "res3"}
