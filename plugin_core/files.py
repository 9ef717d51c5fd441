"""Writing files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
            # On the disk first, so that a crash of the machine leaves no empty file in place
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(part)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, in UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def make_folder(option: str, folder: Path) -> None:
    """Make a folder, and those above it, where they are missing.

    Args:
        option: that names it, for the message.
        folder: may be there already.

    Raises:
        ValueError: if a file is in its place, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{option} {folder}: {error.filename!r} is a file, not a folder"
        ) from error
    except OSError as error:
        raise ValueError(f"{option} {folder}: {error.strerror}") from error


def file_state(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return a file's size and time of change, by which an unchanged file is known."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns
