"""Panoptic segmentation without panopticapi, which is on no package index.

In a config, in place of ``LoadPanopticAnnotations`` and ``CocoPanopticMetric``::

    dict(type='LoadPanopticSegments')
    val_evaluator = dict(type='PanopticQualityMetric', ann_file=…, seg_prefix=…)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets.transforms import LoadPanopticAnnotations
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.registry import METRICS, TRANSFORMS
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_local_path, load
from mmengine.logging import print_log
from terminaltables import AsciiTable

from plugin_core.errors import ArgumentError
from plugin_core.evaluation.panoptic_quality import (
    PanopticPrediction,
    check_installed,
    encode_png,
    id_of_color,
    panoptic_quality,
    write_predictions,
)


@TRANSFORMS.register_module()
class LoadPanopticSegments(LoadPanopticAnnotations):
    """``LoadPanopticAnnotations`` without panopticapi.

    Args:
        with_bbox, with_label, with_mask, with_seg, box_type: of ``LoadPanopticAnnotations``.
    """

    def __init__(
        self,
        with_bbox: bool = True,
        with_label: bool = True,
        with_mask: bool = True,
        with_seg: bool = True,
        box_type: str = "hbox",
        imdecode_backend: str = "cv2",
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        # Its own asks for panopticapi, of which it uses this function alone.
        super(LoadPanopticAnnotations, self).__init__(
            with_bbox=with_bbox,
            with_label=with_label,
            with_mask=with_mask,
            with_seg=with_seg,
            with_keypoints=False,
            box_type=box_type,
            imdecode_backend=imdecode_backend,
            backend_args=backend_args,
        )
        self.rgb2id = id_of_color


@METRICS.register_module()
class PanopticQualityMetric(BaseMetric):
    """PQ, SQ and RQ of all classes, things and stuff, named as ``CocoPanopticMetric`` does.

    Args:
        ann_file: panoptic annotations in COCO's format.
        seg_prefix: folder of their PNGs.
        classwise: print the numbers of each class, too.
        outfile_prefix: of PREFIX.panoptic.json and the folder PREFIX.panoptic, which take the
            predictions; None to write nothing.
        backend_args: of mmengine's file client, for ``ann_file``.
        collect_device: "cpu" or "gpu", of a distributed evaluation.
        prefix: of the metrics' names.

    Raises:
        ArgumentError: if a file or folder is missing.
        ImportError: if hotcoco is not installed.
    """

    default_prefix = "coco_panoptic"

    def __init__(
        self,
        ann_file: str,
        seg_prefix: str,
        classwise: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict[str, Any] | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device, prefix)
        check_installed()
        if not backend_args and not os.path.isfile(ann_file):
            raise ArgumentError("ann_file", f"must be a file, there is none at {ann_file!r}")
        if not os.path.isdir(seg_prefix):
            raise ArgumentError("seg_prefix", f"must be a folder, there is none at {seg_prefix!r}")
        self.ann_file = ann_file
        self.seg_prefix = seg_prefix
        self.classwise = classwise
        self.outfile_prefix = outfile_prefix
        self.backend_args = backend_args
        self._annotations: dict[str, Any] | None = None

    @property
    def annotations(self) -> dict[str, Any]:
        """Content of ``ann_file``, read when it is first needed."""
        if self._annotations is None:
            with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
                self._annotations = load(path)
        return self._annotations

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        classes = self.dataset_meta["classes"]
        ids = {category["name"]: category["id"] for category in self.annotations["categories"]}
        for sample in data_samples:
            labels = sample["pred_panoptic_seg"]["sem_seg"][0].cpu().numpy()
            found, places = np.unique(labels, return_inverse=True)
            is_none = found % INSTANCE_OFFSET >= len(classes)
            numbers = np.where(is_none, 0, np.cumsum(~is_none))
            segments = [
                {"id": int(number), "category_id": ids[classes[label % INSTANCE_OFFSET]]}
                for number, label in zip(numbers, found, strict=True)
                if number
            ]
            png = encode_png(numbers[places].reshape(labels.shape))
            self.results.append(PanopticPrediction(sample["img_id"], segments, png))

    def compute_metrics(self, results: list[PanopticPrediction]) -> dict[str, float]:
        quality = panoptic_quality(self.annotations, self.seg_prefix, results)
        if self.outfile_prefix:
            write_predictions(Path(f"{self.outfile_prefix}.panoptic.json"), results)
        print_log("\n" + AsciiTable(quality.table()).table, "current")
        if self.classwise:
            names = {
                category["id"]: category["name"] for category in self.annotations["categories"]
            }
            rows = [
                [names[category], *(f"{one[key]:.3f}" for key in ("PQ", "SQ", "RQ"))]
                for category, one in quality.by_class.items()
            ]
            table = AsciiTable([["class", "PQ", "SQ", "RQ"], *rows])
            print_log("\n" + table.table, "current")
        return quality.scores
