"""Recording the calls of modules: their inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a module."""

    module: nn.Module
    args: tuple[Any, ...]
    output: Any


@contextmanager
def record_calls(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Record the calls of some modules, in their order, without a copy or a change."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(module, args, output))

    handles = [module.register_forward_hook(note) for module in dict.fromkeys(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
