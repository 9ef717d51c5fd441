"""Writing files that appear whole or not at all."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
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


@cache
def cache_folder() -> Path:
    """Return the folder of results and copies; ``DETECTION_PLUGINS_CACHE`` names another one.

    Where it cannot be written to, it is a folder for temporary files, of this process alone.
    """
    try:
        return shared_cache_folder()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="detection-plugins-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def shared_cache_folder() -> Path:
    """Return the folder that all processes of a user share.

    Raises:
        OSError: if it cannot be written to.
    """
    own = os.environ.get("DETECTION_PLUGINS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(own or os.path.join(base, "detection-plugins")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@contextmanager
def in_turn(path: Path) -> Iterator[bool]:
    """Let one process after the other into the block.

    Where no lock can be made, all go in at once: on a full disk, or a file system without locks.
    The block gets whether there is one.

    Args:
        path: of the file that they share; its folder is made.
    """
    with ExitStack() as stack:
        is_alone = False
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path.with_suffix(".lock"), "w"))
            fcntl.lockf(lock, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone


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
