"""Keeping other trainings out of a training's folder."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from plugin_core.training.errors import RunError

LOCK = ".training.lock"


class OccupiedFolder(RunError):
    """Another training is in the folder."""


@contextmanager
def occupy(folder: str, setting: str) -> Iterator[None]:
    """Keep other trainings out of a folder until the block, or the process, ends.

    It makes the folder, and removes what writers that were killed have left in it. Call it in one
    process of a training, before anything else writes there.

    Args:
        folder: of the training's results.
        setting: that names the folder, for the message.

    Raises:
        OccupiedFolder: if another training is in it.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, LOCK), "a+", encoding="utf-8") as file:
        try:
            # Not flock, which workers would inherit and hold on to after this process was killed
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise OccupiedFolder(
                f"{setting}: another training ({file.read().strip() or 'unknown'}) is writing to "
                f"{folder!r}; choose another folder or wait for its end"
            ) from None
        except OSError:  # a file system without locks
            pass
        _write(file, f"process {os.getpid()} on {socket.gethostname()}")
        for name in os.listdir(folder):
            if re.search(r"(\.pth|last_checkpoint)\.part-\d+$", name):
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
        try:
            yield
        finally:
            _write(file, "")


def _write(file: TextIO, text: str) -> None:
    with suppress(OSError):  # of a full disk
        file.truncate(0)
        file.write(text)
        file.flush()
