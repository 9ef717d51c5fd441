"""What a detector of Detectron2 is counted to cost."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis

from d2_plugins import merge_config
from d2_plugins.analysis import analyze, load_config
from plugin_core.inspection.cost import Cost, prepare_model

FASTER_RCNN = "model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK_RCNN = "model_zoo://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
PLUGIN = {"NAME": "triplet_attention", "STAGES": ["res2", "res3", "res4", "res5"]}
ATTENTION = (
    *("MODEL.BACKBONE.NAME", "build_resnet_plugin_fpn_backbone"),
    *("MODEL.RESNETS.PLUGINS", [PLUGIN]),
)
# Quick to count. Where a stage is frozen, Detectron2 makes buffers of its norms' parameters.
SMALL = (
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_HEADS.NUM_CLASSES", 2),
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 3),
)
RESNET18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
RESNET50 = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
THAWED = ("MODEL.BACKBONE.FREEZE_AT", 0)
PROPOSALS = ("MODEL.RPN.POST_NMS_TOPK_TEST", 70)  # of 1023 anchors in 64x64 pixels


quick = partial(analyze, activations=False)  # which takes half the time


def config(*options: Any, base: str = FASTER_RCNN) -> CfgNode:
    cfg = load_config(base)
    merge_config(cfg, options=SMALL + RESNET18 + THAWED + PROPOSALS + options)
    return cfg


def test_resnet50_gets_dearer_by_its_attention_which_takes_the_flops_of_the_paper():
    proposals = ("MODEL.META_ARCHITECTURE", "ProposalNetwork", *RESNET50)
    warm = ("MODEL.RESNETS.PLUGINS", [{**PLUGIN, "WARM_START": True}])
    report = analyze(config(*proposals, *ATTENTION, *warm), (224, 224))
    baseline = analyze(config(*proposals), (224, 224))
    assert report.attention.flops / 1e9 == pytest.approx(4.1587 - 4.1114, abs=1e-4)
    assert report.attention_modules == 16 and report.attention.parameters == 4_800 + 16
    assert report.total - baseline.total == report.attention
    assert baseline.attention_modules == 0 and baseline.attention == Cost()
    changed = {s for s, cost in report.stages.items() if cost != baseline.stages[s]}
    assert changed == {f"backbone.bottom_up.res{i}" for i in (2, 3, 4, 5)}


def test_total_is_what_detectron2_counts_for_the_whole_model():
    cfg = config("MODEL.DEVICE", "cpu", "MODEL.RPN.NMS_THRESH", 1.0)
    report = quick(cfg, (64, 96))
    model = prepare_model(build_model(cfg))
    flops = FlopCountAnalysis(model, [{"image": torch.zeros(3, 64, 96)}])
    assert report.total.flops == flops.unsupported_ops_warnings(False).total()
    assert report.total.parameters == sum(p.numel() for p in model.parameters())


def test_heads_work_on_as_many_boxes_as_the_config_allows_whatever_the_weights():
    small = ("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)
    reports = []
    for seed, detections in enumerate((11, 22)):
        torch.manual_seed(seed)
        most = ("TEST.DETECTIONS_PER_IMAGE", detections)
        reports.append(quick(config(*small, *most, base=MASK_RCNN), (64, 64)))
    assert reports[0].regions == {"proposals": 70, "detections": 11}
    flops = [report.stages["roi_heads.mask_head"].flops for report in reports]
    assert flops[1] == 2 * flops[0]
    # "other" is the detector itself, which pastes the masks
    its = ("roi_heads.mask_head", "other")
    others = [{k: cost for k, cost in r.stages.items() if k not in its} for r in reports]
    assert others[0] == others[1]


def test_image_is_as_large_as_in_testing_unless_told_and_the_config_stays_as_it_is():
    size = ("INPUT.MIN_SIZE_TEST", 40, "INPUT.MAX_SIZE_TEST", 70)
    cfg = config(*size, "MODEL.WEIGHTS", "there/is/no/such.pkl", "MODEL.DEVICE", "cuda")
    cfg.freeze()
    before = cfg.dump()
    report, padded = quick(cfg), quick(cfg, (64, 96))  # FPN needs multiples of 32
    assert report.image_size == (40, 70) and padded.image_size == (64, 96)
    assert report.stages["proposal_generator"] == padded.stages["proposal_generator"]
    assert cfg.dump() == before and cfg.is_frozen()


def test_config_that_tests_at_any_size_needs_one():
    with pytest.raises(ValueError, match=r"INPUT.MIN_SIZE_TEST is 0, .* say for which size"):
        analyze(config("INPUT.MIN_SIZE_TEST", 0))


def test_lazy_config_costs_what_the_yaml_of_the_same_detector_costs():
    name = "model_zoo://COCO-Detection/retinanet_R_50_FPN_1x"
    lazy, yaml = (analyze(load_config(name + end), (64, 64)) for end in (".py", ".yaml"))
    assert lazy == yaml
    assert lazy.regions == {} and lazy.total.parameters == 37_915_572


def test_lazy_config_without_model_is_an_error(tmp_path):
    (tmp_path / "schedule.py").write_text("from detectron2.config import LazyCall\nsteps = 3\n")
    with pytest.raises(ValueError, match="defines no `model`"):
        load_config(str(tmp_path / "schedule.py"))
