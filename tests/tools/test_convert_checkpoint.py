"""tools/convert_checkpoint.py: what cannot be converted is an error, and OUT stays as it was."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_checkpoint_cases import BOTH, authors_resnet, detectron2_config, needs, run
from torch import nn


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built without values, as every tensor that counts is loaded or drawn here."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


# ------------------------------------------------------------------------------------------- errors


def no_file(path: Path) -> None:
    pass


def garbage(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


def another_network(path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(1)}, path)


def deep_stem(path: Path) -> None:
    names = ["conv1.0.weight", "layer1.0.conv1.weight"]
    torch.save(dict.fromkeys(names, torch.zeros(1)), path)


def another_depth(path: Path) -> None:
    torch.save(authors_resnet(34, attention=False).state_dict(), path)


def another_width(path: Path) -> None:
    net = copy.deepcopy(authors_resnet(18, attention=False))
    net.layer1[0].conv1 = nn.Conv2d(64, 32, 3, bias=False)
    torch.save(net.state_dict(), path)


def trained_with_warm_start(path: Path) -> None:
    state_dict = authors_resnet(18).state_dict()
    torch.save(state_dict | {"layer1.0.triplet_attention.alpha": torch.zeros(())}, path)


def squeeze_and_excitation(path: Path) -> None:
    state_dict = authors_resnet(18, attention=False).state_dict()
    torch.save(state_dict | {"layer1.0.se.fc1.weight": torch.zeros(4, 64)}, path)


def group_norm(path: Path) -> None:
    state_dict = authors_resnet(18, attention=False).state_dict()
    torch.save({n: t for n, t in state_dict.items() if ".running_" not in n}, path)


class Trap:
    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def malicious(path: Path) -> None:
    torch.save({"conv1.weight": Trap(path.with_name("witness"))}, path)


@needs("detectron2")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_file, "there is no checkpoint"),
        (garbage, "cannot be read"),
        (another_network, "no ResNet and no MobileNetV2"),
        (deep_stem, "a ResNet-D"),
        (another_depth, "weights of a ResNet-34, but the model has a ResNet-18"),
        (another_width, "res2.0.conv1.weight is (32, 64, 3, 3), not (64, 64, 3, 3)"),
        (trained_with_warm_start, "warm_start=True"),
        (squeeze_and_excitation, "blocks have layer1.0.se.fc1.weight, which the model's have no"),
        (group_norm, "has no running statistics, as GroupNorm has none"),
        (malicious, "system, which weights have no need of"),
    ],
)
def test_source_that_cannot_be_converted_is_an_error_and_out_stays_as_it_was(
    tmp_path, capsys, write: Callable[[Path], None], message
):
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    config = detectron2_config(tmp_path, 18)
    write(source)
    out.write_bytes(b"before")
    assert run(source, out, "d2", "--config", config) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(source) in error and message in error
    assert out.read_bytes() == b"before"
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"source.pth", "out.pth", "r18.yaml"}  # no rest of a file, no witness


@needs("detectron2")
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_disk_that_is_full_leaves_out_as_it_was(tmp_path, capsys, monkeypatch, suffix):
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "source.pth")
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"before")

    def fill_up(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_up)
    monkeypatch.setattr(pickle, "dump", fill_up)
    assert run(tmp_path / "source.pth", out, "d2") == 1
    assert capsys.readouterr().err == "error: No space left on device; nothing was written\n"
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", out.name}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/out.pth", "there is no folder"),
        ("out.onnx", "Detectron2 takes a file that ends in .pth or .pkl"),
        ("source.pth", "is SOURCE"),
        ("link.pth", "is SOURCE"),
        ("folder.pth", "is a folder"),
    ],
)
def test_out_that_cannot_be_written_is_an_error(tmp_path, capsys, out, message):
    source = tmp_path / "source.pth"
    another_network(source)
    before = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)
    (tmp_path / "folder.pth").mkdir()
    assert run(source, tmp_path / out, "d2") == 1
    assert message in capsys.readouterr().err
    assert source.read_bytes() == before


def test_mmdetections_weights_are_pth_only(tmp_path, capsys):
    assert run(tmp_path / "source.pth", tmp_path / "out.pkl", "mm") == 1
    assert "MMDetection takes a file that ends in .pth" in capsys.readouterr().err


@BOTH
def test_config_that_cannot_be_built_is_an_error_that_names_it(tmp_path, capsys, to):
    torch.save(authors_resnet(18).state_dict(), tmp_path / "source.pth")
    config = tmp_path / ("c.yaml" if to == "d2" else "c.py")
    config.write_text("MODEL: {BACKBONE: {NAME: no_such}}\n" if to == "d2" else "model = dict()\n")
    for path in (config, tmp_path / f"none{config.suffix}"):
        options = ("--config", str(path))
        assert run(tmp_path / "source.pth", tmp_path / "out.pth", to, *options) == 1
        assert capsys.readouterr().err.startswith(f"error: --config {path}: ")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("to", "framework", "advice"),
    [
        ("d2", "detectron2", "pip install ./packaging/detectron2"),
        ("mm", "mmdet", "pip install -e .[mmdet]"),
    ],
)
def test_missing_framework_is_said_in_one_line(
    tmp_path, capsys, monkeypatch, to, framework, advice
):
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "source.pth")
    for name in [n for n in sys.modules if n.partition(".")[0] == f"{to}_plugins"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", to) == 1
    printed = capsys.readouterr()
    assert "source.pth: ResNet-18, torchvision's names" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: --to {to}: ") and advice in line
