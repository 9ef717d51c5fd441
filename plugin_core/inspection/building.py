"""Building a model once before a run, to find errors of its parts."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from plugin_core.errors import origin

_Built = TypeVar("_Built")


def build_once(
    build: Callable[[str], _Built], explain: Callable[[Exception], ValueError]
) -> _Built:
    """Build a model without memory for its parameters, where that is possible.

    A few parts compute with numbers while they are built. With such a part the model is built on
    the CPU. PyTorch's random numbers afterwards are as if nothing had been built.

    Args:
        build: makes the model on a device, "meta" or "cpu".
        explain: makes an error for the user of the one that a constructor raised.

    Raises:
        ValueError: what ``explain`` has made.
    """
    with torch.random.fork_rng(devices=()), silence():
        try:
            with torch.device("meta"):
                return build("meta")
        except Exception:  # of a wrong setting, or because there are no numbers
            pass
        try:
            return build("cpu")
        except Exception as error:
            raise explain(error) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings back: the run itself builds the model again and repeats them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def in_a_line(error: Exception, setting: str) -> str:
    """Say in one line that a setting's module cannot be built, and why."""
    text = " ".join(str(error).split())[:500]
    if not text:  # a bare assertion has only its source line
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return f"{setting}: it cannot be built: {type(error).__name__}: {text} ({origin(error)})"
