"""tools/analyze_model.py: which framework a config is of, the table, the file and the errors."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import analyze_model
import pytest

from plugin_core.inspection import config_kinds
from plugin_core.inspection.cost import Cost, Report

ROOT = Path(__file__).resolve().parents[2]
D2_CONFIG = "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
MM_CONFIG = "configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
REPORT = Report(
    (64, 96),
    {"proposals": 50},
    {"backbone.stem": Cost(9_408, 500_000_000, 250_000), "neck": Cost(1_000, 0, 0)},
    2,
    Cost(600, 400_000, 1_500),
)
BASELINE = Report((64, 96), {"proposals": 40}, {"backbone.stem": Cost(8_808, 0, 0)}, 0, Cost())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replaces the counting; what was to be counted is collected here."""
    calls: list[tuple] = []

    def count(side: str, config: str, image_size: tuple[int, int] | None) -> Report:
        calls.append((side, config, image_size))
        return BASELINE if config.endswith("baseline.yaml") else REPORT

    monkeypatch.setattr(analyze_model, "count", count)
    return calls


@pytest.fixture
def yaml(tmp_path: Path) -> str:
    (tmp_path / "baseline.yaml").touch()
    (tmp_path / "some.yaml").touch()
    return str(tmp_path / "some.yaml")


def error_of(*argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        analyze_model.main(argv)
    message = stop.value.code  # a text: printed to stderr, exit status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("model = dict(type='RetinaNet')", "mm_plugins"),
        ("_base_ = 'mmdet::x.py'\n# from detectron2 import nothing", "mm_plugins"),
        ("import os.path\nmodel = dict(type=os.path.basename('x'))", "mm_plugins"),
        (
            "from mmengine.config import read_base\nwith read_base():\n    from .base import *",
            "mm_plugins",
        ),
        ("from detectron2.config import LazyCall as L\nmodel = L(dict)()", "d2_plugins"),
        ("import detectron2.model_zoo", "d2_plugins"),
        ("from ..common.models.retinanet import model", "d2_plugins"),
    ],
)
def test_python_config_is_told_by_what_it_imports(tmp_path, text, side):
    (tmp_path / "config.py").write_text(text)
    assert config_kinds.side_of(str(tmp_path / "config.py")) == side


@pytest.mark.parametrize(
    ("config", "side"),
    [
        ("model_zoo://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", "d2_plugins"),
        ("model_zoo://COCO-Detection/retinanet_R_50_FPN_1x.py", "d2_plugins"),
        ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "mm_plugins"),
        (str(ROOT / D2_CONFIG), "d2_plugins"),
        (str(ROOT / MM_CONFIG), "mm_plugins"),
    ],
)
def test_config_is_told_by_its_name(config, side):
    assert config_kinds.side_of(config) == side


def test_table_has_stages_total_attention_and_what_was_counted(counted, yaml, capsys):
    analyze_model.main([yaml, "--shape", "64", "96"])
    assert counted == [("d2_plugins", yaml, (64, 96))]
    title, _, header, _, *rows, _, note = capsys.readouterr().out.splitlines()
    assert title == f"Detectron2: {yaml}"
    assert cells(header) == ["stage", "parameters", "GFLOPs", "M activations"]
    assert [cells(row) for row in rows] == [
        ["backbone.stem", "9,408", "0.5000", "0.250"],
        ["neck", "1,000", "0.0000", "0.000"],
        ["total", "10,408", "0.5000", "0.250"],
        ["of it attention (2 modules)", "600", "0.0004", "0.002"],
    ]
    assert note == "one image of 64x96 pixels, 50 proposals"


def test_table_beside_a_baseline_has_both_and_the_difference(counted, yaml, capsys):
    baseline = yaml.replace("some.yaml", "baseline.yaml")
    analyze_model.main([yaml, "--baseline", baseline])
    # At the size of the first one, or else they could not be compared
    assert counted == [("d2_plugins", yaml, None), ("d2_plugins", baseline, (64, 96))]
    *_, stem, neck, total, attention, _, note = capsys.readouterr().out.splitlines()
    assert cells(stem)[1:7] == ["9,408", "8,808", "+600", "0.5000", "0.0000", "+0.5000"]
    assert cells(neck)[1:4] == ["1,000", "0", "+1,000"]
    assert cells(total)[1:4] == ["10,408", "8,808", "+1,600"]
    assert cells(attention)[1:4] == ["600", "0", "+600"]
    assert note == "one image of 64x96 pixels, 50 proposals; baseline, 40 proposals"


