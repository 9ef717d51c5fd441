"""Reading checkpoints of any kind, and refusing those that would run something."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from network_names import write_pickle
from torch.torch_version import TorchVersion

from plugin_core.checkpoints.pixel_format import find_pixel_format
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


CONTENT = {"epoch": 3, "arch": "resnet50", "state_dict": {"module.conv1.weight": torch.ones(2, 3)}}
ARRAYS = {"model": {"conv1_w": np.arange(3, dtype=np.float32)}, "__author__": "MSRA"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pytorchs_files_are_read(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(str(path))
    assert content["arch"] == "resnet50"
    assert torch.equal(find_state_dict(content)["conv1.weight"], torch.ones(2, 3))


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.6", reason="PyTorch refuses it")
def test_metric_that_numpy_computed_does_not_keep_a_file_from_being_read(tmp_path):
    content = CONTENT | {"best_mAP": np.mean([82.0, 85.0]), "aps": np.ones(3)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert read_checkpoint(str(tmp_path / "model_best.pth.tar"))["best_mAP"] == 83.5


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_are_read(tmp_path, protocol):
    write_pickle(OrderedDict(ARRAYS, scalar=np.float64(2)), tmp_path / "R-50.pkl", protocol)
    content = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert content["__author__"] == "MSRA" and content["scalar"] == 2
    assert find_state_dict(content)["conv1_w"].tolist() == [0, 1, 2]


def test_pickle_of_python_2_is_read(tmp_path):
    values = np.array([1.5, -2.0], dtype="<f4")
    assert max(values.tobytes()) > 127  # what is no ASCII
    (tmp_path / "R-50.pkl").write_bytes(
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + values.tobytes() + b"tbs."
    )
    content = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert find_state_dict(content)["conv1_w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("blobs",), ("model", "blobs")])
def test_state_dict_is_found_where_it_is_nested(keys):
    content: dict[str, Any] = {"module.fc.weight": torch.ones(1), "lr": 0.1, "words": np.array("a")}
    for key in keys:
        content = {key: content, "epoch": 3}
    assert find_state_dict(content) == {"fc.weight": torch.ones(1)}


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_file_that_would_run_something_is_refused_by_its_name_and_runs_nothing(tmp_path, kind):
    witness, path = tmp_path / "witness", tmp_path / ("t.pkl" if kind == "pickle" else "t.pth")
    weight = np.ones(1) if kind == "pickle" else torch.ones(1)
    content = {"model": {"conv1.weight": weight}, "trap": Trap(witness)}
    if kind == "pickle":
        write_pickle(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, .* --trust lets it"):
        read_checkpoint(str(path))
    assert find_pixel_format(str(path)) is None
    assert not witness.exists()
    assert "conv1.weight" in read_checkpoint(str(path), trust=True)["model"]
    assert witness.exists()


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "numpy.load", "numpy.core.multiarray.frombuffer", "torch.load"]
)
def test_pickle_may_make_arrays_only(tmp_path, name):
    module, _, function = name.rpartition(".")
    (tmp_path / "t.pkl").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(ValueError, match=f"asks for {name}, "):
        read_checkpoint(str(tmp_path / "t.pkl"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>"])
def test_broken_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    torch.save(CONTENT, path) if suffix == ".pth" else write_pickle(ARRAYS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        read_checkpoint(str(path))
    assert str(error.value).startswith(f"checkpoint {str(path)!r} cannot be read: it is cut off")
    assert find_pixel_format(str(path)) is None


def test_missing_file_and_file_of_something_else_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint '.*none.pth'"):
        read_checkpoint(str(tmp_path / "none.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="'.*list.pth' holds a list; expected a state dict"):
        read_checkpoint(str(tmp_path / "list.pth"))


def test_safetensors_are_read_by_their_library_if_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="cannot be read: it needs `pip install safetensors`"):
        read_checkpoint(str(path))
    library = SimpleNamespace(load_file=lambda file: {"fc.bias": torch.ones(1), "of": file})
    monkeypatch.setitem(sys.modules, "safetensors", library)
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)
    assert read_checkpoint(str(path)) == {"fc.bias": torch.ones(1), "of": str(path)}
