"""Choose between a backend's kernels and PyTorch's operators: the faster one that is right.

At the first use of a device and dtype the kernels are compared with PyTorch's operators on a small
tensor. Then both are timed on a map of a detector's size. The choice is kept for this process, and
on the disk for this GPU's name, these versions and these kernels. The first process of a machine
measures and the others wait, so that all of them choose the same.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils.benchmark import Timer

from plugin_core.files import in_turn, shared_cache_folder, write_text
from plugin_core.kernels import choice
from plugin_core.kernels.triplet_torch import TorchPasses, wide_of

if TYPE_CHECKING:
    from plugin_core.kernels.triplet_operators import Passes

logger = logging.getLogger(__name__)

# Two blocks and two parts, the last one ragged.
_CHECKED_SHAPE = (2, 11, 35, 67)
# res4 of two images of 800×1216 pixels
_TIMED_SHAPE = (2, 1024, 50, 76)
_ROUNDS, _RUNS_OF_A_ROUND = 5, 3

# The kernels by device, dtype and whether they are forced; or the reason why they are not taken.
_CHOSEN: dict[tuple[torch.device, torch.dtype, bool], Passes | str] = {}
_FULL: set[tuple[torch.device, torch.dtype, bool]] = set()  # those that once lacked memory
_LOCK = threading.Lock()


def chosen(device: torch.device, dtype: torch.dtype, make: Callable[[], Passes | str]) -> Any:
    """Give the kernels if they are right and the faster ones, or None with one warning.

    Args:
        device: of the tensors.
        dtype: of the tensors.
        make: gives the kernels, or the reason why there are none.

    Raises:
        RuntimeError: if they do not work and ``PLUGIN_KERNELS=fast`` asks for them.
    """
    is_forced = choice() == "fast"
    key = (device, dtype, is_forced)
    if key not in _CHOSEN:
        if _is_capturing(device):  # a graph must not record the measurement
            made = make() if is_forced else None
            return None if isinstance(made, str) else made
        try:
            with _LOCK, on(device):  # clocks wait for the current device alone
                _CHOSEN[key] = _choose(device, dtype, make(), is_forced)
        except torch.cuda.OutOfMemoryError:
            if is_forced:
                raise
            if key not in _FULL:  # there may be room next time
                _FULL.add(key)
                return None
            _CHOSEN[key] = f"{device} had no room to compare the kernels"
    found = _CHOSEN[key]
    if not isinstance(found, str):
        return found
    if is_forced:
        raise RuntimeError(f"PLUGIN_KERNELS=fast: {found}")
    _warn_once(found)
    return None


def _choose(
    device: torch.device, dtype: torch.dtype, made: Passes | str, is_forced: bool
) -> Passes | str:
    if isinstance(made, str):
        return made
    if is_forced:
        return failure_of(made, device, dtype) or made
    name = _name(device, dtype, made)
    try:
        times = _measured_once(name, made, device, dtype)
    except OSError as error:  # of the file
        if distributed.is_available() and distributed.is_initialized():
            return f"several processes cannot agree on the faster kernels ({error})"
        times = _measured(made, device, dtype)
    if isinstance(times, str):
        return times
    kernels, operators = (f"{times[which] * 1e3:.3g} ms" for which in ("kernels", "operators"))
    taken = times["kernels"] < times["operators"]
    logger.info(
        "triplet attention on %s: kernels take %s, PyTorch's operators %s; %s are used",
        name, kernels, operators, "the kernels" if taken else "PyTorch's operators",
    )  # fmt: skip
    return (
        made if taken else f"the kernels take {kernels} on {name}, PyTorch's operators {operators}"
    )


def _measured_once(
    name: str, made: Passes, device: torch.device, dtype: torch.dtype
) -> Mapping[str, float] | str:
    """Measure, or read what another process has measured."""
    file = shared_cache_folder() / "kernels.json"
    with in_turn(file) as is_alone:
        if not is_alone:
            raise OSError(f"{file} cannot be locked")
        known: dict[str, Any] = {}
        # A broken file is written anew.
        with suppress(FileNotFoundError, ValueError, TypeError):
            known = dict(json.loads(file.read_text(encoding="utf-8")))
        with suppress(KeyError, ValueError, TypeError):
            times = {which: float(known[name][which]) for which in ("kernels", "operators")}
            # What was right and fast elsewhere may lack a need of it here, as a C compiler.
            return failure_of(made, device, dtype) or times
        measured = _measured(made, device, dtype)
        if not isinstance(measured, str):
            known[name] = measured
            write_text(file, json.dumps(known, indent=2))
        return measured


def _measured(made: Passes, device: torch.device, dtype: torch.dtype) -> dict[str, float] | str:
    """Give the seconds of both for all passes, or the kernels' fault."""
    reason = failure_of(made, device, dtype)
    if reason is not None:
        return reason
    x, g, gates, gradients = _inputs(_TIMED_SHAPE, device, dtype)
    y = torch.empty_like(x)
    candidates = {"kernels": made, "operators": TorchPasses()}
    timers = {}
    for name, passes in candidates.items():
        values = {"p": passes, "x": x, "g": g, "y": y, "gates": gates, "gradients": gradients}
        statement = (
            "at = p.pool(x, True)[1]; p.scale(x, gates, y); p.product(g, x);"
            "p.input_gradient(g, gates, gradients, at)"
        )
        timers[name] = Timer(statement, globals=values, num_threads=torch.get_num_threads())
    found = dict.fromkeys(candidates, math.inf)
    try:
        with torch.no_grad():
            for _ in range(_ROUNDS):
                for name, timer in timers.items():
                    found[name] = min(found[name], timer.timeit(_RUNS_OF_A_ROUND).median)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        return _described(error, device)
    return found


