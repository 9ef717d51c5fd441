"""configs/README.md names every config, and nothing else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
DEMO = ("Synthetic-Detection", "synthetic")


def test_every_config_has_a_row_with_its_command():
    files = [p for p in (ROOT / "configs").rglob("*") if p.suffix in (".py", ".yaml")]
    paths = {str(p.relative_to(ROOT)) for p in files if p.parent.name not in DEMO}
    commands = re.findall(r"`(tools/\w+\.py) (?:--config-file )?(configs/\S+)`", TEXT)
    assert {path for _, path in commands} == paths
    assert len(commands) == len(paths)
    for tool, path in commands:
        assert (ROOT / tool).is_file()
        frameworks = {"d2": "train_net", "mm": "_mmdet", "mmpretrain": "_mmpretrain"}
        is_lazy = path.startswith("configs/d2/") and path.endswith(".py")
        assert frameworks[path.split("/")[1]] in tool and ("lazyconfig" in tool) == is_lazy


def test_commands_can_be_typed():
    scripts = [p for d in ("tools", "benchmarks") for p in (ROOT / d).glob("*.py")]
    commands = [p for p in scripts if p.read_text(encoding="utf-8").startswith("#!")]
    assert commands and [p.name for p in commands if not os.access(p, os.X_OK)] == []


def cited(backbone: str) -> set[tuple[str, str, float]]:
    """Detector, task and AP of the tables' column of published numbers."""
    rows = re.findall(rf"\| ([\w -]+?) {backbone} \|(?:[^|]*\|){{4}} ([^|]*\d)\s*\|", TEXT)
    parts = [(detector, *part.split()) for detector, all_ in rows for part in all_.split(", ")]
    return {(detector, task, float(ap)) for detector, task, ap in parts}


@pytest.mark.parametrize(
    ("method", "backbone"), [("triplet attention k=7", "R50-FPN"), ("BatchFormerV2", "R50")]
)
def test_published_numbers_are_the_authors(method, backbone):
    file = ROOT.parent / "shared" / "published_results.json"
    if not file.is_file():
        pytest.skip(f"no published results in {file}")
    rows = [r for r in json.loads(file.read_text())["detection"] if r["method"] == method]
    published = {
        (row["detector"], row["task"].removesuffix("s"), row["AP"])
        for row in rows
        if row["task"] != "panoptic"
    }
    assert cited(backbone) == published
    for row in rows:
        if row["task"] == "panoptic":
            assert re.search(rf"\| PQ {row['PQ']} \| .*/panoptic-detr_r50-batchformer_", TEXT)
