"""Attention mask consistency in Detectron2: activations, and settings that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode
from detectron2.layers import DeformConv
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from small_amc import KINDS, MEAN, amc, batch, build, losses, small

from d2_plugins.attention_mask_consistency import AMCGeneralizedRCNN
from d2_plugins.datasets import register_coco
from d2_plugins.preflight import check_config

# -------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("Standard", "backbone.bottom_up.res5"),
        ("Cascade", "backbone.bottom_up.res5"),
        ("C4", "backbone.res4"),
        ("RetinaNet", "backbone.bottom_up.res5"),
    ],
)
def test_activation_is_the_last_stage_where_none_is_named(cfg, kind, module):
    assert build(small(cfg, kind)).amc_activation == module


@pytest.mark.parametrize("kind", ["Standard", "RetinaNet"])
def test_a_level_is_the_feature_map_of_its_name(cfg, kind):
    images = batch()
    level = build(small(cfg, kind, ACTIVATION="backbone", LEVELS=("p4",)))
    module = build(small(cfg, kind, ACTIVATION="backbone.fpn_output4", LEVELS=()))
    assert torch.equal(amc(level, images), amc(module, images))
    level.amc_levels = ()  # all
    assert amc(level, images) > 0 and not torch.equal(amc(level, images), amc(module, images))


def test_levels_may_be_the_calls_of_one_module(cfg):
    model = build(small(cfg, "RetinaNet", ACTIVATION="head.cls_subnet"))
    amc(model, batch()).backward()
    assert model.head.cls_subnet[0].weight.grad.any()


@pytest.mark.parametrize(
    ("kind", "module", "reason"),
    [
        ("RetinaNet", "head.bbox_pred", "the score does not depend on the activations"),
        ("Standard", "roi_heads.box_pooler", "it puts out (16, 16, 7, 7), expected a feature map"),
        ("Standard", "roi_heads.box_predictor", "it puts out tuple, expected a feature map"),
        ("Cascade", "roi_heads.box_head", "it is not called in training"),
    ],
)
def test_activation_that_is_not_before_the_scores_is_named(cfg, kind, module, reason):
    model = build(small(cfg, kind, ACTIVATION=module))
    with pytest.raises(ValueError) as error:
        losses(model, batch())
    assert str(error.value).startswith(f"MODEL.AMC.ACTIVATION {module!r}: {reason}")


class Deformable(DeformConv):
    """Stands for a deformable convolution, which needs a GPU."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.usefixtures("_deformable_convolution")
def test_deformable_convolution_after_the_activation_is_named(cfg):
    model = build(small(cfg, "Standard", ACTIVATION="backbone.bottom_up.res4"))
    model.backbone.bottom_up.res5.insert(0, Deformable())
    with pytest.raises(ValueError, match=r"res5\.0 comes after it, a deformable convolution"):
        losses(model, batch())
    model.amc_activation = "backbone.bottom_up.res5"
    assert MEAN in losses(model, batch())


# ----------------------------------------------------------------------------------- wrong settings


@ROI_HEADS_REGISTRY.register()
class HeadsWithoutAPooler(StandardROIHeads):
    """Stands for RoI heads of the user's own."""

    def __init__(self, cfg: CfgNode, input_shape: Any) -> None:
        super().__init__(cfg, input_shape)
        del self.box_pooler


@META_ARCH_REGISTRY.register()
class OwnAMCDetector(AMCGeneralizedRCNN):
    """Stands for a detector of the user's own."""


