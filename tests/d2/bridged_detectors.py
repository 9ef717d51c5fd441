"""Small detectors of MMDetection for Detectron2, and batches and checkpoints of both frameworks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from mmdet.datasets import CocoDataset
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.registry import DefaultScope
from torch import Tensor, nn

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


def use(cfg: CfgNode, name: str, *overrides: str) -> CfgNode:
    """Make ``cfg`` one of a small detector."""
    config, small = SMALL[name]
    cfg.MODEL.META_ARCHITECTURE = "MMDetDetector"
    cfg.MODEL.MMDET.CONFIG = config
    cfg.MODEL.MMDET.OVERRIDES = [*small, *overrides]
    cfg.MODEL.MASK_ON = name.startswith("mask")
    return cfg


def pack(coco: Path) -> list[dict[str, Any]]:
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
                ann_file=str(coco / "annotations/instances_train2017.json"),
                data_prefix={"img": str(coco / "train2017")},
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
