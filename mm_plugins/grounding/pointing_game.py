"""The pointing game: whether a detector looks, for a phrase, where the phrase's object is.

Zhang et al., ECCV 2016, arXiv:1608.00507, section 4.1; on phrases as in AMC, arXiv:2206.15462,
section 4.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.fileio import load
from mmengine.logging import print_log
from tabulate import tabulate
from torch import Tensor

from mm_plugins.scores import annotated_phrases
from plugin_core.files import write_text


@METRICS.register_module()
class PointingGameMetric(BaseMetric):
    """Share of phrases whose heatmap has its maximum inside of a box of the phrase.

    For the datasets with phrases (Flickr30k's, RefCOCO's), and for COCO's, where a class that an
    image has is a phrase. The detector is one of ours, such as ``PluginGLIP``, with
    ``heatmap=dict(in_test=True)``. A heatmap that is the same everywhere misses, and so does a
    phrase without one, such as one that has no token in a text that was cut off. RefCOCO's
    expressions are for Grounding DINO, as MMDetection's GLIP does not take a text without phrases.

    Beside the accuracy there is that of chance, a point anywhere in the image: the share of it that
    the phrase's boxes cover.

    Args:
        ann_file: with the names of ``categories`` by which phrases are told apart, for a dataset
            without classes, such as Flickr30k's, whose own annotations have one category only. None
            for the numbers.
        out_file: of a JSON with the results; None for none.
        collect_device: as of every metric.
        prefix: as of every metric.

    Raises:
        ValueError: if predictions have no heatmaps.
    """

    default_prefix = "pointing_game"

    def __init__(
        self,
        ann_file: str | None = None,
        out_file: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.out_file = out_file
        self.names: dict[int, str] = {}
        if ann_file is not None:
            categories = load(ann_file).get("categories", ())
            self.names = {category["id"]: category["name"] for category in categories}

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        for sample in data_samples:
            found = sample.get("phrase_heatmaps")
            if found is None:
                raise ValueError(
                    "PointingGameMetric: predictions have no heatmaps; let the config's model be "
                    "one such as PluginGroundingDINO with heatmap=dict(in_test=True)"
                )
            heatmaps = dict(zip(found["labels"].tolist(), found["heatmaps"], strict=True))
            annotated = sample["gt_instances"]
            phrases = np.array(annotated_phrases(sample), int)
            labels = np.asarray(torch.as_tensor(annotated["labels"]).cpu())
            boxes = torch.as_tensor(getattr(annotated["bboxes"], "tensor", annotated["bboxes"]))
            of_image = []
            for phrase in np.unique(phrases).tolist():
                chosen = phrases == phrase
                of_image.append(
                    {
                        "hit": points_into(heatmaps.get(phrase), boxes[chosen]),
                        "chance": share_of_image(boxes[chosen], sample["ori_shape"][:2]),
                        "category": int(labels[chosen][0]),
                    }
                )
            self.results.append(of_image)  # one entry an image, as mmengine counts them

    def compute_metrics(self, results: list[list[dict[str, Any]]]) -> dict[str, float]:
        phrases = [phrase for of_image in results for phrase in of_image]
        if not phrases:
            raise ValueError("PointingGameMetric: no image has an annotated phrase")
        return self._summarize(phrases)

    def _summarize(self, results: list[dict[str, Any]]) -> dict[str, float]:
        total = _mean(results)
        categories = {
            self._name(category): _mean([r for r in results if r.get("category") == category])
            for category in sorted({r["category"] for r in results if "category" in r})
        }
        if self.out_file is not None:
            write_text(self.out_file, json.dumps({**total, "categories": categories}, indent=1))
        rows = [("all phrases", total), *categories.items()]
        table = [[name, *values.values()] for name, values in rows]
        headers = ["category", *total]
        print_log("\n" + tabulate(table, headers, floatfmt=".3f"), "current")
        return {
            "accuracy": total["accuracy"],
            "chance": total["chance"],
            **{f"accuracy/{name}": values["accuracy"] for name, values in categories.items()},
        }

    def _name(self, category: int) -> str:
        # Where a dataset has classes, labels count them; otherwise they are a file's own ids.
        classes = (self.dataset_meta or {}).get("classes")
        names = self.names if not classes else dict(enumerate(classes))
        return names.get(category, str(category))


def points_into(heatmap: Tensor | None, boxes: Tensor) -> bool:
    """Whether the greatest cell of a heatmap (H, W) over an image is inside of one of its boxes.

    Args:
        heatmap: None, and one that is the same everywhere, point nowhere.
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the image, of H×W pixels.
    """
    if heatmap is None or not heatmap.numel() or heatmap.amax() <= heatmap.amin():
        return False
    y, x = divmod(int(heatmap.argmax()), heatmap.shape[1])
    x1, y1, x2, y2 = boxes.unbind(1)
    return bool(((x1 <= x + 0.5) & (x + 0.5 < x2) & (y1 <= y + 0.5) & (y + 0.5 < y2)).any())


def share_of_image(boxes: Tensor, size: Sequence[int]) -> float:
    """Which part of an image's pixels (H, W) is inside of a box."""
    height, width = size
    inside = np.zeros((height, width), bool)
    for x1, y1, x2, y2 in boxes.tolist():
        inside[
            max(int(np.ceil(y1 - 0.5)), 0) : max(int(np.ceil(y2 - 0.5)), 0),
            max(int(np.ceil(x1 - 0.5)), 0) : max(int(np.ceil(x2 - 0.5)), 0),
        ] = True
    return float(inside.mean())


def _mean(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "phrases": len(results),
        "accuracy": float(np.mean([result["hit"] for result in results])),
        "chance": float(np.mean([result["chance"] for result in results])),
    }
