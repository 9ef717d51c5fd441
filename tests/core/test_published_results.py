"""Published numbers: which configs they are of, and how they stand beside measured ones."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from plugin_core.evaluation.comparison.published import (
    published_of,
    published_results,
    published_section,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_published_1x.yaml"
TASKS = {"box": "bbox", "mask": "segm", "keypoint": "keypoints", "PQ": "panoptic"}


@pytest.mark.parametrize("path", [path for one in published_results() for path in one.configs])
def test_numbers_are_of_the_config_as_it_is(path):
    (known,) = (one.configs[path] for one in published_results() if path in one.configs)
    found = hashlib.sha256((ROOT / "configs" / path).read_bytes()).hexdigest()
    assert found == known, "it has changed: does it still train as the authors did?"


def test_configs_readme_cites_the_same_numbers():
    text = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ((?:\w+ \d+\.\d(?:, )?)+) \| `tools/\S+ .*configs/(\S+)`", text)
    cited = {
        path: {TASKS[task]: float(ap) for task, ap in re.findall(r"(\w+) (\d+\.\d)", numbers)}
        for numbers, path in rows
    }
    assert cited == {
        path: {task: next(iter(metrics.values())) for task, metrics in one.results.items()}
        for one in published_results()
        for path in one.configs
    }


def test_changed_or_derived_config_has_no_published_numbers(tmp_path):
    text = CONFIG.read_bytes()
    copy = tmp_path / CONFIG.name
    copy.write_bytes(text)
    assert published_of(str(copy)) is published_of(str(CONFIG)) is not None
    assert published_of(f"d2_plugins://COCO-Detection/{CONFIG.name}") is published_of(str(CONFIG))
    copy.write_bytes(text + b"SOLVER: {MAX_ITER: 100}\n")
    renamed = tmp_path / "plain.yaml"
    renamed.write_bytes(text)
    for other in (str(copy), str(renamed), "model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.yaml"):
        assert published_of(other) is None


def test_difference_is_shown_on_coco_val2017_alone():
    metrics = {"mine": {"AP": 40.0, "AP50": 60.0}, "other": {"AP": 1.0}}
    configs = {"other": "other.yaml", "mine": str(CONFIG)}
    val2017 = {"images": [{"file_name": f"{i:012}.jpg"} for i in range(5000)]}
    section = published_section(configs, metrics, "bbox", val2017)
    (table,) = section.tables
    assert table.headers[2] == "published" and "was not measured here" in table.note
    assert table.rows[0] == ["AP", 40.0, 39.2, pytest.approx(0.8)]
    assert table.rows[2] == ["AP75", None, 42.3, None]
    other = published_section(configs, metrics, "bbox", {"images": val2017["images"][:33]})
    assert other.tables[0].rows[0] == ["AP", 40.0, 39.2, None]
    assert "not COCO val2017 (33 images" in other.text
    assert published_section(configs, metrics, "segm", val2017) is None
