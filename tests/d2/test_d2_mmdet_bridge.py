"""Detectors of MMDetection as a meta-architecture of Detectron2: the same in both frameworks."""

from __future__ import annotations

import copy
import json
import logging
import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("mmdet", reason="MMDetection is not installed")

import lazyconfig_train_net
import numpy as np
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, DatasetEvaluators
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import CosineParamScheduler
from mmdet.datasets import CocoDataset, CocoPanopticDataset
from mmengine.logging import MessageHub
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import DefaultScope
from omegaconf import DictConfig, OmegaConf
from torch.optim.swa_utils import AveragedModel

from d2_plugins import merge_config, mmdet_bridge
from d2_plugins.analysis import analyze
from d2_plugins.datasets import register_coco
from d2_plugins.evaluation import build_evaluator
from d2_plugins.mmdet_bridge import MMDetDetector, build_detector, is_bridge, load_config
from d2_plugins.panoptic_quality import PanopticQualityEvaluator
from d2_plugins.pixels import find_mismatches
from d2_plugins.preflight import check_config
from d2_plugins.trainer import PluginCheckpointer, PluginTrainer
from mm_plugins.analysis import analyze as analyze_in_mmdetection

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs/d2/MMDet-Detection").glob("*.yaml"))
CLASSES = ("person", "disk", "square", "triangle", "star", "ring", "cross")
STUFF = 6
BACKBONE = (
    "model.backbone.depth=18",
    "model.backbone.base_channels=8",
    "model.backbone.frozen_stages=-1",
    "model.backbone.init_cfg=None",  # nothing is downloaded
)
PYRAMID = ("model.neck.in_channels=[8,16,32,64]", "model.neck.out_channels=16")
DENSE_HEAD = (
    "model.bbox_head.in_channels=16",
    "model.bbox_head.feat_channels=16",
    "model.bbox_head.stacked_convs=1",
    "model.bbox_head.num_classes=7",
    "model.test_cfg.score_thr=0.0",
    "model.test_cfg.max_per_img=20",
)


def wider(*overrides: str) -> list[str]:
    """With 64 channels, for a head with GroupNorm of 32 groups."""
    return [override.replace("=16", "=64") for override in overrides]


def transformer(name: str, *attentions: str) -> list[str]:
    """Overrides for a transformer of one narrow layer."""
    widths = {f"{part}.embed_dims": 16 for part in (*attentions, "ffn_cfg")}
    layer = {**widths, "ffn_cfg.feedforward_channels": 16}
    return [f"{name}.num_layers=1", *(f"{name}.layer_cfg.{k}={v}" for k, v in layer.items())]


SELF, CROSS = "self_attn_cfg", "cross_attn_cfg"
SMALL: dict[str, tuple[str, tuple[str, ...]]] = {
    "retinanet": (
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        (*BACKBONE, *PYRAMID, *DENSE_HEAD),
    ),
    "fcos": (
        "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        (*BACKBONE, *wider(*PYRAMID, *DENSE_HEAD)),
    ),
    "mask_rcnn": (
        "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        (
            *BACKBONE,
            *PYRAMID,
            "model.rpn_head.in_channels=16",
            "model.rpn_head.feat_channels=16",
            "model.roi_head.bbox_roi_extractor.out_channels=16",
            "model.roi_head.mask_roi_extractor.out_channels=16",
            "model.roi_head.bbox_head.in_channels=16",
            "model.roi_head.bbox_head.fc_out_channels=16",
            "model.roi_head.bbox_head.num_classes=7",
            "model.roi_head.mask_head.in_channels=16",
            "model.roi_head.mask_head.num_convs=1",
            "model.roi_head.mask_head.conv_out_channels=16",
            "model.roi_head.mask_head.num_classes=7",
            "model.test_cfg.rpn.max_per_img=30",
            "model.test_cfg.rcnn.score_thr=0.0",
            "model.test_cfg.rcnn.max_per_img=10",
        ),
    ),
    "detr": (
        "mmdet::detr/detr_r50_8xb2-150e_coco.py",
        (
            *BACKBONE,
            *transformer("model.encoder", SELF),
            *transformer("model.decoder", SELF, CROSS),
            "model.neck.in_channels=[64]",
            "model.neck.out_channels=16",
            "model.positional_encoding.num_feats=8",
            "model.num_queries=12",
            "model.bbox_head.embed_dims=16",
            "model.bbox_head.num_classes=7",
            "model.test_cfg.max_per_img=10",
        ),
    ),
    "maskformer": (
        "mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py",
        (
            *BACKBONE,
            "model.panoptic_head.in_channels=[8,16,32,64]",
            "model.panoptic_head.feat_channels=16",
            "model.panoptic_head.out_channels=16",
            "model.panoptic_head.num_queries=12",
            f"model.panoptic_head.loss_cls.class_weight={[1.0] * 13 + [0.1]}",
            *transformer("model.panoptic_head.transformer_decoder", SELF, CROSS),
            "model.panoptic_head.pixel_decoder.norm_cfg.num_groups=4",
            "model.panoptic_head.pixel_decoder.positional_encoding.num_feats=8",
            *transformer("model.panoptic_head.pixel_decoder.encoder", SELF),
            "model.panoptic_head.positional_encoding.num_feats=8",
            *(
                f"model.{head}.num_{kind}_classes={number}"
                for head in ("panoptic_head", "panoptic_fusion_head")
                for kind, number in (("things", 7), ("stuff", STUFF))
            ),
            "model.test_cfg.object_mask_thr=0.0",
            "model.test_cfg.iou_thr=0.0",
            "model.test_cfg.instance_on=True",
            "model.test_cfg.max_per_image=20",
        ),
    ),
}


