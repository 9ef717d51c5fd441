"""The pointing game (arXiv:1608.00507, section 4.1) for MMPretrain's models that make heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmpretrain.registry import METRICS

from mm_plugins.grounding.pointing_game import PointingGameMetric, points_into, share_of_image


@METRICS.register_module()
class HeatmapPointingGame(PointingGameMetric):
    """Share of phrases whose heatmap has its maximum inside of a box of the phrase.

    For predictions with one phrase each: ``heatmap`` (H, W) over the image, and ``gt_bboxes`` in
    pixels of it. Categories are told apart where there are ``gt_bboxes_labels``.

    Args:
        ann_file: as of ``PointingGameMetric``, and so are the others.
        out_file: of a JSON with the results; None for none.
        collect_device: as of every metric.
        prefix: as of every metric.

    Raises:
        ValueError: if predictions have no heatmaps.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        for sample in data_samples:
            if "heatmap" not in sample:
                raise ValueError(
                    "HeatmapPointingGame: predictions have no heatmap; let the config's model be "
                    "AMCBlipRetrieval or AMCBlipGrounding"
                )
            heatmap = sample["heatmap"]
            boxes = torch.as_tensor(sample["gt_bboxes"]).reshape(-1, 4)
            result = {
                "hit": points_into(heatmap, boxes),
                "chance": share_of_image(boxes, heatmap.shape),
            }
            labels = sample.get("gt_bboxes_labels")
            if labels is not None:
                result["category"] = int(labels[0])
            self.results.append([result])
