"""Leave out what takes the frameworks seconds for each model or epoch and is read by no test."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sysconfig
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
# A prime, so that the rows of a repeated block are not alike, whatever their length
BLOCK = 16381


def read_once() -> None:
    """Read each framework's files and configs once, and leave the text of configs as it is.

    For each ``_base_ = "mmdet::…"`` mmengine reads about 100 YAML files, looks through all
    installed packages, and parses the files below it anew. Each dataset of it collects garbage
    among all that is imported. A Runner lays out its config about five times, 0.6 s each. A
    training loop by iterations sleeps for 2 s before each epoch but the first, so that workers do
    not block each other; the tests' epochs have two or three steps. Detectron2 parses the text of
    the whole config three times, 0.2 s each, to read a setting of it.
    """
    with contextlib.suppress(ImportError):
        defaults = importlib.import_module("detectron2.engine.defaults")
        read = defaults.OmegaConf
        parse = functools.cache(read.create)
        defaults.OmegaConf = types.SimpleNamespace(create=parse, select=read.select)
    with contextlib.suppress(ImportError):
        config, paths, packages, loops = (
            importlib.import_module(f"mmengine.{name}")
            for name in ("config.config", "config.utils", "utils.package_utils", "runner.loops")
        )
        config.Config._file2dict = staticmethod(reading_once(config.Config._file2dict))
        datasets = importlib.import_module("mmengine.dataset.base_dataset")
        datasets.gc = types.SimpleNamespace(collect=int)  # type: ignore[attr-defined]
        loops.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        # OneDL's mmengine imports it from yapf when it is needed, OpenMMLab's at the beginning.
        for module in (config, importlib.import_module("yapf.yapflib.yapf_api")):
            module.FormatCode = lambda text, **style: (text, True)  # type: ignore[attr-defined]
        paths.load = functools.cache(paths.load)
        for name in ("is_installed", "get_installed_path"):
            once = functools.cache(getattr(packages, name))
            for module in (config, packages):
                setattr(module, name, once)


def reading_once(read: Callable[..., Any]) -> Callable[..., Any]:
    """Read a config that is installed, or one of ours, once."""
    read_before = functools.cache(read)
    places = (sysconfig.get_paths()["purelib"], str(ROOT / "configs"))

    @functools.wraps(read)
    def read_or_copy(filename: Any, *settings: Any, **more: Any) -> Any:
        if str(Path(filename).resolve()).startswith(places):
            return copy.deepcopy(read_before(str(filename), *settings, **more))
        return read(filename, *settings, **more)

    return read_or_copy


def draw_little() -> None:
    """Repeat a block of random numbers in large tensors: a detector begins with 40 million."""
    for name in ("uniform_", "normal_"):
        setattr(Tensor, name, repeating(getattr(Tensor, name)))


def repeating(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(draw)
    def fill(tensor: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
        if not plain or tensor.numel() < 4 * BLOCK or not tensor.is_contiguous():
            return draw(tensor, *arguments, **settings)
        with torch.no_grad():
            block = draw(tensor.new_empty(BLOCK), *arguments, **settings)
            flat, whole = tensor.view(-1), tensor.numel() // BLOCK * BLOCK
            flat[:whole].view(-1, BLOCK).copy_(block)
            flat[whole:].copy_(block[: tensor.numel() - whole])
        return tensor

    return fill
