"""Load the compiled C code of this folder. ``setup.py`` builds it where there is a compiler."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from torch import Tensor

from plugin_core.kernels import choice

_VERSION = 1


def library() -> ctypes.CDLL | None:
    """Load the library. Where it is missing, warn once and return None.

    Raises:
        RuntimeError: if it is missing and ``PLUGIN_KERNELS=fast`` asks for it.
    """
    loaded = _load()
    if isinstance(loaded, ctypes.CDLL):
        return loaded
    if choice() == "fast":
        raise RuntimeError(f"PLUGIN_KERNELS=fast: {loaded}")
    _warn_once(loaded)
    return None


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Load the library; returns the reason if there is none."""
    folder = Path(__file__).parent
    files = [folder / f"_library{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.is_file()), None)
    again = "install this package again, on Linux with a C compiler that has OpenMP (gcc)"
    if file is None:
        return f"the compiled CPU kernels were not built; {again}"
    try:
        # PyTorch is imported already: our loops run on the OpenMP of its wheels.
        loaded = ctypes.CDLL(str(file))
        version = loaded.detection_plugins_version()
    except (OSError, AttributeError) as error:
        return f"the compiled CPU kernels do not load ({error}); {again}"
    if version != _VERSION:
        return f"the compiled CPU kernels are of another version of this package; {again}"
    return loaded


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"plugin_core: slower on the CPU than it could be, as {reason}", stacklevel=4)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Point to a tensor's first element.

    Raises:
        ValueError: if the tensor is not contiguous or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor on the CPU, got {tensor.stride()}")
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Make a C array of pointers to tensors, NULL for None."""
    addresses = [None if tensor is None else pointer(tensor) for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)