def _name(device: torch.device, dtype: torch.dtype, made: Passes) -> str:
    """Name what a measurement holds for."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton = getattr(sys.modules.get("triton"), "__version__", "missing")
    sources = [Path(inspect.getfile(kind)).read_bytes() for kind in (type(made), TorchPasses)]
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:8]
    dtype_name = str(dtype).removeprefix("torch.")
    return f"{gpu}, {dtype_name}, torch {torch.__version__}, triton {triton}, kernels {version}"


def _is_capturing(device: torch.device) -> bool:
    with on(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device; other devices have none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"plugin_core: PyTorch's operators are used, as {reason}", stacklevel=4)


# ---------------------------------------------------------------------------------- the comparison


def failure_of(passes: Passes, device: torch.device, dtype: torch.dtype) -> str | None:
    """Describe the passes' fault, or return None. This compiles all their variants.

    Raises:
        OutOfMemoryError: if the GPU is full, which says nothing about the passes.
    """
    exact = TorchPasses()
    try:
        with torch.no_grad():
            x, g, gates, gradients = _inputs(_CHECKED_SHAPE, device, dtype)
            wide = wide_of(x)
            in_64_bits = [[t.double() for t in tensors] for tensors in ([x, g], gates, gradients)]
            (x64, g64), gates64, gradients64 = in_64_bits
            maps, at = exact.pool(x64, indices=True)
            found, found_at = passes.pool(x, indices=True)
            scaled, scaled64 = torch.empty_like(x), torch.empty_like(x64)
            passes.scale(x, gates, scaled)
            exact.scale(x64, gates64, scaled64)
            gradient = passes.input_gradient(g, gates, gradients, at)
            gradient64 = exact.input_gradient(g64, gates64, gradients64, at)
            pairs: dict[str, tuple[Any, Any, torch.dtype]] = {
                "pool": (found, maps, wide),
                "pool's indices": (found_at, at, torch.int32),
                "pool without indices": (passes.pool(x, indices=False)[0], maps, wide),
                "scale": ([scaled], [scaled64], dtype),
                "product": (passes.product(g, x), exact.product(g64, x64), wide),
                "input_gradient": ([gradient], [gradient64], dtype),
            }
            for name, (actual, expected, of_dtype) in pairs.items():
                torch.testing.assert_close(
                    list(actual),
                    [tensor.to(of_dtype) for tensor in expected],
                    msg=f"{name} differs from PyTorch's result",
                )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Triton and the driver raise whatever they like
        return _described(error, device)
    return None


def _described(error: Exception, device: torch.device) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"the kernels fail on {device} ({type(error).__name__}: {first_line})"


def _inputs(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Make x, g, gates and gradients of the pooled maps."""
    b, p, q, r = shape
    sizes = [(p, q), (p, r), (q, r)]
    x, g = (_numbers(shape, n, device, dtype) for n in (7, 11))
    gates = [_numbers((b, *size), 5, device, wide_of(x)) for size in sizes]
    gradients = [_numbers((b, 2, *size), 3, device, wide_of(x)) for size in sizes]
    return x, g, gates, gradients


def _numbers(shape: tuple[int, ...], step: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make eighths from -15 / 8 to 15 / 8 with many ties, without PyTorch's random generator."""
    numbers = torch.arange(math.prod(shape), device=device) * step % 31 - 15
    return (numbers / 8).to(dtype).view(shape)
