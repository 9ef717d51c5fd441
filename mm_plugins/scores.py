"""Reads a head's scores of phrases or classes, and where an image is annotated with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import ATSSVLFusionHead
from mmdet.models.detectors import BaseDetector
from mmdet.models.roi_heads import (
    CascadeRoIHead,
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mm_plugins.mixins import not_for
from plugin_core.inspection.recorder import Call, record_calls


@dataclass(frozen=True, eq=False)
class Phrase:
    """A phrase, or a class, that an image is annotated with.

    Args:
        label: its number, as predictions give it.
        columns: of the head's logits: the phrase's tokens, or the class.
        boxes: (N, 4).
    """

    label: int
    columns: list[int]
    boxes: Tensor


class Scores:
    """Reads the logits of a detector's candidates, whatever its head calls them.

    Candidates are queries, anchors at all positions, or regions. Columns of their logits are tokens
    of the text, or classes.

    Args:
        detector: with a ``bbox_head``, or a ``roi_head`` that has one.

    Raises:
        ArgumentError: if it has neither.
    """

    def __init__(self, detector: BaseDetector) -> None:
        self.detector: Any = detector
        if not (hasattr(detector, "bbox_head") or hasattr(detector, "roi_head")):
            raise not_for(detector, "attention_mask_consistency")

    @property
    def reads_text(self) -> bool:
        return hasattr(self.detector, "language_model")

    def _modules(self) -> tuple[nn.Module, nn.Module | None]:
        """The head, and what cuts out the regions that it sees; the last ones of a cascade."""
        roi_head = getattr(self.detector, "roi_head", None)
        if roi_head is None:
            return self.detector.bbox_head, None
        head, extractor = roi_head.bbox_head, roi_head.bbox_roi_extractor
        if isinstance(head, nn.ModuleList):
            head, extractor = head[-1], extractor[-1]
        return head, extractor

    @property
    def is_of_each_region(self) -> bool:
        """Whether the logits of a region are known to depend on no other region."""
        head, extractor = self._modules()
        return (
            type(getattr(self.detector, "roi_head", None)) in (StandardRoIHead, CascadeRoIHead)
            and not self.detector.roi_head.with_shared_head
            and type(extractor) is SingleRoIExtractor
            and type(head) in (ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)
            and all(
                type(module) in _ROW_WISE
                for name, child in head.named_children()
                if not name.startswith("loss_")
                for module in child.modules()
            )
        )

    @contextmanager
    def record(self) -> Iterator[Logits]:
        """Record a forward pass; gives what reads the logits afterwards."""
        head, extractor = self._modules()
        with record_calls([head] if extractor is None else [head, extractor]) as calls:
            yield Logits(self, head, extractor, calls)

    def _dense_logits(self, head: Any, output: Any) -> Tensor:
        """(B, candidates, columns) from the output of a head without regions."""
        if isinstance(output, Tensor) and output.dim() == 4:
            # A DETR's, from each decoder layer; denoising queries come first, DDQ's dense ones last
            of_ddq = getattr(self.detector, "cache_dict", {}).get("dis_query_info")
            if of_ddq is not None:
                start, count = of_ddq
                return output[-1][:, start : start + count]
            return output[-1][:, -self.detector.num_queries :]
        if isinstance(head, ATSSVLFusionHead):
            return torch.cat(output, dim=1)
        columns = getattr(head, "cls_out_channels", 0)
        if not isinstance(output, (list, tuple)) or not all(
            isinstance(x, Tensor) and x.dim() == 4 and columns and x.shape[1] % columns == 0
            for x in output
        ):
            raise ValueError(
                f"{type(head).__name__} gives no class scores as the heads of R-CNNs, "
                "RetinaNet and other dense detectors, DETRs and grounding detectors do"
            )
        levels = [
            level.unflatten(1, (-1, head.cls_out_channels)).permute(0, 1, 3, 4, 2).flatten(1, 3)
            for level in output
        ]
        return torch.cat(levels, dim=1)

    # --- where an image has what ---------------------------------------------------------------- #

    def phrases(self, sample: DetDataSample, logits: Tensor) -> list[Phrase]:
        """The phrases that an image is annotated with, after a forward pass of the detector.

        A phrase has no columns if there are no logits, or if it is behind the last token that the
        text model reads.

        Args:
            sample: of the image.
            logits: (candidates, columns) of the image.
        """
        annotated = sample.get("gt_instances")
        if annotated is None or not len(annotated):
            return []
        boxes = get_box_tensor(annotated.bboxes)
        labels = torch.as_tensor(annotated_phrases(sample.to_dict()), device=boxes.device)
        # The logits of padding are -inf.
        known = set(logits[0].isfinite().nonzero().flatten().tolist()) if len(logits) else set()
        phrases = []
        for label in labels.unique().tolist():
            chosen = labels == label
            columns = self._columns(sample, label, int(chosen.nonzero()[0]))
            found = [column for column in columns if column in known]
            phrases.append(Phrase(label, found, boxes[chosen]))
        return phrases

    def _columns(self, sample: DetDataSample, label: int, box: int) -> list[int]:
        if not self.reads_text:
            return [label]
        positive_maps = sample.gt_instances.get("positive_maps")  # made in training
        if positive_maps is not None:
            columns: list[int] = positive_maps[box].nonzero().flatten().tolist()
            return columns
        of_labels = sample.get("token_positive_map")
        if of_labels is not None:
            return list(of_labels.get(label + 1, ()))
        # The whole text is one phrase; the first and the last token are no words.
        model = self.detector.language_model
        return list(
            range(1, min(len(model.tokenizer(sample.text).input_ids), model.max_tokens) - 1)
        )


class Logits:
    """Logits of a recorded forward pass.

    Args:
        scores: of the detector.
        head: that gave them.
        extractor: that cut out the head's regions, if any.
        calls: of both.
    """

    def __init__(
        self, scores: Scores, head: nn.Module, extractor: nn.Module | None, calls: Sequence[Call]
    ) -> None:
        self._scores, self._head, self._extractor, self._calls = scores, head, extractor, calls

    def _last(self, module: nn.Module) -> Call:
        return [call for call in self._calls if call.module is module][-1]

    def __call__(self, images: int, hidden: Tensor | None = None) -> list[Tensor]:
        """The logits (candidates, columns) of each of so many images.

        Where BatchFormerV2 makes two streams of the images, they are the first stream's. Given
        hidden states of a DINO's last decoder layer, it computes their logits.
        """
        head: Any = self._head
        if not any(call.module is head for call in self._calls):
            return []
        last = self._last(head)
        if hidden is not None:
            # Behind the hidden states and references are the text and its mask.
            branch = head.cls_branches[len(last.output[0]) - 1]
            return list(branch(hidden, *last.args[2:])[:images])
        if self._extractor is not None:
            regions = self._last(self._extractor).args[1]
            # Without the logits of a BatchFormer's second stream
            of_classes = last.output[0][: len(regions)]
            return [of_classes[regions[:, 0] == i] for i in range(images)]
        return list(self._scores._dense_logits(head, last.output[0])[:images])

    def of_regions(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute the logits of some regions of each image again."""
        extractor: Any = self._extractor
        maps, regions = self._last(extractor).args
        chosen = [regions[regions[:, 0] == i][list(of_image)] for i, of_image in enumerate(rows)]
        together = torch.cat(chosen)
        levels = extractor.map_roi_levels(together, len(maps))
        # The extractor has the levels without a region in its graph, too.
        maps = [x if (levels == i).any() else x.detach() for i, x in enumerate(maps)]
        logits: Tensor = self._head(extractor(maps, together))[0]
        return list(logits.split([len(of_image) for of_image in rows]))


# Modules of heads that see each region alone
_ROW_WISE = frozenset(
    {
        *(nn.ModuleList, nn.Sequential, ConvModule, nn.Conv2d, nn.Linear, nn.ReLU),
        *(nn.GroupNorm, nn.LayerNorm, nn.Identity, nn.AvgPool2d),
    }
)


def annotated_phrases(sample: dict[str, Any]) -> list[int]:
    """The number of the phrase, or class, of each annotated box of a test image.

    Flickr30k's images say it, an image with one expression such as RefCOCO's has one, and COCO's
    annotations have classes.

    Args:
        sample: a ``DetDataSample`` as a dict, with ``gt_instances``.
    """
    labels = sample["gt_instances"]["labels"]
    if "phrase_ids" in sample:
        return [int(phrase) for phrase in sample["phrase_ids"]]
    if isinstance(sample.get("tokens_positive"), int):
        return [0] * len(labels)
    return [int(label) for label in labels]


def phrase_score(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Scalar: the greatest that a candidate gives the phrase, of its tokens' mean logits.

    Args:
        logits: (candidates, columns) of an image.
        columns: of the phrase.
    """
    return logits[:, list(columns)].mean(1).amax()
