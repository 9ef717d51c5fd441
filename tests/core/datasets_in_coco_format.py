"""Small datasets in COCO's format, right but for what a test changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from plugin_core.datasets.check import Use, check_dataset
from plugin_core.datasets.findings import ERROR, FRAMEWORKS, Report

Content = dict[str, Any]


def content(**changed: Any) -> Content:
    """Two images of 40×30 pixels with two objects each, of two classes."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)]
    annotations = [
        {
            "id": i,
            "image_id": 1 + i % 2,
            "category_id": 1 + i // 3,
            "bbox": [2 * i, 3, 10, 8],
            "area": 80,
            "iscrowd": 0,
            "segmentation": [[2 * i, 3, 2 * i + 10, 3, 2 * i + 10, 11, 2 * i, 11]],
        }
        for i in range(1, 5)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories} | changed


def with_annotation(**changed: Any) -> Content:
    """Change the first annotation; None leaves a key out."""
    whole = content()
    record = whole["annotations"][0]
    for key, value in changed.items():
        record[key] = value
        if value is None:
            del record[key]
    return whole


def with_image(**changed: Any) -> Content:
    whole = content()
    whole["images"][0].update(changed)
    return whole


def make_images(folder: Path) -> Path:
    """Write the images of :func:`content`."""
    for i in (1, 2):
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(folder / f"{i}.png")
    return folder


def write(folder: Path, whole: Any) -> str:
    path = folder / "annotations.json"
    text = whole if isinstance(whole, str) else json.dumps(whole)
    path.write_text(text, encoding="utf-8")
    return str(path)


def check(folder: Path, whole: Any, **use: Any) -> Report:
    return check_dataset(write(folder, whole), str(folder), Use(**use)).report


def found(report: Report) -> dict[str, str]:
    """Kinds and their levels; the worst one of each."""
    return {finding.kind: finding.level for finding in reversed(report.findings)}


def errors(report: Report) -> dict[str, str]:
    """Kinds of errors, and the frameworks that they matter in."""
    return {
        finding.kind: "".join(k[0] for k in FRAMEWORKS if finding.concerns(k))
        for finding in report.of(ERROR)
    }