@META_ARCH_REGISTRY.register()
class MyBridge(MMDetDetector):
    """Stands for a user's own, derived from the bridge."""


@META_ARCH_REGISTRY.register()
def build_my_detector(cfg):
    """Stands for a meta-architecture of the user's own that reads the nodes of the plugins."""
    return nn.Identity()


def use(cfg: CfgNode, name: str, *overrides: str) -> CfgNode:
    """Make ``cfg`` one of a small detector."""
    config, small = SMALL[name]
    cfg.MODEL.META_ARCHITECTURE = "MMDetDetector"
    cfg.MODEL.MMDET.CONFIG = config
    cfg.MODEL.MMDET.OVERRIDES = [*small, *overrides]
    cfg.MODEL.MASK_ON = name.startswith("mask")
    return cfg


@pytest.fixture(scope="module")
def packed(drawn_coco: Path) -> list[dict[str, Any]]:
    """Two images as MMDetection's pipeline gives them, resized to other shapes than they have."""
    samples = []
    for index, scale in enumerate([(96, 80), (72, 88)]):
        pipeline = [
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
            {"type": "Resize", "scale": scale, "keep_ratio": False},
            {"type": "PackDetInputs"},
        ]
        with DefaultScope.overwrite_default_scope("mmdet"):
            dataset = CocoDataset(
                ann_file=str(drawn_coco / "annotations/instances_train2017.json"),
                data_prefix={"img": str(drawn_coco / "train2017")},
                metainfo={"classes": CLASSES},
                pipeline=pipeline,
            )
        samples.append(dataset[index])
    assert all(len(sample["data_samples"].gt_instances) for sample in samples)
    return samples


def as_detectron2(sample: dict[str, Any]) -> dict[str, Any]:
    """What Detectron2's mapper would give of the same image."""
    meta, found = sample["data_samples"], sample["data_samples"].gt_instances
    instances = Instances(
        meta.img_shape,
        gt_boxes=Boxes(found.bboxes.tensor),
        gt_classes=found.labels,
        gt_masks=BitMasks(torch.from_numpy(found.masks.masks)),
    )
    height, width = meta.ori_shape
    return {"image": sample["inputs"], "height": height, "width": width, "instances": instances}


def run_in_mmdetection(detector: Any, samples: Sequence[dict[str, Any]], training: bool) -> Any:
    """What MMDetection's own training or evaluation computes."""
    batch = {key: [copy.deepcopy(sample[key]) for sample in samples] for key in samples[0]}
    data = detector.data_preprocessor(batch, training)
    torch.manual_seed(0)  # proposals are sampled, and there is dropout
    return detector(**data, mode="loss" if training else "predict")


