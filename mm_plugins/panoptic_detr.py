"""DETR with its mask head, for panoptic segmentation (arXiv:2005.12872, section 4.4).

In a config on one of MMDetection's DETR::

    custom_imports = dict(imports=['mm_plugins'])
    model = dict(
        type='PanopticDETR',
        backbone=dict(out_indices=(0, 1, 2, 3)),
        bbox_head=dict(num_classes=133),
        panoptic_head=dict(type='DETRPanopticHead'),
        data_preprocessor=dict(pad_mask=True, mask_pad_value=0, pad_seg=True, seg_pad_value=255))

Every segment of an image, thing or stuff, is an object with a box and a mask. ``gt_instances`` has
the things and ``gt_sem_seg`` the stuff, as ``LoadPanopticSegments`` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.models.detectors import DETR
from mmdet.models.utils import preprocess_panoptic_gt
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import reduce_mean
from mmengine.model import BaseModule
from mmengine.structures import InstanceData, PixelData
from torch import Tensor
from torchvision.ops import masks_to_boxes

from plugin_core.errors import ArgumentError, check_one_of
from plugin_core.methods.detr_masks import DETRMasks, panoptic_segments

_TRAINABLE = ("all", "boxes", "masks")
_TEST_SETTINGS = ("max_per_img", "panoptic_on", "instance_on", "score_thr")
_FOCAL_LOSS = {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25}
_DICE_LOSS = {"type": "DiceLoss", "naive_dice": True, "eps": 1.0}


@MODELS.register_module()
class PanopticDETR(DETR):
    """DETR with a mask head.

    Args:
        panoptic_head: config of a :class:`DETRPanopticHead`.
        trains: "all": boxes and masks together; "boxes": the detector alone, and masks are neither
            computed in training nor in evaluation; "masks": the mask head alone, on a detector
            that stays as it is, which ``load_from`` brings along. The authors train "boxes" and
            then "masks".
        test_cfg: of DETR's, ``max_per_img``; of the panoptic head's, all others.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    def __init__(
        self, *args: Any, panoptic_head: dict[str, Any], trains: str = "all", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_one_of("trains", trains, _TRAINABLE)
        self.trains = trains
        if "test_cfg" in panoptic_head:
            raise ArgumentError("panoptic_head.test_cfg", "leave it out; model.test_cfg is read")
        for key in self.test_cfg or {}:
            if key not in _TEST_SETTINGS:
                raise ArgumentError(
                    f"test_cfg.{key}", f"is unknown; known are {', '.join(_TEST_SETTINGS)}"
                )
        self.panoptic_head = MODELS.build({**panoptic_head, "test_cfg": self.test_cfg})
        self.num_things_classes: int = self.panoptic_head.num_things_classes
        self.num_stuff_classes: int = self.panoptic_head.num_stuff_classes
        num_classes = self.num_things_classes + self.num_stuff_classes
        if self.bbox_head.num_classes != num_classes:
            raise ArgumentError(
                "bbox_head.num_classes",
                f"must be {num_classes}, the panoptic head's {self.num_things_classes} things and "
                f"{self.num_stuff_classes} stuff classes, got {self.bbox_head.num_classes}",
            )
        if self.bbox_head.loss_cls.use_sigmoid:
            raise ArgumentError(
                "bbox_head.loss_cls.use_sigmoid",
                "must be False, as segments are made of queries that are not the class of no "
                "object, got True",
            )
        for name, module in self.named_children():
            is_trained = trains == "all" or (trains == "masks") == (name == "panoptic_head")
            if not is_trained:
                module.requires_grad_(False)

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Give the backbone's maps, and in place of the last what the encoder gets."""
        maps = self.backbone(batch_inputs)
        if len(maps) != 4:
            raise ValueError(
                f"model.backbone.out_indices: must be (0, 1, 2, 3) for the mask head, which needs "
                f"all maps; the backbone gives {len(maps)}"
            )
        return (*maps[:-1], *self.neck(maps[-1:]))

    def forward_decoder(self, **inputs: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = super().forward_decoder(**inputs)
        return {**outputs, "memory": inputs["memory"], "memory_mask": inputs["memory_mask"]}

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]
    ) -> dict[str, Tensor]:
        img_feats = self.extract_feat(batch_inputs)
        # BatchFormer repeats the samples here.
        outputs = self.forward_transformer(img_feats, batch_data_samples)
        samples = [self._with_stuff(sample) for sample in batch_data_samples[: len(batch_inputs)]]
        samples *= len(batch_data_samples) // len(batch_inputs)
        scores, boxes = self.bbox_head(outputs["hidden_states"])
        losses: dict[str, Tensor] = self.bbox_head.loss_by_feat(
            scores, boxes, [s.gt_instances for s in samples], [s.metainfo for s in samples]
        )
        if self.trains != "boxes":
            matches = self._match(scores[-1], boxes[-1], samples)
            losses |= self.panoptic_head.loss(img_feats, outputs, samples, matches)
        return losses

    def _with_stuff(self, sample: DetDataSample) -> DetDataSample:
        """A sample whose ``gt_instances`` are all segments, with masks (N, H, W) of bool."""
        things = sample.gt_instances
        labels, masks = preprocess_panoptic_gt(
            things.labels,
            things.masks,
            sample.gt_sem_seg.sem_seg if "gt_sem_seg" in sample else None,
            self.num_things_classes,
            self.num_stuff_classes,
        )
        boxes = masks_to_boxes(masks[len(things) :])
        boxes[:, 2:] += 1  # of the last pixel the far edge
        boxes = torch.cat([things.bboxes, boxes.to(things.bboxes)])
        segments = InstanceData(bboxes=boxes, labels=labels, masks=masks.bool())
        return DetDataSample(metainfo=sample.metainfo, gt_instances=segments)

    @torch.no_grad()
    def _match(
        self, scores: Tensor, boxes: Tensor, samples: Sequence[DetDataSample]
    ) -> list[tuple[Tensor, Tensor]]:
        """For each image the queries that have a segment, and which, by scores and boxes."""
        matches = []
        for sample, of_image, box in zip(samples, scores, boxes, strict=True):
            height, width = sample.img_shape
            scale = box.new_tensor([width, height, width, height])
            result = self.bbox_head.assigner.assign(
                InstanceData(scores=of_image, bboxes=bbox_cxcywh_to_xyxy(box) * scale),
                sample.gt_instances,
                img_meta=sample.metainfo,
            )
            queries = result.gt_inds.gt(0).nonzero()[:, 0]
            matches.append((queries, result.gt_inds[queries] - 1))
        return matches

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], rescale: bool = True
    ) -> list[DetDataSample]:
        img_feats = self.extract_feat(batch_inputs)
        outputs = self.forward_transformer(img_feats, batch_data_samples)
        logits, boxes = self.bbox_head(outputs["hidden_states"][-1:])
        metas = [sample.metainfo for sample in batch_data_samples]
        found = self.bbox_head.predict_by_feat(logits, boxes, metas, rescale)
        if self.trains != "boxes":
            self.panoptic_head.predict(
                img_feats, outputs, logits[-1].softmax(dim=-1), batch_data_samples, found, rescale
            )
        for sample, instances in zip(batch_data_samples, found, strict=True):
            sample.pred_instances = instances[instances.labels < self.num_things_classes]
        return batch_data_samples

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, ...]:
        """Give scores and boxes of all layers, and all queries' masks, logits (B, Q, h, w)."""
        img_feats = self.extract_feat(batch_inputs)
        outputs = self.forward_transformer(img_feats, batch_data_samples)
        scores, boxes = self.bbox_head(outputs["hidden_states"])
        if self.trains == "boxes":
            return scores, boxes
        every = torch.ones_like(scores[-1, :, :, 0], dtype=torch.bool)
        masks = self.panoptic_head(img_feats, outputs, *every.nonzero(as_tuple=True))
        return scores, boxes, masks.unflatten(0, every.shape)


