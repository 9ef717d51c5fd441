"""Modules that act differently for the time of a step; what is registered stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def view(module: Any, **children: nn.Module) -> Any:
    """Copy a module without its contents, and let some of its children be others.

    The copy has the module's own parameters, buffers and hooks. The module does not change. An
    attribute that the copy's ``forward`` assigns is lost with the copy. Where several copies of a
    module each run a part of it, its hooks fire for every part.
    """
    seen = copy.copy(module)
    seen.__dict__["_modules"] = {**module._modules, **children}
    return seen


@contextmanager
def acting_as(kind: type[nn.Module], module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Let a module be of a subclass of its class inside the context, with some attributes more.

    Contexts can be nested. What the module had under the attributes' names comes back.
    """
    own = type(module)
    had = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    module.__class__ = kind
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        module.__class__ = own
        for name in attributes:
            module.__dict__.pop(name, None)
        module.__dict__.update(had)