def losses_of(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with EventStorage():
        return model.train()(copy.deepcopy(inputs))


def with_semantic(
    packed: list[dict[str, Any]], inputs: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both forms of a batch with the same stuff: two classes, things, and pixels of no class."""
    from mmengine.structures import PixelData

    packed = copy.deepcopy(packed)
    for sample, one in zip(packed, inputs, strict=True):
        ours = torch.full(one["image"].shape[1:], 255)
        ours[:40], ours[:, :30], ours[20:30, 20:30] = 1, 6, 0
        theirs = torch.full_like(ours, 255)
        theirs[:40], theirs[:, :30], theirs[20:30, 20:30] = 7, 12, 0
        one["sem_seg"] = ours
        sample["data_samples"].gt_sem_seg = PixelData(sem_seg=theirs[None])
    return packed, inputs


# ---------------------------------------------------------------------- the same in both frameworks


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_those_of_mmdetection(cfg, name, packed):
    inputs = [as_detectron2(sample) for sample in packed]
    if name == "maskformer":
        packed, inputs = with_semantic(packed, inputs)
    model = build_model(use(cfg, name)).train()
    reference = copy.deepcopy(model.detector)
    raw = run_in_mmdetection(reference, packed, training=True)
    total, values = reference.parse_losses(raw)
    losses = losses_of(model, inputs)
    assert set(losses) == {key for key in raw if "loss" in key}
    assert all(torch.equal(losses[key], values[key]) for key in losses)
    assert torch.equal(sum(losses.values()), total) and total > 0
    total.backward()
    sum(losses.values()).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", SMALL)
def test_detections_are_those_of_mmdetection_on_the_image_of_the_file(cfg, name, packed):
    model = build_model(use(cfg, name)).eval()
    with torch.no_grad():
        expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=False)
        outputs = model([as_detectron2(sample) for sample in packed])
    for output, sample in zip(outputs, expected, strict=True):
        found, theirs = output["instances"], sample.pred_instances
        height, width = sample.ori_shape
        assert found.image_size == (height, width) and len(found) == len(theirs) > 5
        assert torch.equal(found.scores, theirs.scores)
        assert torch.equal(found.pred_classes, theirs.labels)
        limits = torch.tensor([width, height, width, height])
        clipped = theirs.bboxes.clamp(min=torch.zeros(4), max=limits)
        assert torch.equal(found.pred_boxes.tensor, clipped)
        assert found.has("pred_masks") == name.startswith("mask")
        if found.has("pred_masks"):
            assert torch.equal(found.pred_masks, theirs.masks)
            assert found.pred_masks.shape[1:] == (height, width)


def test_what_is_no_loss_is_logged_and_not_added(cfg, packed):
    model = build_model(use(cfg, "mask_rcnn")).train()
    with EventStorage() as storage:
        losses = model([as_detectron2(sample) for sample in packed])
    assert "acc" not in losses and 0 <= storage.latest()["acc"][0] <= 100


def test_detector_is_told_the_iteration(cfg, packed):
    model = build_model(use(cfg, "retinanet")).train()
    with EventStorage(41):
        model([as_detectron2(packed[0])])
    assert MessageHub.get_current_instance().get_info("iter") == 41


def test_order_of_channels_does_not_matter(cfg, packed):
    bgr = [as_detectron2(sample) for sample in packed]
    rgb = [{**one, "image": one["image"][[2, 1, 0]]} for one in bgr]
    model = build_model(use(cfg, "retinanet"))
    cfg.INPUT.FORMAT = "RGB"
    twin = build_model(cfg)
    twin.load_state_dict(model.state_dict())
    expected, losses = losses_of(model, bgr), losses_of(twin, rgb)
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert not torch.equal(losses_of(twin, bgr)["loss_cls"], expected["loss_cls"])


def test_detectron2s_mean_and_deviation_are_not_used(cfg, packed):
    inputs = [as_detectron2(sample) for sample in packed]
    model = build_model(use(cfg, "retinanet"))
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    twin = build_model(cfg)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(losses_of(model, inputs)["loss_cls"], losses_of(twin, inputs)["loss_cls"])


def test_images_go_where_the_model_is(cfg):
    model = build_model(use(cfg, "retinanet")).eval()
    model.detector.data_preprocessor._device = torch.device("meta")  # which .to() does not change
    with torch.no_grad():
        (output,) = model([{"image": torch.zeros(3, 64, 64)}])
    assert output["instances"].scores.device == model.device == torch.device("cpu")


def test_image_of_which_no_other_size_is_known_keeps_its_own(cfg):
    model = build_model(use(cfg, "retinanet")).eval()
    with torch.no_grad():
        (output,) = model([{"image": torch.randint(256, (3, 48, 72), dtype=torch.uint8)}])
    assert output["instances"].image_size == (48, 72)


def test_polygons_become_the_bitmaps_that_detectron2_makes_of_them(cfg):
    corners = np.array([8.0, 8, 24, 8, 24, 20, 8, 20])
    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[8.0, 8, 24, 20]])))
    target.gt_classes = torch.tensor([0])
    bitmap = torch.zeros(1, 64, 64, dtype=torch.bool)
    bitmap[0, 8:20, 8:24] = True
    losses = []
    model = build_model(use(cfg, "mask_rcnn"))
    for masks in (PolygonMasks([[corners]]), BitMasks(bitmap)):
        target.gt_masks = masks
        image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
        losses.append(losses_of(copy.deepcopy(model), [{"image": image, "instances": target}]))
    assert torch.equal(losses[0]["loss_mask"], losses[1]["loss_mask"])


@pytest.mark.parametrize("name", SMALL)
def test_image_without_objects_trains_beside_one_with_objects(cfg, name, packed):
    empty = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}
    empty["instances"] = annotations_to_instances([], (64, 64))  # as the mapper has it
    empty["sem_seg"] = torch.full((64, 64), 255)
    _, inputs = with_semantic(packed, [as_detectron2(sample) for sample in packed])
    model = build_model(use(cfg, name))
    for batch in ([*inputs, empty], [empty]):
        losses = losses_of(model, batch)
        assert all(loss.isfinite() for loss in losses.values())


def test_losses_are_finite_in_mixed_precision(cfg, packed):
    model = build_model(use(cfg, "retinanet"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, [as_detectron2(sample) for sample in packed])
        sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


# ----------------------------------------------------------------------------------------- panoptic


def test_panoptic_segments_are_those_of_mmdetection(cfg, packed):
    model = build_model(use(cfg, "maskformer")).eval()
    nn.init.normal_(model.detector.panoptic_head.cls_embed.weight, std=3)  # of several classes
    with torch.no_grad():
        expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=False)
        outputs = model([as_detectron2(sample) for sample in packed])
    kinds = set()
    for output, sample in zip(outputs, expected, strict=True):
        segments, infos = output["panoptic_seg"]
        theirs = sample.pred_panoptic_seg.sem_seg[0]
        assert segments.shape == sample.ori_shape
        assert torch.equal(segments == 0, theirs % 1000 == 7 + STUFF)
        assert [info["id"] for info in infos] == list(range(1, len(theirs.unique()) + 1))[
            : len(infos)
        ]
        for info in infos:
            mask = segments == info["id"]
            (label,) = theirs[mask].unique().tolist()
            assert torch.equal(mask, theirs == label) and info["area"] == mask.sum()
            assert info["isthing"] == (label % 1000 < 7)
            kinds.add(info["isthing"])
    assert kinds == {True, False}


def test_panoptic_detr_is_that_of_mmdetection(cfg, packed):
    use(
        cfg,
        "detr",
        "model.type=PanopticDETR",
        "model.backbone.out_indices=(0,1,2,3)",
        *(f"{o}.embed_dims=128" for o in ("model.bbox_head", "model.panoptic_head")),
        *(f"model.encoder.layer_cfg.{part}.embed_dims=128" for part in (SELF, "ffn_cfg")),
        *(f"model.decoder.layer_cfg.{part}.embed_dims=128" for part in (SELF, CROSS, "ffn_cfg")),
        "model.neck.out_channels=128",
        "model.positional_encoding.num_feats=64",
        f"model.bbox_head.num_classes={7 + STUFF}",
        "model.panoptic_head.type=DETRPanopticHead",
        "model.panoptic_head.num_things_classes=7",
        f"model.panoptic_head.num_stuff_classes={STUFF}",
        "model.panoptic_head.in_channels=(8,16,32)",
        "model.test_cfg.score_thr=0.0",
        *(f"model.data_preprocessor.pad_{kind}=True" for kind in ("mask", "seg")),
        "model.data_preprocessor.seg_pad_value=255",
    )
    packed, inputs = with_semantic(packed, [as_detectron2(sample) for sample in packed])
    model = build_model(cfg).train()
    expected = run_in_mmdetection(copy.deepcopy(model.detector), packed, training=True)
    losses = losses_of(model, inputs)
    assert losses["loss_mask"] == expected["loss_mask"] > 0
    assert losses["loss_dice"] == expected["loss_dice"] > 0
    with torch.no_grad():
        expected = run_in_mmdetection(model.detector.eval(), packed, training=False)
        outputs = model.eval()(inputs)
    for output, sample in zip(outputs, expected, strict=True):
        segments, infos = output["panoptic_seg"]
        theirs = sample.pred_panoptic_seg.sem_seg[0]
        assert segments.shape == theirs.shape == sample.ori_shape
        assert len(infos) == len(theirs.unique()) > 0


def test_panoptic_segments_of_a_map_made_by_hand():
    detector = nn.Conv2d(1, 1, 1)
    detector.num_things_classes, detector.num_stuff_classes = 7, 6
    void, first, second, stuff = 13, 1002, 2002, 8
    labels = torch.tensor([[void, first, first], [stuff, second, stuff]])
    segments, infos = MMDetDetector(detector=detector)._unpack_panoptic(labels)
    by_id = {info.pop("id"): info for info in infos}
    assert [[by_id.get(i) for i in row] for row in segments.tolist()] == [
        [None, thing := {"isthing": True, "category_id": 2, "area": 2}, thing],
        [
            ground := {"isthing": False, "category_id": 2, "area": 2},
            {"isthing": True, "category_id": 2, "area": 1},
            ground,
        ],
    ]


def test_every_class_of_coco_gets_the_id_that_it_has_in_the_dataset():
    detector = nn.Conv2d(1, 1, 1)
    detector.num_things_classes, detector.num_stuff_classes = 80, 53
    model = MMDetDetector(detector=detector)
    evaluator = COCOPanopticEvaluator("coco_2017_val_panoptic_separated")
    _, infos = model._unpack_panoptic(torch.arange(133)[None])
    dataset_ids = [evaluator._convert_category_id(info)["category_id"] for info in infos]
    standard = _get_builtin_metadata("coco_panoptic_standard")
    things, stuff = (standard[f"{k}_dataset_id_to_contiguous_id"] for k in ("thing", "stuff"))
    places = {**stuff, **things}
    names = [standard["stuff_classes"][places[i]] for i in dataset_ids]
    assert names == list(CocoPanopticDataset.METAINFO["classes"])


def test_panoptic_detector_without_semantic_maps_says_what_to_train_on(cfg, packed):
    model = build_model(use(cfg, "maskformer"))
    with pytest.raises(ValueError, match="no 'sem_seg', .* 6 stuff classes; .*separated"):
        losses_of(model, [as_detectron2(packed[0])])


def test_panoptic_detector_is_not_asked_for_semantic_scores(cfg, registered, drawn_coco, tmp_path):
    ids = {f"{kind}_dataset_id_to_contiguous_id": {1: 0} for kind in ("thing", "stuff")}
    annotations = str(drawn_coco / "annotations/instances_val2017.json")
    register_coco_panoptic_separated("drawn", ids, "", "", "", "", annotations)
    use(cfg, "maskformer").OUTPUT_DIR = str(tmp_path)
    evaluator = build_evaluator(cfg, "drawn_separated")
    assert isinstance(evaluator, DatasetEvaluators)
    kinds = [type(part) for part in evaluator._evaluators]
    assert kinds == [COCOEvaluator, PanopticQualityEvaluator]


# -------------------------------------------------------------------------------------- checkpoints


def mmdetection_checkpoint(detector: nn.Module, path: Path, **changed: Tensor) -> str:
    """A file as MMDetection's training leaves it."""
    history = HistoryBuffer([1.0], [1])
    content = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": CLASSES}},
        "state_dict": {**detector.state_dict(), **changed},
        "message_hub": {"log_scalars": {"train/loss": history}},
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(content, path)
    return str(path)


def test_checkpoint_of_mmdetection_loads_as_it_is(cfg, tmp_path):
    first, second = (build_model(use(cfg, "detr")) for _ in range(2))
    path = mmdetection_checkpoint(first.detector, tmp_path / "epoch_1.pth")
    PluginCheckpointer(second).load(path)
    theirs = second.detector.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in first.detector.state_dict().items())


def test_checkpoint_of_detectron2_goes_back_to_mmdetection(cfg, tmp_path):
    model, other = (build_model(use(cfg, "retinanet")) for _ in range(2))
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    saved = torch.load(tmp_path / "model_final.pth")["model"]
    other.detector.load_state_dict(saved)  # strictly: no name more or less
    DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in saved.items())


