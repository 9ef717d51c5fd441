"""Handing over to MMDetection's scripts: what is checked, and where there is a GPU."""

from __future__ import annotations

import os
import sys

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mm_plugins import command_line


class Handed(Exception):
    """Raised in place of starting anew."""


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    calls: list[tuple] = []

    def execv(path: str, arguments: list[str]) -> None:
        calls.append((path, arguments, os.environ.get("CUDA_VISIBLE_DEVICES")))
        raise Handed

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(sys, "argv", ["train_mmdet.py", "none.py"])
    return calls


def test_gpu_without_mmcvs_cuda_operators_is_hidden(started_anew, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "has_cuda_operators", lambda: False)
    with pytest.raises(Handed):
        command_line.run("train")
    assert started_anew == [(sys.executable, sys.orig_argv, "")]
    assert "running on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "operators"), [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("script", ["train", "test"])
def test_missing_config_is_one_line(started_anew, monkeypatch, script, gpu, operators, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(command_line, "has_cuda_operators", lambda: operators)
    monkeypatch.setattr(
        sys, "argv", [f"{script}_mmdet.py", "none.py", "none.pth"][: 2 + (script == "test")]
    )
    with pytest.raises(SystemExit) as error:
        command_line.run(script)
    assert str(error.value) == "error: there is no config file 'none.py'"
    assert started_anew == [] and list(tmp_path.iterdir()) == []


def test_script_that_mmdetection_lacks_is_named():
    with pytest.raises(SystemExit, match="this MMDetection has no .*none.py"):
        command_line.run("none")


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """What the script is stopped with, for the words after its name."""
    monkeypatch.chdir(tmp_path)
    for _, variable in command_line._LAUNCHERS.values():
        monkeypatch.delenv(variable, raising=False)

    def call(*words: str) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["train_mmdet.py", *words])
        with pytest.raises(SystemExit) as error:
            command_line.run("train")
        assert not (tmp_path / "work_dirs").exists()
        return str(error.value)

    return call


@pytest.mark.parametrize(
    ("launcher", "command"), [("pytorch", "torchrun"), ("slurm", "srun"), ("mpi", "mpirun")]
)
def test_launcher_that_did_not_start_the_command_is_named(refused, tmp_path, launcher, command):
    (tmp_path / "a.py").write_text("model = dict(type='RetinaNet')\n")
    message = refused("a.py", "--launcher", launcher)
    assert message.startswith(f"error: --launcher {launcher}: start this command by {command}")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.yaml", "MODEL: {}\n", "tools/train_net.py takes yaml"),
        ("a.py", "x = 1\n", "it defines no model"),
        ("a.py", "custom_imports = dict(imports=['mm_plugin'])\n", "mm_plugin"),
        ("a.py", "model = dict(\n", "SyntaxError"),
    ],
)
def test_file_that_is_no_config_of_mmdetection_is_one_line(
    refused, tmp_path, file, content, reason
):
    (tmp_path / file).write_text(content)
    message = refused(file)
    assert message.startswith(f"error: config {file!r}: ") and reason in message
    assert "\n" not in message


def test_wrong_setting_of_a_model_is_one_line_and_leaves_no_folder(refused, tmp_path):
    (tmp_path / "a.py").write_text(
        "layer = dict(type='TripletAttention', kernel_size=4)\n"
        "plugins = [dict(cfg=layer, position='after_conv2')]\n"
        "model = dict(type='PluginResNet', depth=18, plugins=plugins)\n"
    )
    message = refused("a.py")
    assert message.startswith("error: model.plugins[0].cfg.kernel_size: must be a positive odd")
    assert message.endswith("got 4") and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]
