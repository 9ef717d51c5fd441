"""Transforms of grounding data."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class PhrasesAsText(BaseTransform):
    """The phrases of a caption, one after the other, are the text: what GLIP can be trained with.

    MMDetection's GLIP takes texts that are lists of names only. Needs ``text``, ``phrases`` as
    ``ODVGDataset`` gives them, and the boxes' labels; changes ``text`` to a tuple, and the labels
    to positions in it.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        phrases = results.pop("phrases")
        labels = sorted(phrases)
        results["text"] = tuple(_plain(phrases[label]["phrase"]) for label in labels)
        position = {label: i for i, label in enumerate(labels)}
        results["gt_bboxes_labels"] = np.array(
            [position[label] for label in results["gt_bboxes_labels"].tolist()], np.int64
        )
        results["custom_entities"] = True
        return results


def _plain(phrase: str | list[str]) -> str:
    """A phrase in lower case; of a phrase in pieces the pieces in a row."""
    return (phrase if isinstance(phrase, str) else " ".join(phrase)).lower()
