"""Telling whole files of checkpoints from damaged ones, without running their code."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.files import file_state
from plugin_core.training.errors import RunError


def check_readable(path: str, setting: str) -> None:
    """Check that a checkpoint is there and whole.

    Args:
        path: of the file.
        setting: that names it, for the message.

    Raises:
        RunError: names the setting, the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise RunError(f"{setting}: there is no checkpoint {path!r}")
    try:
        _check_readable(path, *file_state(path))
    except RunError as error:
        raise RunError(f"{setting}: {error}") from error.__cause__


@lru_cache(maxsize=4)
def _check_readable(path: str, *state: int) -> None:
    """Read a file once, however many checks ask for it."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise RunError(f"{path!r} is empty (0 bytes); download or write it again")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise RunError(f"{path!r} is a web page, not a checkpoint; download the file itself")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise RunError(f"{path!r} is cut off; download or write it again")
    try:
        content = read_checkpoint(path)
    except ValueError as error:
        # Only tools/convert_checkpoint.py has this option.
        command = "tools/convert_checkpoint.py --trust makes a file of its weights alone"
        told = str(error).replace("--trust lets it", command)
        if "asks for mmengine." in told:
            told = (
                f"{path!r} is a checkpoint of MMDetection; convert it: "
                f"tools/convert_checkpoint.py {path} converted.pth --to d2"
            )
        raise RunError(told) from error
    damaged = _damaged_part(path)
    if damaged:
        raise RunError(f"{path!r} is damaged, in its part {damaged!r}; download or write it again")
    tensors = find_state_dict(content)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise RunError(
                f"{path!r} holds numbers that are not finite, first in {name!r}, as after a "
                "training that diverged; take an earlier checkpoint"
            )
    if not tensors:
        raise RunError(
            f"{path!r} holds no tensors where a detector's checkpoint has them "
            "('state_dict' or 'model')"
        )


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Tell whether a checkpoint can be read to its end."""
    path = os.fspath(path)
    with suppress(OSError, ValueError):
        if zipfile.is_zipfile(path):  # of PyTorch; what the file holds is another question
            return _damaged_part(path) is None
        check_readable(path, "")
        return True
    return False


def checkpoints_in(folder: str) -> list[str]:
    """List the names of the checkpoints in a folder, which may not be there."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.endswith(".pth"))


def newest_whole(paths: Sequence[str]) -> tuple[str | None, list[str]]:
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


def find_resumable(
    folder: str, named: str, work_dir: str | None = None, *, final: Sequence[str] = ()
) -> tuple[str | None, list[str]]:
    """Find the newest whole checkpoint of a training.

    Args:
        folder: with the checkpoints.
        named: their names, such as "model_{}.pth" or "epoch_{:03d}.pth".
        work_dir: folder with the file ``last_checkpoint``; by default the same folder.
        final: names of checkpoints of a training's end.

    Returns:
        Its path, or None if there is no checkpoint; and the newer ones that are damaged.

    Raises:
        RunError: if there are checkpoints and none is whole.
    """
    pattern = re.compile(r"(\d+)".join(map(re.escape, re.split(r"\{[^{}]*\}", named))))
    present = os.listdir(folder) if os.path.isdir(folder) else []
    numbers = {int(match[1]): name for name in present if (match := pattern.fullmatch(name))}
    last = ""
    with suppress(OSError, UnicodeDecodeError):
        text = Path(work_dir or folder, "last_checkpoint").read_text(encoding="utf-8")
        last = os.path.basename(text.strip())
    # Files with higher numbers than the last one are of an earlier training in the same folder.
    match = pattern.fullmatch(last)
    limit = int(match[1]) if match else math.inf
    names = [numbers[number] for number in sorted(numbers, reverse=True) if number <= limit]
    if not last:
        names = [name for name in final if name in present] + names
    elif last not in names:
        names.insert(0, last)
    path, damaged = newest_whole([os.path.join(folder, name) for name in names])
    if path is None and damaged:
        raise RunError(
            f"--resume: no checkpoint in {folder!r} is whole: {', '.join(map(repr, damaged))}; "
            "leave out --resume to begin anew"
        )
    return path, damaged


def _damaged_part(path: str) -> str | None:
    """Name the first part of a zip archive that is damaged; None for files of another kind."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return str(error)
