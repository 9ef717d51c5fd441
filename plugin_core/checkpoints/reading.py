"""Reading checkpoints of any origin without running their code."""

from __future__ import annotations

import codecs
import importlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Keys of the state dict in a checkpoint: of MMDetection and most ImageNet trainings, of Detectron2,
# of Caffe2's detectors.
_STATE_DICT_KEYS = ("state_dict", "model", "blobs")


def read_checkpoint(path: str, *, trust: bool = False) -> Mapping[str, Any]:
    """Read a file of PyTorch, pickle (Detectron2's ``.pkl``) or safetensors.

    Args:
        path: of the file.
        trust: let the file run what it asks to run.

    Returns:
        The whole content, tensors on the CPU.

    Raises:
        ValueError: if the file is missing, is no checkpoint, or is not trusted and holds more than
            tensors, arrays and plain values.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path!r}")
    try:
        content = _read(path, trust)
    except (ImportError, OSError) as error:
        raise ValueError(f"checkpoint {path!r} cannot be read: {error}") from error
    except Exception as error:  # a broken file makes the readers raise almost anything
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted and not trust:
            raise ValueError(
                f"checkpoint {path!r} asks for {wanted[1]}, which weights have no need of and "
                "which may run anything; if you know where the file comes from, --trust lets it"
            ) from error
        raise ValueError(
            f"checkpoint {path!r} cannot be read: it is cut off, or not what its name says"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"checkpoint {path!r} holds a {type(content).__name__}; expected a state dict"
        )
    return content


def find_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find a checkpoint's tensors by name, arrays as tensors, without DataParallel's prefix."""
    state = checkpoint
    while True:
        nested = [state[key] for key in _STATE_DICT_KEYS if isinstance(state.get(key), Mapping)]
        if not nested:
            break
        state = nested[0]
    tensors = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.tensor(value)  # a copy, as the array may be read-only
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name.removeprefix("module.")] = value.detach()
    return tensors


def class_names_of(path: str) -> list[str] | None:
    """Read the names of a detector's classes from its checkpoint; None if it does not tell them.

    Detectron2's trainers here save them as ``thing_classes``, MMDetection in ``meta``.
    """
    try:
        content = read_checkpoint(path)
    except ValueError:
        return None  # whoever loads the file says what is wrong with it
    names = content.get("thing_classes")
    if names is None and isinstance(content.get("meta"), Mapping):
        meta = content["meta"].get("dataset_meta")
        names = meta.get("classes") if isinstance(meta, Mapping) else None
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else None


def _read(path: str, trust: bool) -> Any:
    if path.endswith(".safetensors"):
        try:
            safetensors = importlib.import_module("safetensors.torch")
        except ImportError as error:
            raise ImportError("it needs `pip install safetensors`") from error
        return safetensors.load_file(path)
    is_zip = zipfile.is_zipfile(path)
    if path.endswith(".pkl") and not is_zip:
        # latin1, as in Detectron2, because Python 2 wrote the oldest files.
        with open(path, "rb") as file:
            if trust:
                return pickle.load(file, encoding="latin1")
            return _WeightsUnpickler(file).load()
    # Mapped into memory, so that a look at a file of some GB does not read all of it.
    with _allowing():
        return torch.load(path, map_location="cpu", weights_only=not trust, mmap=is_zip)


def _numpy_globals() -> list[Any]:
    """List what ``torch.load`` needs for numpy's arrays and numbers; it runs nothing else."""
    array = np.zeros(1)
    make_array, make_number = array.__reduce__()[0], array[0].__reduce__()[0]
    harmless: list[Any] = [np.ndarray, np.dtype]
    harmless += {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}
    for core in ("core", "_core"):  # numpy 2 renamed the module that these functions are in
        harmless.append((make_array, f"numpy.{core}.multiarray._reconstruct"))
        harmless.append((make_number, f"numpy.{core}.multiarray.scalar"))
    return harmless


#: What a checkpoint may hold beside tensors and plain containers: a metric, as numpy computed it.
#: A framework's side adds what its trainer saves.
ALLOWED = _numpy_globals()


def _allowing() -> AbstractContextManager[None]:
    """Let ``torch.load`` read what is allowed, though another's loading took it off the list."""
    if TorchVersion(torch.__version__) < "2.6":
        return nullcontext()  # its list takes no names of an earlier numpy
    known = torch.serialization.get_safe_globals()  # which the context would take away at its end
    return torch.serialization.safe_globals([g for g in ALLOWED if g not in known])


class _WeightsUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays and plain containers, and nothing else."""

    _NUMPY_CORE = {
        "multiarray._reconstruct": np.zeros(0).__reduce__()[0],
        "multiarray.scalar": np.float64(0).__reduce__()[0],
        "numeric._frombuffer": np.zeros(0).__reduce_ex__(5)[0],
    }
    _ALLOWED = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": codecs.encode,  # how Python 3 writes bytes for Python 2
        **{f"numpy.core.{name}": value for name, value in _NUMPY_CORE.items()},
        **{f"numpy._core.{name}": value for name, value in _NUMPY_CORE.items()},
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in self._ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {full_name}")
        return self._ALLOWED[full_name]
