"""The command `detection-plugins`, and configs that are named instead of located."""

from __future__ import annotations

import sys

import pytest

from plugin_core import __version__, command_line
from plugin_core.shipped import TOOLS, shipped_config


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the process would have become."""
    found: list[list[str]] = []
    monkeypatch.setattr(command_line.os, "execv", lambda _, words: found.append(words))
    return found


def test_a_command_becomes_its_script_with_the_same_arguments(executed: list[list[str]]) -> None:
    command_line.main(["compare", "gt.json", "--detector", "a=a.json"])
    script = str(TOOLS / "compare_detectors.py")
    assert executed == [[sys.executable, script, "gt.json", "--detector", "a=a.json"]]


def test_help_lists_every_command_with_its_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main([])
    assert not end.value.code
    lines = capsys.readouterr().out
    for name, script in command_line.COMMANDS.items():
        assert f"  {name} " in lines and f" {script}: " in lines


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"detection-plugins {__version__}\n"


def test_a_command_that_is_not_there_is_told_with_those_that_are(executed: list) -> None:
    for name, hint in (("compair", "did you mean 'compare'"), ("x", "one of train-d2, ")):
        with pytest.raises(SystemExit, match=f"error: there is no command '{name}'; {hint}"):
            command_line.main([name, "x.py"])
    assert not executed


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("d2_plugins://COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml", "d2_plugins/configs"),
        ("mm_plugins::ida/faster-rcnn_r50-ida_fpn_1x_coco.py", "mm_plugins/.mim/configs"),
        (
            "mm_plugins::mmpretrain/ida/resnet50-ida_1xb64_coco2014-224px.py",
            "mm_plugins/.mim/configs",
        ),
    ],
)
def test_a_config_of_this_project_is_found_by_its_name(name: str, path: str) -> None:
    found = shipped_config(name)
    assert path in found and found.endswith(name[len("d2_plugins:") :].lstrip(":/"))


def test_other_configs_stay_as_they_are() -> None:
    for config in ("your.yaml", "mmdet::ssd/ssd300_coco.py", "model_zoo://COCO-Detection/x.yaml"):
        assert shipped_config(config) == config


@pytest.mark.parametrize("prefix", ["d2_plugins://", "mm_plugins::"])
def test_a_config_that_is_not_there_is_told(prefix: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{prefix}no/such.py: there is no such config"):
        shipped_config(f"{prefix}no/such.py")
