"""Panoptic quality without panopticapi, which is on no package index."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOPanopticEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from plugin_core.evaluation.panoptic_quality import (
    PanopticPrediction,
    encode_png,
    panoptic_quality,
    write_predictions,
)

logger = logging.getLogger(__name__)


class PanopticQualityEvaluator(COCOPanopticEvaluator):
    """``COCOPanopticEvaluator`` that computes by hotcoco.

    Args:
        dataset_name: with ``panoptic_json`` and ``panoptic_root`` in its metadata.
        output_dir: takes predictions.json and its PNGs in predictions/; None to write nothing.
    """

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        for given, output in zip(inputs, outputs, strict=True):
            ids, infos = output["panoptic_seg"]
            if infos is None:  # Panoptic-DeepLab's: category · label_divisor + instance, or -1
                things = self._metadata.thing_dataset_id_to_contiguous_id.values()
                divisor = self._metadata.label_divisor
                infos = [
                    {
                        "id": label + 1,
                        "category_id": label // divisor,
                        "isthing": label // divisor in things,
                    }
                    for label in ids.unique().tolist()
                    if label != -1
                ]
                ids = ids + 1
            converted = (self._convert_category_id(dict(info)) for info in infos)
            segments = [{key: info[key] for key in ("id", "category_id")} for info in converted]
            png = encode_png(ids.cpu().numpy())
            self._predictions.append(PanopticPrediction(given["image_id"], segments, png))

    def evaluate(self) -> OrderedDict[str, dict[str, float]] | None:
        comm.synchronize()
        predictions = [*chain(*comm.gather(self._predictions))]
        if not comm.is_main_process():
            return None
        with PathManager.open(self._metadata.panoptic_json) as file:
            annotations = json.load(file)
        folder = PathManager.get_local_path(self._metadata.panoptic_root)
        quality = panoptic_quality(annotations, folder, predictions)
        if self._output_dir:
            write_predictions(Path(self._output_dir, "predictions.json"), predictions)
        table = tabulate(quality.table(), headers="firstrow", tablefmt="pipe")
        logger.info("Panoptic evaluation results:\n%s", table)
        return OrderedDict(panoptic_seg=quality.scores)