@pytest.mark.parametrize("build_it", [False, True], ids=["preflight", "construction"])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"MODEL.AMC.ACTIVATION": "backbone.bottom_up.res6"},
            "MODEL.AMC.ACTIVATION: the detector has no module 'backbone.bottom_up.res6'; did you "
            "mean 'backbone.bottom_up.res5'",
        ),
        (
            {"MODEL.AMC.ACTIVATION": "backbone", "MODEL.AMC.LEVELS": ("p5", "p9")},
            "MODEL.AMC.LEVELS: 'p9' is no feature map of 'backbone', which has p4, p5, p6",
        ),
        ({"MODEL.AMC.MEAN_MARGIN": 1.5}, "MODEL.AMC.MEAN_MARGIN: must be from 0 to 1"),
        ({"MODEL.AMC.MAX_MARGIN": -0.1}, "MODEL.AMC.MAX_MARGIN: must be from 0 to 1"),
        ({"MODEL.AMC.MEAN_WEIGHT": -1.0}, "MODEL.AMC.MEAN_WEIGHT: must be at least 0"),
        ({"MODEL.AMC.MAX_WEIGHT": -1.0}, "MODEL.AMC.MAX_WEIGHT: must be at least 0"),
        ({"MODEL.AMC.EVERY": 0}, "MODEL.AMC.EVERY: must be a positive integer"),
        ({"MODEL.AMC.CLASSES": -1}, "MODEL.AMC.CLASSES: must be how many classes of an image"),
        ({"MODEL.AMC.BOXES": "one"}, "MODEL.AMC.BOXES: must be 'all' or 'random', got 'one'"),
        ({"MODEL.AMC.RESOLUTION": "mask"}, "MODEL.AMC.RESOLUTION: must be 'auto', 'image'"),
        (
            {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"},
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE: AMC differentiates twice through RoIAlign, not "
            "through RoIPool; use 'ROIAlignV2'",
        ),
    ],
    ids=lambda value: str(list(value)[-1]) if isinstance(value, dict) else "",
)
def test_wrong_setting_is_named(cfg, settings, reason, build_it):
    small(cfg, "Standard")
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        build(cfg) if build_it else check_config(cfg, eval_only=True, resume=False)
    assert str(error.value).startswith(reason)


def test_levels_of_a_single_feature_map_are_named(cfg):
    model = build(small(cfg, "Standard", LEVELS=("p4",)))
    with pytest.raises(ValueError, match=r"MODEL.AMC.LEVELS: 'p4' .* which has only one, without"):
        losses(model, batch())


def test_roi_heads_of_another_make_are_named(cfg):
    small(cfg, "Standard")
    cfg.MODEL.ROI_HEADS.NAME = "HeadsWithoutAPooler"
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NAME: HeadsWithoutAPooler has no box_po"):
        build(cfg)


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("GeneralizedRCNN", "use 'AMCGeneralizedRCNN'"),
        ("RetinaNet", "use 'AMCRetinaNet'"),
        (
            "MMDetDetector",
            "a detector of MMDetection has AMC in its own config, MODEL.MMDET.CONFIG",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(cfg, architecture, hint):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.AMC.EVERY = architecture, 2
    with pytest.raises(ValueError) as error:
        check_config(cfg, eval_only=False, resume=False)
    assert str(error.value) == (
        f"MODEL.AMC is set, but MODEL.META_ARCHITECTURE is {architecture!r}, which does not read "
        f"it; {hint}"
    )


@KINDS
def test_good_settings_pass(cfg, kind, registered, tiny_coco):
    small(cfg, kind, EVERY=2)
    register_coco("amc_train", *tiny_coco)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS = ("amc_train",), (), ""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 1
    before = cfg.clone()
    check_config(cfg, eval_only=False, resume=False)
    assert cfg == before
    if kind == "Standard":
        cfg.MODEL.META_ARCHITECTURE = "OwnAMCDetector"
        check_config(cfg, eval_only=False, resume=False)


def test_attention_in_the_res5_of_a_c4_is_known(cfg):
    small(cfg, "C4")
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.RESNETS.PLUGINS = [{"NAME": "triplet_attention", "STAGES": ["res4", "res5"]}]
    amc(build(cfg), batch()).backward()


def test_retinanet_has_no_roi_heads_to_plug_into(cfg):
    small(cfg, "RetinaNet")
    cfg.MODEL.ROI_BOX_HEAD.NAME = "IDABoxHead"
    with pytest.raises(ValueError, match="an AMCRetinaNet has no RoI heads"):
        check_config(cfg, eval_only=False, resume=False)