@MODELS.register_module()
class DETRPanopticHead(BaseModule):
    """The mask head of a :class:`PanopticDETR`, its losses and its segments.

    Args:
        num_things_classes: classes of things, the first.
        num_stuff_classes: classes of stuff, the others.
        embed_dims: channels of the transformer, a multiple of 128.
        num_heads: of the attention to the encoder's map, a multiple of 8.
        in_channels: of the backbone's first three maps.
        loss_mask: config of the loss of the masks' pixels; the authors' focal loss.
        loss_dice: config of the loss of the masks' overlap; the authors' dice loss.
        test_cfg: ``panoptic_on`` (True) for segments; they are made of queries whose score is above
            ``score_thr`` (0.85). ``instance_on`` (False) for masks of the boxes.
        init_cfg: of mmengine.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    def __init__(
        self,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        embed_dims: int = 256,
        num_heads: int = 8,
        in_channels: Sequence[int] = (256, 512, 1024),
        loss_mask: dict[str, Any] | None = None,
        loss_dice: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        self.num_things_classes = num_things_classes
        self.num_stuff_classes = num_stuff_classes
        self.masks = DETRMasks(embed_dims, num_heads, in_channels)
        self.loss_mask = MODELS.build(loss_mask or _FOCAL_LOSS)
        self.loss_dice = MODELS.build(loss_dice or _DICE_LOSS)
        settings = test_cfg or {}
        self.panoptic_on: bool = settings.get("panoptic_on", True)
        self.instance_on: bool = settings.get("instance_on", False)
        self.score_thr: float = settings.get("score_thr", 0.85)

    def forward(
        self,
        img_feats: Sequence[Tensor],
        outputs: dict[str, Any],
        images: Tensor,
        queries: Tensor,
    ) -> Tensor:
        """Compute the masks of some queries.

        Args:
            img_feats: the backbone's first three maps, and the encoder's input.
            outputs: ``hidden_states`` (layers, B, Q, C), ``memory`` (B, L, C) and ``memory_mask``
                (B, L), True where there is padding, or None.
            images: (N,), and
            queries: (N,), the queries' places in ``hidden_states``.

        Returns:
            Logits (N, h, w) of the finest map.
        """
        *maps, source = img_feats
        size = source.shape[-2:]
        padding = outputs["memory_mask"]
        logits: Tensor = self.masks(
            outputs["hidden_states"][-1][images, queries],
            images,
            outputs["memory"].transpose(1, 2).unflatten(2, size),
            source,
            maps,
            None if padding is None else padding.unflatten(1, size),
        )
        return logits

    def loss(
        self,
        img_feats: Sequence[Tensor],
        outputs: dict[str, Any],
        samples: Sequence[DetDataSample],
        matches: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Compute the losses of the masks of those queries that have a segment.

        Args:
            img_feats: as of :meth:`forward`.
            outputs: as of :meth:`forward`.
            samples: with masks (n, H, W) of bool, of the padded images.
            matches: for each image the queries, and the places of their segments.
        """
        images = torch.cat([q.new_full(q.shape, i) for i, (q, _) in enumerate(matches)])
        queries = torch.cat([q for q, _ in matches])
        truth = torch.cat(
            [s.gt_instances.masks[places] for s, (_, places) in zip(samples, matches, strict=True)]
        )
        count = reduce_mean(img_feats[0].new_tensor([float(len(queries))])).clamp(min=1).item()
        logits = self(img_feats, outputs, images, queries)
        height, width = truth.shape[-2:]
        logits = F.interpolate(
            logits[:, None].float(), size=(height, width), mode="bilinear", align_corners=False
        ).flatten(1)
        truth = truth.flatten(1)
        return {
            # A class's index is 0, no class's 1.
            "loss_mask": self.loss_mask(
                logits.reshape(-1, 1),
                1 - truth.reshape(-1).long(),
                avg_factor=count * height * width,
            ),
            "loss_dice": self.loss_dice(logits, truth.to(logits), avg_factor=count),
        }

    def predict(
        self,
        img_feats: Sequence[Tensor],
        outputs: dict[str, Any],
        probabilities: Tensor,
        samples: Sequence[DetDataSample],
        found: Sequence[InstanceData],
        rescale: bool,
    ) -> None:
        """Add ``pred_panoptic_seg`` to samples, and masks to the detected boxes.

        Args:
            img_feats: as of :meth:`forward`.
            outputs: as of :meth:`forward`.
            probabilities: of the classes and of no object, (B, Q, K + 1).
            samples: of the batch.
            found: boxes of each image, as ``DETRHead.predict_by_feat`` gives them.
            rescale: to the images as they are in their files.
        """
        scores, labels = probabilities.max(dim=-1)
        no_object = probabilities.shape[-1] - 1
        in_segments = (scores > self.score_thr) & (labels != no_object) & self.panoptic_on
        wanted = in_segments | self.instance_on
        images, queries = wanted.nonzero(as_tuple=True)
        logits = self(img_feats, outputs, images, queries)
        for i, (sample, instances) in enumerate(zip(samples, found, strict=True)):
            size = (sample.ori_shape if rescale else sample.img_shape)[:2]
            masks = _upsample(logits[images == i], sample)
            if self.instance_on:
                # The queries in the order of DETRHead
                best = probabilities[i, :, :-1].max(dim=-1).values.topk(len(instances)).indices
                binary = (masks[best] > 0).float()[:, None]
                instances.masks = F.interpolate(binary, size=size)[:, 0].bool()
            if self.panoptic_on:
                masks = masks[in_segments[i][wanted[i]]]
                segments = self._segments(masks, labels[i][in_segments[i]], size)
                sample.pred_panoptic_seg = PixelData(sem_seg=segments[None])

    def _segments(self, logits: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """A map (size) of class + instance · INSTANCE_OFFSET, the number of classes for none."""
        is_thing = labels < self.num_things_classes
        places, kept = panoptic_segments(logits, labels, is_thing, size)
        labels, is_thing = labels[kept], is_thing[kept]
        ids = labels + is_thing * is_thing.cumsum(0) * INSTANCE_OFFSET
        nothing = labels.new_tensor([self.num_things_classes + self.num_stuff_classes])
        return torch.cat([ids, nothing])[places]  # -1 is the last


def _upsample(logits: Tensor, sample: DetDataSample) -> Tensor:
    """Masks (N, H, W) of the image without its padding."""
    height, width = sample.img_shape[:2]
    padded = F.interpolate(
        logits[:, None], size=sample.batch_input_shape, mode="bilinear", align_corners=False
    )
    return padded[:, 0, :height, :width]
