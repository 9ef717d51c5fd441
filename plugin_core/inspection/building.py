"""Building a model once before a run, to find errors of its parts."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from plugin_core.errors import ArgumentError

_Built = TypeVar("_Built")


def build_once(build: Callable[[str], _Built], setting: str) -> _Built:
    """Build a model without memory for its parameters, where that is possible.

    A few parts compute with numbers while they are built. With such a part the model is built on
    the CPU. PyTorch's random numbers afterwards are as if nothing had been built.

    Args:
        build: makes the model on a device, "meta" or "cpu".
        setting: where the model stands in the config, for errors that name no setting.

    Raises:
        ArgumentError: as a constructor raised it.
        ValueError: in one line, whatever else a constructor raised.
    """
    with torch.random.fork_rng(devices=()):
        try:
            with torch.device("meta"), _NumbersOnCPU():
                return build("meta")
        except Exception:  # a wrong setting, or a part that computes with numbers
            pass
        try:
            return build("cpu")
        except Exception as error:
            raise _in_a_line(error, setting) from error


class _NumbersOnCPU(TorchFunctionMode):
    """Has ``linspace`` give numbers: rates of dropped paths, which many backbones read."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return function(*args, **kwargs)


def _in_a_line(error: Exception, setting: str) -> ValueError:
    if isinstance(error, ArgumentError):
        return error
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ValueError):
        return ValueError(text)
    if not text:  # of a bare assertion, take its source line
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return ValueError(f"{setting}: it cannot be built: {type(error).__name__}: {text}")
