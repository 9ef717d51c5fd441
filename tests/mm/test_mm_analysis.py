"""What a detector of MMDetection is counted to cost."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config

from mm_plugins.analysis import analyze, load_config
from plugin_core.inspection.cost import Cost, Report, prepare_model

FASTER_RCNN = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
SSDLITE = "mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"


quick = partial(analyze, activations=False)  # which takes half the time


def config(base: str = FASTER_RCNN, kind: str = "TripletAttention", **attention: Any) -> Config:
    """A detector of few proposals, with attention where its arguments are given."""
    cfg = load_config(base)
    cfg.model.test_cfg.rpn.max_per_img = 37
    cfg.model.roi_head.bbox_head.fc_out_channels = 16
    if attention:
        layer = {"type": kind, **attention}
        cfg.model.backbone.plugins = [{"cfg": layer, "position": "after_conv3"}]
    return cfg


def small_backbone(cfg: Config) -> None:
    cfg.model.backbone.update(depth=18, base_channels=8)
    cfg.model.neck.in_channels = [8, 16, 32, 64]


@cache
def baseline(height: int, width: int) -> Report:
    """What the detector without attention costs."""
    return analyze(config(), (height, width))


def test_resnet50_gets_dearer_by_its_attention_and_nothing_else():
    report = analyze(config(warm_start=True), (64, 64))
    plain = baseline(64, 64)
    assert report.attention_modules == 16 and report.attention.parameters == 4_800 + 16
    assert report.total - plain.total == report.attention
    assert plain.attention_modules == 0 and plain.attention == Cost()
    changed = {s for s, cost in report.stages.items() if cost != plain.stages[s]}
    assert changed == {f"backbone.layer{i}" for i in (1, 2, 3, 4)}


def test_attention_in_resnet50_takes_the_flops_of_the_paper_at_224_pixels():
    report = quick(config(kernel_size=7), (224, 224))
    assert report.attention.flops / 1e9 == pytest.approx(4.1587 - 4.1114, abs=1e-4)


def ida_flops(c: int, classes: int, positions: int, heads: int) -> int:
    """Multiply-adds of what is left of IDA for one image, by its formulas."""
    d = c // heads
    scores_and_first_attention = 2 * classes * c * positions
    second_attention = classes * heads * (4 * d * d + 2 * heads * d)
    return scores_and_first_attention + second_attention


def test_ida_in_resnet50_is_counted_by_its_formulas_and_nothing_else_gets_dearer():
    report = analyze(config(kind="IDABlock", num_queries=10), (64, 64))
    assert report.attention_modules == 16
    assert report.total - baseline(64, 64).total == report.attention
    expected = 0
    for blocks, c, positions in ((3, 256, 256), (4, 512, 64), (6, 1024, 16), (3, 2048, 4)):
        handed_back = 10 * c * positions
        if positions < 10:  # otherwise samples are scaled, and products of maps are not counted
            handed_back += c * positions
        expected += blocks * (ida_flops(c, 10, positions, 16) + handed_back)
    # mmengine's count of an einsum has four digits.
    assert report.attention.flops == pytest.approx(expected, rel=1e-3)


def test_head_of_ida_is_counted_for_every_proposal():
    cfg = config()
    cfg.model.roi_head.bbox_head.type = "IDABBoxHead"
    report, plain = analyze(cfg, (64, 64)), baseline(64, 64)
    assert report.attention_modules == 1
    mixers = 2 * (256 * 7 * 7 + 256 + 256 * 256 + 256)
    assert report.attention.parameters == mixers + 256 * 81 + 4 * (64 * 64 + 64)
    expected = ida_flops(256, 81, 49, 4) + 81 * 256  # these are the logits
    expected += 2 * 49 * (256 * 7 * 7 + 256 * 256)  # of the mixers
    assert report.attention.flops == pytest.approx(37 * expected, rel=1e-3)
    linear = Cost(parameters=(16 + 1) * 81, flops=37 * 16 * 81, activations=37 * 81)
    assert report.total - plain.total == report.attention - linear


def test_total_is_what_mmengine_counts_for_the_whole_model():
    cfg = config()
    report = baseline(64, 64)
    cfg.model.test_cfg.rpn.nms.iou_threshold = 1.0
    model = prepare_model(MODELS.build(cfg.model))
    sample = DetDataSample(metainfo={"img_shape": (64, 64)})
    model.forward = partial(model.forward, data_samples=[sample])
    image = torch.zeros(1, 3, 64, 64)
    counted = get_model_complexity_info(model, inputs=(image,), show_table=False, show_arch=False)
    assert report.total == Cost(counted["params"], counted["flops"], counted["activations"])


def test_heads_work_on_as_many_boxes_as_the_config_allows_whatever_the_weights():
    reports = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        cfg = config(MASK_RCNN)
        small_backbone(cfg)
        cfg.model.roi_head.mask_head.update(num_convs=1, conv_out_channels=8)
        cfg.model.test_cfg.rpn.max_per_img = 700  # of 1023 anchors
        reports.append(quick(cfg, (64, 64)))
    assert reports[0] == reports[1]
    assert reports[0].regions == {"proposals": 700, "masks": 100}


def test_image_is_as_large_as_in_testing_unless_told():
    report = quick(load_config(SSDLITE))
    assert report.image_size == (320, 320)
    assert list(report.stages)[:2] == ["backbone.stem", "backbone.layer1"]
    cfg = config()
    small_backbone(cfg)
    cfg.test_dataloader.dataset.pipeline[1].scale = (70, 40)  # width, height
    report, padded = quick(cfg), quick(cfg, (64, 96))  # it is padded to multiples of 32
    assert report.image_size == (40, 70) and padded.image_size == (64, 96)
    assert report.stages["rpn_head"] == padded.stages["rpn_head"]


@pytest.mark.parametrize("missing", ["test_dataloader", "pipeline", "Resize"])
def test_config_without_size_of_test_images_needs_one(missing):
    cfg = config()
    if missing == "test_dataloader":
        cfg.pop("test_dataloader")
    elif missing == "pipeline":
        cfg.test_dataloader.dataset.pop("pipeline")
    else:
        cfg.test_dataloader.dataset.pipeline.pop(1)
    with pytest.raises(ValueError, match=r"no Resize with a `scale`.* say for which size"):
        analyze(cfg)


def test_config_stays_as_it_is_and_no_weights_are_read():
    cfg = config()
    small_backbone(cfg)
    cfg.load_from = "there/is/no/such.pth"
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": "there/is/no/such.pth"}
    before = copy.deepcopy(cfg.to_dict())
    quick(cfg, (64, 64))
    assert cfg.to_dict() == before


def test_head_that_looks_for_ground_truth_is_counted():
    cfg = load_config("mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py")
    small_backbone(cfg)
    cfg.model.roi_head.update(num_stages=1, stage_loss_weights=[1])
    cfg.model.roi_head.bbox_head = cfg.model.roi_head.bbox_head[:1]
    assert quick(cfg, (64, 64)).regions == {"proposals": 100}


def test_config_without_model_is_an_error(tmp_path):
    (tmp_path / "schedule.py").write_text("max_epochs = 3\n")
    with pytest.raises(ValueError, match="defines no `model`"):
        load_config(str(tmp_path / "schedule.py"))
