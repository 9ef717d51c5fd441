"""docs/model_zoo.py: the numbers of cheap rows are those that it counts, and it mends others."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from plugin_core.inspection.cost import Cost, Report

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("model_zoo", ROOT / "docs" / "model_zoo.py")
assert spec and spec.loader
model_zoo = sys.modules["model_zoo"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model_zoo)
SSDLITE = "configs/mm/triplet_attention/ssdlite_mobilenetv2-triplet-scratch_8xb24-600e_coco.py"


@pytest.mark.parametrize(
    "config",
    [
        SSDLITE,
        "configs/mmpretrain/triplet_attention/mobilenet-v2-triplet-k3_8xb12-400e_in1k.py",
        "configs/mmpretrain/batchformer/resnet32-batchformer_1xb512_cifar100-lt.py",
    ],
)
def test_row_has_the_counted_numbers(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "/mmpretrain/" in config:
        pytest.importorskip("mmpretrain")
    assert model_zoo.main(["--check", "--only", config]) == 0, capsys.readouterr().out


def test_wrong_numbers_are_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "README.md"
    shutil.copy(model_zoo.README, copy)
    monkeypatch.setattr(model_zoo, "README", copy)
    report = Report((320, 320), {}, {"backbone": Cost(4_000_000, 10**9)}, 1, Cost(6_000, 10**7))
    monkeypatch.setattr(model_zoo, "count", lambda *args, **options: report)
    before = copy.read_text(encoding="utf-8")
    assert model_zoo.main(["--check", "--only", SSDLITE]) == 1
    assert copy.read_text(encoding="utf-8") == before
    assert "parameters 4,233,888 -> 4,000,000" in capsys.readouterr().out
    assert model_zoo.main(["--only", SSDLITE]) == 0
    old, new = "| 4,233,888 | 0.8 | 5,100; 0.01 |", "| 4,000,000 | 1.0 | 6,000; 0.01 |"
    assert old in before and copy.read_text(encoding="utf-8") == before.replace(old, new)


def test_every_row_with_a_command_is_read_or_has_no_numbers() -> None:
    text = model_zoo.README.read_text(encoding="utf-8")
    read = {row.line for row in model_zoo.read_rows(text)}
    for number, line in enumerate(text.splitlines()):
        if "`tools/" in line and line.startswith("|"):
            has_parameters = re.fullmatch(r" [\d,]+ ", line.split("|")[2]) is not None
            assert (number in read) == has_parameters, line
