"""Reads a head's scores of phrases or classes, and where an image is annotated with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import ATSSVLFusionHead
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from mm_plugins.mixins import not_for
from plugin_core.inspection.recorder import record_calls


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

    @contextmanager
    def record(self) -> Iterator[Callable[..., list[Tensor]]]:
        """Record a forward pass; gives a function that reads the logits afterwards.

        The function takes the number of images, and gives (candidates, columns) of each. Where
        BatchFormerV2 makes two streams of the images, they are the first stream's. Given hidden
        states of a DINO's last decoder layer, it computes their logits.
        """
        head, extractor = self._modules()
        modules = [head] if extractor is None else [head, extractor]
        with record_calls(modules) as calls:

            def logits(images: int, hidden: Tensor | None = None) -> list[Tensor]:
                outputs = [call.output for call in calls if call.module is head]
                if hidden is not None:
                    layer = len(outputs[-1][0]) - 1
                    # Behind the hidden states and references are the text and its mask.
                    text = [call.args[2:] for call in calls if call.module is head][-1]
                    return list(head.cls_branches[layer](hidden, *text)[:images])
                if not outputs:
                    return []
                if extractor is not None:
                    regions = [call.args[1] for call in calls if call.module is extractor][-1]
                    # Without the logits of a BatchFormer's second stream
                    of_classes = outputs[-1][0][: len(regions)]
                    return [of_classes[regions[:, 0] == i] for i in range(images)]
                return list(self._dense_logits(head, outputs[-1][0])[:images])

            yield logits

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
