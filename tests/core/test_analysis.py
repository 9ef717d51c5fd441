"""How counts by module become a report by stage."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from plugin_core import build_block_plugin
from plugin_core.inspection.cost import Cost, Report, make_report, prepare_model


def model_of(*names: str) -> nn.Module:
    """A model with a module of one parameter at each of the dotted names."""
    root = nn.Module()
    for name in names:
        module = root
        for part in name.split("."):
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.weight = nn.Parameter(torch.ones(1))
    return root


def counts_of(own: dict[str, int]) -> Counter[str]:
    """What a framework would give: a module's count holds those of all modules below it."""
    counts: Counter[str] = Counter()
    for name, count in own.items():
        parts = name.split(".") if name else []
        for i in range(len(parts) + 1):
            counts[".".join(parts[:i])] += count
    return counts


def report_of(model: nn.Module, flops: dict[str, int] | None = None) -> Report:
    counts = counts_of(flops or {})
    return make_report(model, counts, counts, (64, 64), {})


def test_stages_add_up_to_the_total_whatever_runs_outside_of_them():
    model = model_of("backbone.res2.0.conv1", "proposal_generator.conv", "roi_heads.box_head.fc1")
    flops = {
        "": 1,  # by the detector itself
        "backbone": 10,
        "backbone.res2.0.conv1": 100,
        "proposal_generator.conv": 1_000,
        "roi_heads": 10_000,
        "roi_heads.box_head.fc1": 100_000,
    }
    report = report_of(model, flops)
    assert report.total == Cost(3, 111_111, 111_111)
    assert {stage: cost.flops for stage, cost in report.stages.items()} == {
        "backbone": 10,
        "backbone.res2": 100,
        "proposal_generator": 1_000,
        "roi_heads": 10_000,
        "roi_heads.box_head": 100_000,
        "other": 1,
    }


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        pytest.param(
            # In the order of their definition, which is not that of an image's way
            ["backbone.fpn_lateral2", "backbone.top_block.p6", "backbone.bottom_up.stem.conv1"]
            + [f"backbone.bottom_up.res{i}.0.conv1" for i in (2, 3, 4, 5)]
            + ["roi_heads.box_head.fc1", "roi_heads.mask_head.deconv"]
            + ["sem_seg_head.p2.0", "proposal_generator.rpn_head.conv"],
            ["backbone.bottom_up.stem"]
            + [f"backbone.bottom_up.res{i}" for i in (2, 3, 4, 5)]
            + ["backbone.fpn", "proposal_generator"]
            + ["roi_heads.box_head", "roi_heads.mask_head", "sem_seg_head.p2"],
            id="Detectron2 FPN",
        ),
        pytest.param(
            ["backbone.stem.conv1", "backbone.res4.0.conv1", "roi_heads.res5.0.conv1"],
            ["backbone.stem", "backbone.res4", "roi_heads.res5"],
            id="Detectron2 C4",
        ),
        pytest.param(
            ["backbone.conv1", "backbone.bn1", "backbone.layer1.0.conv1", "neck.lateral_convs.0"]
            + ["rpn_head.rpn_conv", "rpn_head.rpn_cls", "roi_head.bbox_head.0.fc_cls"],
            ["backbone.stem", "backbone.layer1", "neck", "rpn_head", "roi_head.bbox_head"],
            id="MMDetection ResNet",
        ),
        pytest.param(
            ["backbone.conv1.conv", "backbone.layer7.0.conv", "backbone.conv2.conv"]
            + ["neck.extra_layers.0", "bbox_head.cls_convs.0", "bbox_head.reg_convs.0"],
            ["backbone.stem", "backbone.layer7", "backbone.conv2", "neck"]
            + ["bbox_head.cls_convs", "bbox_head.reg_convs"],
            id="MMDetection MobileNetV2",
        ),
        pytest.param(
            ["backbone.patch_embed.projection", "backbone.stages.0.x", "backbone.stages.1.x"],
            ["backbone.stem", "backbone.stages.0", "backbone.stages.1"],
            id="MMDetection Swin",
        ),
        pytest.param(
            ["bbox_head.fc_cls", "query_embedding", "decoder.layers.0.ffn", "encoder.layers.0.ffn"]
            + ["detr.transformer.encoder.layers.0", "neck.convs.0"],
            ["neck", "encoder", "detr.transformer.encoder", "decoder", "bbox_head.fc_cls"]
            + ["query_embedding"],
            id="DETR",
        ),
        pytest.param(["conv1", "layer1.0", "fc"], ["conv1", "layer1", "fc"], id="classifier"),
    ],
)
def test_stages_come_in_the_order_in_which_an_image_passes_them(names, stages):
    assert list(report_of(model_of(*names)).stages) == stages


def test_module_without_cost_makes_no_stage():
    model = model_of("neck")
    model.add_module("rpn_head", nn.Identity())
    assert list(report_of(model).stages) == ["neck"]


def test_parameter_that_two_modules_share_is_counted_once():
    model = nn.Module()
    model.neck, model.encoder = nn.Linear(3, 3), nn.Linear(3, 3)
    model.encoder.weight = model.neck.weight
    assert report_of(model).total.parameters == 9 + 3 + 3


def test_attention_is_the_sum_of_its_modules_and_a_part_of_the_stages():
    model = model_of("backbone.res2.0.conv1", "backbone.res3.0.conv1")
    for stage in (model.backbone.res2, model.backbone.res3):
        attention = build_block_plugin("triplet_attention", 4)
        stage.get_submodule("0").add_module("triplet_attention", attention)
    gates = [
        f"backbone.{stage}.0.triplet_attention.module.cw.conv.conv" for stage in ("res2", "res3")
    ]
    report = report_of(model, {gates[0]: 5, gates[1]: 7, "backbone.res2.0.conv1": 100})
    assert report.attention_modules == 2
    assert report.attention == Cost(2 * 3 * (2 * 49 + 2), 12, 12)
    assert report.stages["backbone.res2"] == Cost(301, 105, 105)
    assert report.total == Cost(602, 112, 112)


def test_cost_of_a_model_less_its_baseline_is_what_was_added():
    assert Cost(5, 7, 9) - Cost(1, 2, 3) == Cost(4, 5, 6)


def test_prepared_model_puts_out_zeros_in_evaluation_mode():
    model = prepare_model(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    assert not model.training
    assert model(torch.ones(1, 2)).tolist() == [[0, 0]]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dictionary_of_a_report_holds_its_total():
    content = Report((32, 64), {"proposals": 9}, {"neck": Cost(1, 2, 3)}, 0, Cost()).as_dict()
    cost = {"parameters": 1, "flops": 2, "activations": 3}
    assert content["image_size"] == [32, 64] and content["regions"] == {"proposals": 9}
    assert content["stages"] == {"neck": cost} and content["total"] == cost
    assert content["attention"]["modules"] == 0
