"""Builds a model once before a run, to hear what its parts raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from plugin_core.errors import ArgumentError

_Built = TypeVar("_Built")


def build_once(build: Callable[[str], _Built], setting: str) -> _Built:
    """Build a model without memory for its parameters, where that is possible.

    A few parts compute with numbers while they are built. With such a part the model is built on
    the CPU.

    Args:
        build: makes the model on a device, "meta" or "cpu".
        setting: where the model stands in the config, for errors that name no setting.

    Raises:
        ArgumentError: as a constructor raised it.
        ValueError: in one line, whatever else a constructor raised.
    """
    try:
        with torch.device("meta"):
            return build("meta")
    except ValueError as error:
        raise _in_a_line(error, setting) from error
    except Exception:  # of a wrong setting, or because there are no numbers
        pass
    try:
        return build("cpu")
    except Exception as error:
        raise _in_a_line(error, setting) from error


def _in_a_line(error: Exception, setting: str) -> ValueError:
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ArgumentError):
        return error
    if isinstance(error, ValueError):
        return ValueError(text)
    return ValueError(f"{setting}: it cannot be built: {type(error).__name__}: {text}")
