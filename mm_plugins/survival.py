"""What a training in a work folder needs to survive: a guard, whole files and a lock."""

from __future__ import annotations

import fcntl
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_distributed
from torch import Tensor

from plugin_core.checkpoints.reading import read_checkpoint


class NonFiniteLoss(ValueError):
    """The loss was not finite for too many steps in a row."""


class OccupiedError(ValueError):
    """Another training is in the work folder."""


class NonFiniteGuard:
    """Decides, alike in all processes, whether a step's losses are finite, and counts.

    Args:
        limit: number of steps in a row without a finite loss that is too much.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(
                f"optim_wrapper.max_non_finite_steps: must be a whole number from 1, got {limit!r}"
            )
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def check(self, losses: Mapping[str, Tensor], batch: Sequence[str]) -> str | None:
        """Say what is wrong with a step that is to be left out; None if nothing is.

        Args:
            losses: by name, with "loss", their sum.
            batch: images of this process.

        Raises:
            NonFiniteLoss: if it is one too many.
        """
        bad = (~torch.isfinite(losses["loss"].detach())).any().float().reshape(1)
        if is_distributed():
            all_reduce(bad, "max")
        if not bad.item():
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.total += 1
        values = {name: value.detach().mean().item() for name, value in losses.items()}
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        told = f"{', '.join(wrong) or 'the loss of another process'} with the images " + (
            ", ".join(batch) or "of this batch"
        )
        if self.in_a_row >= self.limit:
            raise NonFiniteLoss(
                f"the loss was not finite in {self.in_a_row} steps in a row "
                f"(optim_wrapper.max_non_finite_steps); in the last {told}"
            )
        return told


def check_readable(path: str, setting: str) -> None:
    """Check that a checkpoint is whole.

    Raises:
        ValueError: names the setting, the file and what is wrong.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if not start:
        raise ValueError(f"{setting}: {path!r} is empty (0 bytes); download or write it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{setting}: {path!r} is a web page, not a checkpoint; download the file itself"
        )
    try:
        read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{setting}: {path!r} is damaged (in its part {damaged!r})")


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Tell whether a checkpoint can be read to its end."""
    with suppress(ValueError):
        check_readable(os.fspath(path), "")
        return True
    return False


def find_resumable(
    folder: str, named: str, work_dir: str | None = None
) -> tuple[str | None, list[str]]:
    """Find the newest whole checkpoint of a work folder.

    Args:
        folder: with the checkpoints.
        named: the names of its checkpoints, such as "iter_{}.pth".
        work_dir: folder with the file ``last_checkpoint``; by default the same.

    Returns:
        Its path, or None if there is no checkpoint; and the newer ones that are damaged.

    Raises:
        ValueError: if there are checkpoints and none is whole.
    """
    pattern = re.compile(r"(\d+)".join(map(re.escape, named.split("{}"))))
    numbers = {
        int(match[1]): name
        for name in (os.listdir(folder) if os.path.isdir(folder) else ())
        if (match := pattern.fullmatch(name))
    }
    last = ""
    with suppress(OSError):
        last = os.path.basename(Path(work_dir or folder, "last_checkpoint").read_text().strip())
    # Files with higher numbers than the last one are of an earlier training in the same folder.
    match = pattern.fullmatch(last)
    limit = int(match[1]) if match else math.inf
    names = [numbers[number] for number in sorted(numbers, reverse=True) if number <= limit]
    if last and last not in names:
        names.insert(0, last)
    damaged: list[str] = []
    for name in names:
        path = os.path.join(folder, name)
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        raise ValueError(
            f"--resume: no checkpoint in {folder!r} is whole: {', '.join(map(repr, damaged))}; "
            "leave out --resume to begin anew"
        )
    return None, []


def is_main() -> bool:
    """Tell whether this is the first of the processes that a launcher has started."""
    ranks = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


@contextmanager
def occupy(folder: str) -> Iterator[None]:
    """Keep other trainings out of a work folder until the block, or the process, ends.

    Raises:
        OccupiedError: if another training is in it.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".training.lock"), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OccupiedError(
                f"--work-dir: another training, process {file.read().strip() or 'unknown'}, is "
                f"writing to {folder!r}; choose another folder or wait for its end"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for name in os.listdir(folder):  # left by processes that were killed while writing
            if re.search(r"\.part-\d+$", name):
                os.remove(os.path.join(folder, name))
        yield
