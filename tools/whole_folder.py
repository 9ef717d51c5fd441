"""Folders that a tool writes whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Give a temporary sibling that becomes ``target``, or is removed after any exception.

    Args:
        target: of the folder; what is there is replaced in the end.
        check: raises if it may not be; called before that, since writing takes time and someone
            may have put something there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        check()
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def unwritable_parent(target: Path) -> Path | None:
    """The nearest existing ancestor, if it is no folder that can be written."""
    parent = next(place for place in target.parents if os.path.lexists(place))
    return None if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) else parent