def test_what_does_not_fit_is_reported_as_detectron2_does(cfg, tmp_path, caplog):
    model = build_model(use(cfg, "retinanet"))
    more = build_model(use(cfg, "retinanet", "model.bbox_head.num_classes=9"))
    del model.detector.neck.fpn_convs[0].conv.bias
    left_over = {"neck.another": torch.zeros(1)}
    path = mmdetection_checkpoint(model.detector, tmp_path / "epoch_1.pth", **left_over)
    with caplog.at_level(logging.WARNING, "fvcore.common.checkpoint"):
        PluginCheckpointer(more).load(path)
    assert "'bbox_head.retina_cls.weight' to the model due to incompatible shapes" in caplog.text
    said = re.sub(r"\x1b\[\d+m", "", caplog.text)  # names are coloured
    assert "not found in the checkpoint:\nbbox_head.retina_cls.{bias, weight}\nneck.fpn" in said
    assert "keys that are not used by the model:\n  neck.another\n" in said
    assert torch.equal(more.detector.backbone.conv1.weight, model.detector.backbone.conv1.weight)


@pytest.mark.parametrize(("parent", "prefix"), [(nn.Sequential, "0."), (AveragedModel, "module.")])
def test_parent_saves_and_loads_under_the_detectors_names(cfg, parent, prefix):
    source, target = (parent(build_model(use(cfg, "retinanet"))) for _ in range(2))
    state = source.state_dict()
    names = {prefix + name for name in build_model(cfg).detector.state_dict()}
    assert names == {name for name in state if name != "n_averaged"}
    target.load_state_dict(state)  # strictly: no name more or less
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())
    del state[f"{prefix}backbone.conv1.weight"]
    assert "backbone.conv1.weight" in target.load_state_dict(state, strict=False).missing_keys[0]


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit])
@pytest.mark.parametrize("listed", [False, True])
def test_weights_that_would_be_overwritten_are_not_read(kind, listed):
    config = load_config(SMALL["retinanet"][0], BACKBONE)
    missing, other = {"type": kind, "checkpoint": "no.pth"}, {"type": "Kaiming", "layer": "Conv2d"}
    config.model.backbone.init_cfg = [other, missing] if listed else missing
    with pytest.raises(FileNotFoundError):
        build_detector(config, pretrained=True)
    backbone = build_detector(config, pretrained=False).backbone
    assert backbone.init_cfg[0] == other if listed else "no.pth" not in str(backbone.init_cfg)


