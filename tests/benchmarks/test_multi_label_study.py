"""benchmarks/multi_label.py: what it trains, and what it writes of numbers that are given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import multi_label  # noqa: E402
from mmengine.config import Config  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for n, split in enumerate(("train", "val", "test"), start=1):
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(n)],
            "categories": [{"id": 4, "name": "rook"}, {"id": 2, "name": "king"}],
            "annotations": [],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_both_heads_are_trained_alike_and_mean_and_spread_are_written(data, monkeypatch, tmp_path):
    torch.save({"fc.bias": torch.zeros(2)}, tmp_path / "resnet18.pth")
    configs: list[Config] = []

    def trained(command: list[str], folder: Path) -> dict[str, float]:
        configs.append(Config.fromfile(command[1]))
        is_ida, seed = "ida" in folder.name, len(configs) // 3
        return dict.fromkeys(multi_label.METRICS, 50.0 + 10 * is_ida + seed)

    monkeypatch.setattr(multi_label, "trained", trained)
    out = tmp_path / "out"
    words = [data, tmp_path / "resnet18.pth", "--epochs", 2, "--seeds", 2, "--work-dir", out]
    monkeypatch.setattr(sys, "argv", ["multi_label.py", *map(str, words)])
    multi_label.main()

    plain, ida, *others = configs
    assert [cfg.randomness.seed for cfg in configs] == [0, 0, 1, 1] and len(others) == 2
    assert plain.model.neck.type == "GlobalAveragePooling" and "neck" not in ida.model
    expected = {"num_classes": 2, "in_channels": 512}
    assert plain.model.head == {"type": "MultiLabelLinearClsHead", **expected}
    assert ida.model.head == {"type": "IDAClsHead", **expected}
    for cfg in (plain, ida):
        cfg.pop("model")
    assert plain.to_dict() == ida.to_dict() and plain.train_cfg.max_epochs == 2
    assert [d.ann_file for d in plain.val_dataloader.dataset.datasets] == ["val.json", "test.json"]
    text = (out / "multi_label.md").read_text()
    assert "1 + 2 + 3 images for training, validation and test, and 2 classes" in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    table = {name.strip(): value.strip() for name, value in rows[:3]}
    assert table == {"classifier": "mAP", "linear head": "50.5 ± 0.7", "IDA head": "60.5 ± 0.7"}


def test_missing_data_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["multi_label.py", str(tmp_path), "resnet18.pth"])
    with pytest.raises(SystemExit) as error:
        multi_label.main()
    assert str(error.value) == f"error: there is no annotation file '{tmp_path}/train.json'"
