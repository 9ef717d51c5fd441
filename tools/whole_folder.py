"""Folders that a tool writes whole or not at all, without the time that importing torch takes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ArgumentError(ValueError):
    """An argument that cannot be used; the text says which and why."""


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


def check_target(target: Path, force: bool, own: re.Pattern[str], marker: str) -> None:
    """Refuse a folder that may not be made or replaced.

    Args:
        target: path of the folder, the tool's argument OUT.
        force: whether a folder that the tool has written may be replaced.
        own: matches the paths, relative to the folder, of the files that the tool writes.
        marker: the file that tells that it did.

    Raises:
        ArgumentError: says what is in the way.
    """
    parent = next((place for place in target.parents if os.path.lexists(place)), target)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ArgumentError(f"OUT: cannot write in '{parent}'; give a place that can be written")
    if not os.path.lexists(target):
        return
    if not force:
        raise ArgumentError(f"OUT: '{target}' already exists; give another name, or --force")
    if target.is_symlink() or not target.is_dir():
        raise ArgumentError(f"OUT: '{target}' is not a folder; --force replaces only folders")
    homes = [home.resolve() for home in (Path.home(), Path.cwd())]
    if any(target.resolve() in (home, *home.parents) for home in homes):
        raise ArgumentError(
            f"OUT: '{target}' is or holds the home or the current directory; give another name"
        )
    found = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    files = [path.relative_to(target).as_posix() for path in found]
    foreign = [name for name in files if not own.fullmatch(name)]
    if foreign or (files and marker not in files):
        reason = f"holds '{min(foreign)}'" if foreign else f"lacks '{marker}'"
        raise ArgumentError(
            f"OUT: '{target}' {reason}, so this tool did not write all of it; "
            "--force replaces only this tool's folders: give another name"
        )