def test_json_holds_both_reports_and_the_difference(counted, yaml, tmp_path):
    baseline, out = yaml.replace("some.yaml", "baseline.yaml"), tmp_path / "out.json"
    analyze_model.main([yaml, "--baseline", baseline, "--json", str(out)])
    content = json.loads(out.read_text())
    assert content["config"] == yaml
    assert content["total"] == {
        "parameters": 10_408,
        "flops": 500_000_000,
        "activations": 250_000,
    }
    assert content["attention"]["modules"] == 2
    assert content["baseline"]["config"] == baseline
    assert content["difference"]["parameters"] == 1_600
    assert sorted(os.listdir(tmp_path)) == ["baseline.yaml", "out.json", "some.yaml"]


def test_json_that_cannot_be_finished_leaves_the_old_one(counted, yaml, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    out.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    assert "no space left" in error_of(yaml, "--json", str(out))
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["baseline.yaml", "out.json", "some.yaml"]


@pytest.mark.parametrize("shape", [("0", "64"), ("64", "-1"), ("big", "64"), ("6.5", "64")])
def test_bad_shape_is_an_error(yaml, shape):
    # A negative number would be taken for an option.
    assert f"--shape {' '.join(shape)}: expected a height" in error_of(yaml, "--shape", *shape)


def test_missing_config_is_an_error_that_names_it():
    assert error_of("nowhere/x.yaml") == "error: nowhere/x.yaml: there is no such config file"


def test_file_of_another_kind_is_an_error(tmp_path):
    (tmp_path / "model.pth").touch()
    assert "expected .yaml or .py" in error_of(str(tmp_path / "model.pth"))


def test_config_that_is_no_python_is_an_error(tmp_path):
    (tmp_path / "config.py").write_text("model = (")
    assert "config.py: not Python" in error_of(str(tmp_path / "config.py"))


def test_configs_of_two_frameworks_are_an_error(yaml):
    message = error_of(yaml, "--baseline", "mmdet::x.py")
    assert "mmdet::x.py: a config of MMDetection" in message and "one of Detectron2" in message


def test_json_in_a_folder_that_is_not_there_is_an_error_before_counting(counted, yaml):
    assert "there is no folder 'nowhere'" in error_of(yaml, "--json", "nowhere/x.json")
    assert counted == []


@pytest.mark.parametrize(
    ("package", "config"), [("d2_plugins", "model_zoo://x.yaml"), ("mm_plugins", "mmdet::x.py")]
)
def test_framework_that_is_not_installed_is_an_error(monkeypatch, package, config):
    monkeypatch.setitem(sys.modules, f"{package}.analysis", None)
    assert error_of(config).startswith(f"error: {config}: ")


def test_config_that_its_framework_cannot_read_is_an_error(tmp_path):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    (tmp_path / "config.py").write_text("model = dict(type='NoSuchDetector')")
    message = error_of(str(tmp_path / "config.py"), "--shape", "64", "64")
    assert "config.py" in message and "NoSuchDetector is not in the mmdet::model" in message


@pytest.mark.parametrize(
    ("framework", "other", "config"),
    [("detectron2", "mm_plugins", D2_CONFIG), ("mmdet", "d2_plugins", MM_CONFIG)],
)
def test_detector_is_counted_without_the_other_framework(
    framework, other, config, capsys, monkeypatch
):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    monkeypatch.setitem(sys.modules, other, None)
    analyze_model.main([str(ROOT / config), "--shape", "128", "128"])
    *_, total, attention, _, note = capsys.readouterr().out.splitlines()
    assert cells(total)[1:3] == ["15,528,388", "1.3667"]
    assert cells(attention)[:2] == ["of it attention (8 modules)", "2,400"]
    assert "one image of 128x128 pixels, 100 proposals" in note
