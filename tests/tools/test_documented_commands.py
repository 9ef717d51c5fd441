"""Every command that README and docs show is one that its tool takes."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from documented_commands import PAGES, ROOT, Command, commands

from plugin_core.command_line import COMMANDS

# What a reader runs besides, which is not ours to check
OTHERS = ("git", "python", ".", "cd", "P=$(python")
HANDED_OVER = re.compile(r"(train|test)_(mmdet|mmpretrain)\.py")
ALL = [command for page in PAGES for command in commands(page)]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(script: Path, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a script read its arguments, without doing anything."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))
    if script.name in ("train_net.py", "lazyconfig_train_net.py"):
        return pytest.importorskip("d2_plugins.command_line").parse_args("")
    if handed_over := HANDED_OVER.fullmatch(script.name):
        package = pytest.importorskip(handed_over[2])
        return load(
            Path(package.__file__).parent / ".mim" / "tools" / f"{handed_over[1]}.py"
        ).parse_args()
    tool = load(script)
    read = tool.parse_args if hasattr(tool, "parse_args") else tool._parser().parse_args
    return read(list(arguments))


def check_tool(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.is_file()
    for word in arguments:
        if word.startswith("configs/") and "*" not in word:
            assert (ROOT / word).exists(), word
    if arguments[-1:] == ["…"]:  # and so on
        arguments = arguments[:-1]
    args = parse(script, arguments, monkeypatch)
    if script.name == "train_net.py":
        from detectron2.config import get_cfg

        from d2_plugins import add_plugin_config, merge_config

        cfg = get_cfg()
        add_plugin_config(cfg)
        file = args.config_file if args.config_file.startswith("configs/") else ""
        merge_config(cfg, file, args.opts)


@pytest.mark.parametrize("command", ALL, ids=lambda c: " ".join([c.page, *c.words])[:90])
def test_command_is_one_that_its_tool_takes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command.words
    while re.match(r"^[A-Z_]+=\w*$", words[0]):  # settings of the environment
        words = words[1:]
    monkeypatch.chdir(ROOT)
    place = next((i for i, word in enumerate(words) if word.startswith("tools/")), None)
    if place is not None:
        return check_tool(ROOT / words[place], words[place + 1 :], monkeypatch)
    program, *rest = words
    if program.startswith("benchmarks/") or program.startswith("docs/"):
        assert (ROOT / program).is_file()
    elif program == "detection-plugins":
        return check_tool(ROOT / "tools" / COMMANDS[rest[0]], rest[1:], monkeypatch)
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        known = (ROOT / "setup.py").read_text()
        for extra in ",".join(extras).split(",") if extras else ():
            assert f'    "{extra}": [' in known, extra
    else:
        assert program in OTHERS, f"no test knows {program!r}"


def test_commands_are_found() -> None:
    assert {c.page for c in ALL} >= {"README.md", "your_data.md", "comparing.md"}
