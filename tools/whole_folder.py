"""Folders that a tool writes whole or not at all, without the time that importing torch takes."""

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
        target: path of the folder, which may exist.
        check: raises if ``target`` may not be replaced. It is called when all is written, as
            something may have been put there meanwhile.
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
    """Find the nearest existing ancestor, if it is no folder that can be written."""
    parent = next(place for place in target.parents if os.path.lexists(place))
    return None if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK) else parent
