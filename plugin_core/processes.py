"""Where trainings and evaluations run: processes of this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Process(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Give its exit status; None while it runs."""


class Launcher(Protocol):
    """Starts commands somewhere."""

    def start(self, command: Sequence[str], log: Path, place: int) -> Process:
        """Start a command that adds what it prints to a log; ``place`` counts those that run."""

    def stop(self, processes: Sequence[Any]) -> None:
        """End what it has started and still runs."""


class LocalLauncher:
    """Processes of this machine. None outlives this process, however this one ends.

    Args:
        gpus: names of GPUs, of which each place has one in turn.
        alone: whether a process may use all cores; otherwise it has one thread.
    """

    def __init__(self, gpus: Sequence[str] = (), *, alone: bool = False) -> None:
        self.gpus, self.threads = gpus, {} if alone else one_thread()

    def start(self, command: Sequence[str], log: Path, place: int) -> subprocess.Popen[bytes]:
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[place % len(self.gpus)]} if self.gpus else {}
        with open(log, "ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.threads, **gpu},
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def stop(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def one_thread() -> dict[str, str]:
    """Variables that give a process one thread, unless the user has chosen."""
    return {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join(text.strip().splitlines()[-lines:])
