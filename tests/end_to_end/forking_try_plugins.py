"""tools/try_plugins.py that imports once what it needs: trainings are forks of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tool_server import ROOT, become

sys.path.insert(0, str(ROOT / "tools"))

import try_plugins

from plugin_core.training.trials import LocalLauncher


class Fork:
    """A forked process, as far as a launcher uses a ``subprocess.Popen``."""

    def __init__(self, words: Sequence[str], log: str) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            for name in [n for n in DatasetCatalog.list() if n.startswith("tried_")]:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
            become({"words": list(words), "stdout": log, "stderr": log})

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class ForkingLauncher(LocalLauncher):
    def start(self, command: Sequence[str], log: Path, place: int) -> Any:
        return Fork(command[1:], str(log))

    def stop(self, processes: Sequence[Any]) -> None:
        for process in processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    try_plugins.LocalLauncher = ForkingLauncher
    try_plugins.main()
