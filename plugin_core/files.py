"""Writing files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends, and only then.

    After an exception ``path`` is as it was.

    Args:
        path: of the file, in a folder that exists.
    """
    part = f"{os.fspath(path)}.part-{os.getpid()}"
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)


@contextmanager
def whole_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Give a temporary sibling that becomes ``target`` when the block ends, and only then.

    After an exception ``target`` is as it was.

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
