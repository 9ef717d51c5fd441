"""benchmarks/real_data.py: the commands that it runs, and the results that it keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import real_data  # noqa: E402

REPORT = """# Comparison

**None beats it.**

## Accuracy

| a |
|---|
| 1 |

### A curve

![A curve](figures/01-a-curve.png)

Of all classes.

## Settings
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "my cells"
    folder.mkdir()
    content = {"categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}]}
    (folder / "train.json").write_text(json.dumps(content))
    torch.save({"conv1.weight": torch.ones(1, 1)}, tmp_path / "resnet18.pth")
    return folder


@pytest.mark.parametrize(
    ("framework", "config", "weights"),
    [("detectron2", "plain.yaml", "model_final.pth"), ("mmdetection", "plain.py", "iter_7.pth")],
)
def test_trial_is_compared_on_the_test_split(
    framework, config, weights, data, tmp_path, monkeypatch
):
    out, commands = tmp_path / "out", []

    def run(words: list[str]) -> None:
        commands.append(words)
        if words[0] == "tools/try_plugins.py":
            runs = [
                {"label": label, "folder": f"runs/{label}-seed{k}"}
                for label in ("plain", "ida")
                for k in (0, 1)
            ]
            plan = {"labels": ["plain", "ida"], "steps": 7, "runs": runs}
            (out / "trial").mkdir()
            (out / "trial/plan.json").write_text(
                json.dumps({**plan, "request": {"config": config}})
            )
        if words[0] == "tools/compare_detectors.py":
            (out / "test").mkdir()
            (out / "test/report.md").write_text(REPORT)
            (out / "test/report.json").write_text("{}")

    monkeypatch.setattr(real_data, "run", run)
    words = [data, tmp_path / "resnet18.pth", "--framework", framework, "--with", "ida"]
    words += ["--seeds", 2, "--out", out, "--results", tmp_path / "results"]
    real_data.main([*map(str, words)])

    *_, trial, compared = commands
    assert trial[1] == str(out / config) and trial[-2:] != ["--steps", "None"]
    assert ("--register-coco" in trial) == (framework == "detectron2")
    assert compared[1:4] == [str(data / "test.json"), "--images", str(data / "images")]
    files = ",".join(str(out / f"trial/runs/ida-seed{k}" / weights) for k in (0, 1))
    suffix = Path(config).suffix
    assert f"ida={out / 'trial/configs/ida'}{suffix}:{files}" in compared
    text = (tmp_path / f"results/my cells-{framework}.md").read_text()
    assert "figures/" not in text and "A curve" not in text and "Of all classes" not in text
    assert "| 1 |" in text and text.endswith("## Settings\n")


def test_configs_are_of_the_data(data, tmp_path):
    from mmengine.config import Config

    words = [data, tmp_path / "resnet18.pth", "--framework", "mmdetection", "--out", tmp_path]
    args = real_data.parse_args([*map(str, words)])
    cfg = Config.fromfile(real_data.write_config(args))
    assert cfg.model.roi_head.bbox_head.num_classes == 2
    assert cfg.val_dataloader.dataset.metainfo.classes == ["red", "white"]
    assert cfg.val_evaluator.ann_file == str(data / "val.json")
    assert Path(cfg.model.backbone.init_cfg.checkpoint).is_file()
