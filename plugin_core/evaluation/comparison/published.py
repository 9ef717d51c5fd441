"""Numbers that the methods' authors published, for the configs of this project that they are of."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from plugin_core.evaluation.comparison.sections import Section, Table
from plugin_core.shipped import shipped_config

_FILE = Path(__file__).with_name("published_results.json")


@dataclass(frozen=True)
class Published:
    """Results of a detector on COCO val2017 that its authors published.

    Attributes:
        source: of the numbers.
        method: in the detector, such as "BatchFormerV2".
        detector: with its backbone.
        schedule: of the training.
        results: metrics in percent by "bbox", "segm", "keypoints" or "panoptic".
        configs: paths below ``configs``, each with the SHA-256 of the file.
    """

    source: str
    method: str
    detector: str
    schedule: str
    results: Mapping[str, Mapping[str, float]]
    configs: Mapping[str, str]


@cache
def published_results() -> tuple[Published, ...]:
    """Read all that the project knows."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return tuple(Published(**record) for record in content["detectors"])


def published_of(config: str) -> Published | None:
    """Find what is published of a config.

    A config that was changed, or derived from one with published numbers, is another training: its
    name and its content must be those of the project's file.
    """
    config = shipped_config(config)
    if not os.path.isfile(config):
        return None
    digest = hashlib.sha256(Path(config).read_bytes()).hexdigest()
    for published in published_results():
        for path, known in published.configs.items():
            if os.path.basename(config) == os.path.basename(path) and digest == known:
                return published
    return None


def published_section(
    configs: Mapping[str, str],
    metrics: Mapping[str, Mapping[str, float]],
    iou_type: str,
    content: Mapping[str, Any],
) -> Section | None:
    """Set what was measured beside what is published; None if nothing is, of these configs.

    Args:
        configs: of the detectors, by their names.
        metrics: of the detectors, in percent: the mean over seeds.
        iou_type: "bbox", "segm", "keypoints" or "panoptic".
        content: of the annotation file. Differences are shown on COCO val2017 alone.
    """
    is_val2017 = _is_val2017(content["images"])
    tables = []
    for name, config in configs.items():
        published = published_of(config)
        if published is None or iou_type not in published.results:
            continue
        rows = []
        for metric, value in published.results[iou_type].items():
            here = metrics[name].get(metric)
            difference = here - value if is_val2017 and here is not None else None
            rows.append([metric, here, value, difference])
        note = (
            f"Published: {published.source}; {published.detector} with {published.method}, "
            f"{published.schedule}, COCO val2017. It was not measured here."
        )
        headers = ["metric", "measured", "published", "difference"]
        tables.append(Table(f"{name} beside the published numbers", headers, rows, note))
    if not tables:
        return None
    text = (
        "What the methods' authors published for these configs. configs/README.md says where a "
        "training may differ from theirs."
    )
    if not is_val2017:
        text += (
            f" The ground truth here is not COCO val2017 ({len(content['images']):,} images, not "
            "5,000), so there is no difference to show."
        )
    return Section("Beside the papers", text, tables)


def _is_val2017(images: Sequence[Mapping[str, Any]]) -> bool:
    names = (str(image.get("file_name")) for image in images)
    return len(images) == 5000 and all(re.fullmatch(r"\d{12}\.jpg", name) for name in names)
