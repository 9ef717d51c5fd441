"""Telling whole files of checkpoints from damaged ones, without running their code."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from contextlib import suppress

from plugin_core.checkpoints.reading import read_checkpoint


def check_readable(path: str, setting: str) -> None:
    """Check that a checkpoint is there and whole.

    Args:
        path: of the file.
        setting: that names it, for the message.

    Raises:
        ValueError: names the setting, the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if not start and not os.path.getsize(path):
        raise ValueError(f"{setting}: {path!r} is empty (0 bytes); download or write it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{setting}: {path!r} is a web page, not a checkpoint; download the file itself"
        )
    try:
        damaged = _damaged_part(path)
        if damaged is None:
            read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if damaged:
        raise ValueError(
            f"{setting}: {path!r} is damaged, in its part {damaged!r}; download or write it again"
        )


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Tell whether a checkpoint can be read to its end."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        return False
    with suppress(ValueError, OSError):
        if zipfile.is_zipfile(path):  # of PyTorch; what else it holds does not matter here
            return _damaged_part(path) is None
        read_checkpoint(path)
        return True
    return False


def newest_whole(paths: Iterable[str]) -> tuple[str | None, list[str]]:
    """Find the first whole file.

    Args:
        paths: of checkpoints, the newest first.

    Returns:
        Its path, None if there is none; and those before it, which are damaged or missing.
    """
    damaged: list[str] = []
    for path in paths:
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def _damaged_part(path: str) -> str | None:
    """Name the first part of a zip archive that is damaged; None for files of another kind."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return str(error)