def test_pretrained_backbone_is_loaded_where_no_weights_are_given(cfg, tmp_path):
    backbone = build_model(use(cfg, "retinanet")).detector.backbone
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    overrides = [o for o in cfg.MODEL.MMDET.OVERRIDES if "init_cfg" not in o]
    overrides.append(f"model.backbone.init_cfg.checkpoint={tmp_path / 'backbone.pth'}")
    cfg.MODEL.MMDET.OVERRIDES = overrides
    loaded = build_model(cfg).detector.backbone
    assert torch.equal(loaded.conv1.weight, backbone.conv1.weight)
    cfg.MODEL.WEIGHTS = "of_the_whole_detector.pth"
    fresh = build_model(cfg).detector.backbone
    assert not torch.equal(fresh.conv1.weight, backbone.conv1.weight)


# -------------------------------------------------------------------------------------- the trainer


@pytest.fixture
def training(cfg: CfgNode, drawn_coco: Path, registered: None, tmp_path: Path) -> CfgNode:
    """Two steps on drawn scenes, and their evaluation."""
    for split in ("train", "val"):
        annotations = drawn_coco / f"annotations/instances_{split}2017.json"
        register_coco(f"drawn_{split}", str(annotations), str(drawn_coco / f"{split}2017"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("drawn_train",), ("drawn_val",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 1e-4
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 0
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


@pytest.mark.parametrize("name", ["mask_rcnn", "detr"])
def test_detector_trains_evaluates_and_resumes(training, name, tmp_path):
    use(training, name)
    start = build_model(training)
    training.MODEL.WEIGHTS = mmdetection_checkpoint(start.detector, tmp_path / "epoch_1.pth")
    check_config(training, eval_only=False, resume=False)
    trainer = PluginTrainer(training)
    trainer.resume_or_load(resume=False)
    state = trainer.model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in start.state_dict().items())
    trainer.train()
    tasks = {"bbox", "segm"} if name == "mask_rcnn" else {"bbox"}
    assert set(trainer._last_eval_results) == tasks
    resumed = PluginTrainer(training)
    resumed.resume_or_load(resume=True)
    state = trainer.model.state_dict()
    assert resumed.start_iter == 2
    assert all(torch.equal(t, state[name]) for name, t in resumed.model.state_dict().items())
    assert not torch.equal(state["backbone.conv1.weight"], start.detector.backbone.conv1.weight)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_config_trains_a_step_and_evaluates(training, path, tmp_path):
    small = training.clone()
    merge_config(training, str(path))
    training.MODEL.MMDET.OVERRIDES = [*BACKBONE, *wider(*PYRAMID, *DENSE_HEAD)]
    for node in ("DATASETS", "INPUT", "SOLVER"):
        training[node] = small[node]
    training.SOLVER.MAX_ITER = 1
    check_config(training, eval_only=False, resume=False)
    trainer = PluginTrainer(training)
    trainer.train()
    logged = json.loads((tmp_path / "output/metrics.json").read_text().splitlines()[0])
    assert np.isfinite(logged["total_loss"]) and "bbox" in trainer._last_eval_results


def test_building_leaves_detectron2s_logging_as_it_is_and_prints_nothing(cfg, capfd):
    logger = logging.getLogger("detectron2")
    loggers = [logging.getLogger(), logger, logging.getLogger("fvcore")]
    before = [(list(lg.handlers), lg.level, lg.propagate) for lg in loggers]
    build_model(use(cfg, "retinanet"))
    assert [(list(lg.handlers), lg.level, lg.propagate) for lg in loggers] == before
    assert capfd.readouterr().out == ""


# --------------------------------------------------------------------------------------- the config


def test_overrides_come_from_a_file_and_from_the_command_line(cfg, tmp_path):
    file = tmp_path / "detr.yaml"
    file.write_text(
        "MODEL:\n"
        "  META_ARCHITECTURE: MMDetDetector\n"
        "  MMDET:\n"
        '    CONFIG: "mmdet::detr/detr_r50_8xb2-150e_coco.py"\n'
        '    OVERRIDES: ["model.num_queries=50", "model.backbone.dcn=None"]\n'
        "VERSION: 2\n"
    )
    merge_config(cfg, str(file))
    node = cfg.MODEL.MMDET
    model = load_config(node.CONFIG, node.OVERRIDES).model
    assert model.num_queries == 50 and model.backbone.dcn is None
    options = ["MODEL.MMDET.OVERRIDES", "['model.num_queries=7','model.backbone.strides=(1,2)']"]
    merge_config(cfg, options=options)
    model = load_config(node.CONFIG, node.OVERRIDES).model
    assert model.num_queries == 7 and model.backbone.strides == (1, 2)
    assert "dcn" not in model.backbone


def test_config_may_be_a_file_of_the_users(cfg, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'\nmodel = dict(num_queries=9)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.py").model.num_queries == 9


def test_cost_is_what_mmdetections_side_counts(cfg):
    use(cfg, "mask_rcnn")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    config = load_config(*SMALL["mask_rcnn"])
    assert analyze(cfg) == analyze_in_mmdetection(config, (64, 96))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"MODEL.MMDET.CONFIG": ""}, "MODEL.MMDET.CONFIG: names no config; expected a path, or"),
        ({"MODEL.MMDET.CONFIG": "no.py"}, "MODEL.MMDET.CONFIG 'no.py': FileNotFoundError"),
        ({"MODEL.MMDET.CONFIG": "mmdet::detr/no.py"}, "'mmdet::detr/no.py': FileNotFoundError"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck"]}, "'model.neck' is no override such as 'model."),
        ({"MODEL.MMDET.OVERRIDES": ["train_cfg.max_epochs=1"]}, "nothing but its model is read"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck.in_channels=[(1]"]}, "Imbalanced brackets"),
        ({"MODEL.MMDET.OVERRIDES": ["model.neck.type.x=1"]}, "'model.neck.type.x=1': TypeError"),
        (
            {"MODEL.MMDET.OVERRIDES": ["model.nekc=1"]},
            "nekc",
        ),
        ({"MODEL.MASK_ON": False}, "MODEL.MASK_ON: False, but the detector of 'mmdet::mask_rcnn/"),
        ({"INPUT.FORMAT": "L"}, "INPUT.FORMAT: expected 'BGR' or 'RGB' for a detector of"),
        ({"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED: Detectron2 has test-time augmentation"),
        ({"MODEL.WEIGHTS": "no.pth"}, "MODEL.WEIGHTS: there is no checkpoint 'no.pth'"),
        (  # which every config of the model zoo hands on
            {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-50.pkl"},
            "MODEL.WEIGHTS: 'detectron2://ImageNetPretrained/MSRA/R-50.pkl' has Detectron2's names",
        ),
        ({"MODEL.WEIGHTS": "catalog://ImageNetPretrained/R-50"}, 'set MODEL.WEIGHTS to ""'),
        (
            {"MODEL.MMDET.OVERRIDES": ["model.backbone.depth=51"]},
            "MODEL.MMDET.CONFIG/OVERRIDES: model.backbone.depth: no ResNet of depth 51",
        ),
        (
            {"MODEL.RESNETS.PLUGINS": [{"NAME": "ida", "STAGES": ["res5"]}]},
            "MODEL.RESNETS.PLUGINS is set, but MODEL.META_ARCH",
        ),
        (
            {"MODEL.META_ARCHITECTURE": "GeneralizedRCNN"},
            "MODEL.MMDET is set, but MODEL.META_ARCHITECTURE is 'GeneralizedRCNN'",
        ),
        (
            {"MODEL.META_ARCHITECTURE": "MMDetDetektor"},
            "MODEL.MMDET is set, but MODEL.META_ARCHITECTURE is 'MMDetDetektor'",
        ),
    ],
)
def test_wrong_setting_is_one_clear_error(training, settings, reason):
    use(training, "mask_rcnn")
    training.merge_from_list([part for pair in settings.items() for part in pair])
    with pytest.raises(ValueError) as error:
        check_config(training, eval_only=False, resume=False)
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("detr", "bbox_head.num_classes=9", "has 7 thing classes, but the detector of .* has 9"),
        ("mask_rcnn", "roi_head.bbox_head.num_classes=9", "has 7 thing classes, but .* has 9"),
        ("maskformer", "panoptic_head.num_stuff_classes=6", "has 2 stuff classes, but .* has 7"),
    ],
)
def test_number_of_classes_is_compared_with_the_datasets(training, name, override, reason):
    MetadataCatalog.get("drawn_val").set(stuff_classes=["things", "a"])
    use(training, name, f"model.{override}")
    with pytest.raises(ValueError, match=f"DATASETS.TEST: 'drawn_val' {reason}"):
        check_config(training, eval_only=True, resume=False)


def test_number_of_classes_of_a_cascade_is_known(training):
    training.MODEL.META_ARCHITECTURE = "MMDetDetector"
    training.MODEL.MMDET.CONFIG = "mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py"
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    with pytest.raises(ValueError, match="has 7 thing classes, but the detector of .* has 80; set"):
        check_config(training, eval_only=True, resume=False)


def test_weights_with_detectron2s_names_are_refused(training, tmp_path):
    path = tmp_path / "R-18.pth"
    torch.save({"model": {"backbone.res2.0.conv1.weight": torch.zeros(1)}}, path)
    training.MODEL.WEIGHTS = str(path)
    with pytest.raises(ValueError, match="^MODEL.WEIGHTS: .*R-18.pth' has Detectron2's names, of"):
        check_config(use(training, "retinanet"), eval_only=False, resume=False)


def test_weights_of_a_training_with_detectron2_pass(training, tmp_path):
    model = build_model(use(training, "retinanet"))
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    training.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    check_config(training, eval_only=False, resume=False)


# Whole configs: they are refused before anything of them is built in memory.
@pytest.mark.parametrize(
    ("config", "reason", "evaluates"),
    [
        ("tood/tood_r50_fpn_1x_coco.py", "trains by the number of the epoch, as TOOD does", True),
        ("htc/htc_r50_fpn_1x_coco.py", "learns a semantic map, which only panoptic", True),
        ("glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py", "reads texts, as", False),
        ("grounding_dino/grounding_dino_r50_scratch_8xb2_1x_coco.py", "reads texts, as", False),
    ],
)
def test_detector_that_is_not_given_what_it_asks_for_is_refused(
    training, config, reason, evaluates
):
    training.MODEL.META_ARCHITECTURE = "MMDetDetector"
    training.MODEL.MMDET.CONFIG = f"mmdet::{config}"
    training.MODEL.MASK_ON = True
    training.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=f"^MODEL.MMDET.CONFIG: the .* {reason}"):
        check_config(training, eval_only=False, resume=False)
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    if evaluates:
        check_config(training, eval_only=True, resume=False)
    else:
        with pytest.raises(ValueError, match=reason):
            check_config(training, eval_only=True, resume=False)


@pytest.mark.parametrize("name", ["mask_rcnn", "maskformer"])
def test_masks_are_asked_for_where_they_are_learned(training, name):
    use(training, name, "model.data_preprocessor.pad_mask=False").MODEL.MASK_ON = False
    with pytest.raises(ValueError, match="^MODEL.MASK_ON: False, but the detector of .* set it to"):
        check_config(training, eval_only=False, resume=False)
    training.MODEL.WEIGHTS = "https://example.com/weights.pth"
    check_config(training, eval_only=True, resume=False)


def test_check_takes_no_memory_where_the_detector_allows_it(training, monkeypatch):
    devices = []
    for kind in ("retinanet", "mask_rcnn", "detr", "maskformer"):
        monkeypatch.setattr(
            mmdet_bridge,
            "_check_classes",
            lambda detector, *_: devices.append(next(detector.parameters()).device.type),
        )
        check_config(use(training, kind), eval_only=False, resume=False)
    assert set(devices) == {"meta"}
    # It computes its layers' rates of dropping with tensors.
    training.MODEL.MMDET.CONFIG = "mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py"
    training.MODEL.MMDET.OVERRIDES = []
    check_config(training, eval_only=False, resume=False)
    assert devices[-1] == "cpu"


def test_bridge_of_the_users_own_is_one_to_every_tool(training):
    use(training, "retinanet")
    training.INPUT.MIN_SIZE_TEST, training.INPUT.MAX_SIZE_TEST = 64, 64
    cost, mismatches = analyze(training), find_mismatches(training)
    training.MODEL.META_ARCHITECTURE = "MyBridge"
    assert is_bridge(training) and isinstance(build_model(training), MyBridge)
    check_config(training, eval_only=False, resume=False)
    assert (analyze(training), find_mismatches(training)) == (cost, mismatches)
    training.MODEL.MMDET.CONFIG = ""
    with pytest.raises(ValueError, match="^MODEL.MMDET.CONFIG: names no config"):
        check_config(training, eval_only=False, resume=False)


def test_meta_architecture_of_the_users_own_may_read_what_it_likes(training):
    use(training, "retinanet").MODEL.META_ARCHITECTURE = "build_my_detector"
    check_config(training, eval_only=False, resume=False)
    assert not is_bridge(training)


def lazy(name: str) -> DictConfig:
    config, overrides = SMALL[name]
    return LazyCall(MMDetDetector)(
        detector=LazyCall(build_detector)(
            config=LazyCall(load_config)(config=config, overrides=list(overrides)),
            pretrained=False,
        )
    )


def test_lazy_config_builds_the_detector(cfg):
    names = build_model(use(cfg, "detr")).state_dict().keys()
    assert instantiate(lazy("detr")).state_dict().keys() == names


@pytest.mark.parametrize("eval_only", [False, True])
def test_lazy_config_starts_from_a_checkpoint_of_mmdetection(
    packed, tmp_path, monkeypatch, eval_only
):
    source = instantiate(lazy("retinanet")).detector
    cfg = OmegaConf.create({"model": lazy("retinanet"), "dataloader": {}})
    cfg.train = model_zoo.get_config("common/train.py").train
    cfg.train.output_dir, cfg.train.device, cfg.train.max_iter = str(tmp_path), "cpu", 1
    cfg.train.init_checkpoint = mmdetection_checkpoint(source, tmp_path / "epoch_1.pth")
    batch = [as_detectron2(sample) for sample in packed]
    cfg.dataloader.train = LazyCall(lambda: [batch])()
    cfg.optimizer = model_zoo.get_config("common/optim.py").SGD
    cfg.optimizer.lr = 0.0
    cfg.lr_multiplier = LazyCall(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    models: list[nn.Module] = []
    monkeypatch.setattr(lazyconfig_train_net, "default_setup", lambda *_: None)
    monkeypatch.setattr(lazyconfig_train_net, "evaluate", lambda _, model: models.append(model))
    lazyconfig_train_net.main(Namespace(eval_only=eval_only, resume=False), cfg)
    (model,) = models
    state = source.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_without_mmdetection_the_error_says_what_to_install(training, monkeypatch):
    use(training, "detr")
    for name in [m for m in sys.modules if m.partition(".")[0] == "mm_plugins"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(ImportError, match=r"pip install -e .\[mmdet\]"):
        build_model(training)
    with pytest.raises(ValueError, match=r"'MMDetDetector': .*pip install -e .\[mmdet\]"):
        check_config(training, eval_only=False, resume=False)
