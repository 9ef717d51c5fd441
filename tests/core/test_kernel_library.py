"""Where the compiled code comes from, and what happens where there is none."""

from __future__ import annotations

import ast
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plugin_core import TripletAttention
from plugin_core.kernels import library, triplet_cpu

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "plugin_core" / "kernels"


@pytest.fixture(autouse=True)
def _load_anew() -> Iterator[None]:
    for function in (library._load, library._warn_once):
        function.cache_clear()
    yield
    for function in (library._load, library._warn_once):
        function.cache_clear()


def without_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(library, "__file__", str(folder / "library.py"))


def test_missing_library_is_warned_of_once_and_the_plain_formula_taken(monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path)
    module, x = TripletAttention(kernel_size=3).eval(), torch.randn(2, 4, 5, 6)
    with pytest.warns(UserWarning, match="not built; install this package again, on Linux"):
        y = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(module(x), y)
        monkeypatch.setenv("PLUGIN_KERNELS", "plain")
        assert torch.equal(module(x), y)


def test_missing_library_is_an_error_where_the_fast_path_is_asked_for(monkeypatch, tmp_path):
    without_library(monkeypatch, tmp_path)
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="PLUGIN_KERNELS=fast: the compiled .* not built"):
        TripletAttention()(torch.randn(2, 4, 5, 6))


def test_library_that_does_not_load_or_is_of_another_version_is_not_used(monkeypatch, tmp_path):
    name = next(path.name for path in KERNELS.glob("_library*") if path.suffix == ".so")
    without_library(monkeypatch, tmp_path)
    (tmp_path / name).write_bytes(b"no library")
    assert "do not load" in str(library._load())
    library._load.cache_clear()
    (tmp_path / name).unlink()
    shutil.copy(KERNELS / name, tmp_path)
    monkeypatch.setattr(library, "_VERSION", -1)
    assert "of another version" in str(library._load())


def test_limits_of_the_c_code_are_those_that_python_checks():
    c = "".join(p.read_text(encoding="utf-8") for p in KERNELS.glob("*.[ch]"))
    assert re.findall(r"#define LANES (\d+)", c) == [str(triplet_cpu._LANES)]
    assert f"detection_plugins_version(void) {{ return {library._VERSION}; }}" in c


def test_c_is_given_no_memory_that_it_cannot_read():
    for tensor in (torch.empty(3, 4).T, torch.empty(3, device="meta")):
        with pytest.raises(ValueError, match="contiguous tensor on the CPU"):
            library.pointer(tensor)


def test_setup_compiles_every_c_file_and_knows_every_header():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    named = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and str(node.value).startswith("plugin_core/kernels/")
    }
    files = {str(p.relative_to(ROOT)) for p in KERNELS.iterdir() if p.suffix in (".c", ".h")}
    assert named == files
