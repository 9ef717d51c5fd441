"""Starts tools by a fork of a process that has imported the frameworks, which takes seconds.

A tool that is started so is a process of its own, as ``python tools/<tool> …`` is: it has its own
arguments, output, exit code and signals, and nothing that another one did.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import traceback
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
# What the tools import; where a framework is not installed, its tools find that out themselves.
MODULES = (
    *("d2_plugins.trainer", "d2_plugins.preflight", "d2_plugins.command_line"),
    *("detectron2.model_zoo", "detectron2.engine"),
    *("torch.utils.cpp_extension", "torch.utils.tensorboard", "distutils.core"),
    *(
        "mm_plugins.command_line",
        "mm_plugins.datasets",
        "mmdet.engine",
        "mmdet.evaluation",
        "mmdet.visualization",
    ),
)


def script_and_arguments(tool: str, arguments: tuple[object, ...]) -> list[str]:
    return [str(ROOT / "tools" / tool), *map(str, arguments)]


class ToolServer:
    """The server's process, which begins with the first question and ends with its input."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    @cached_property
    def process(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def wait(self) -> None:
        """Wait until the frameworks are imported."""
        self.ask({})

    def start(
        self,
        words: list[str],
        stdout: Path,
        stderr: Path,
        folder: Path | None = None,
        **environment: object,
    ) -> ForkedTool:
        """Start a script with its arguments, in a session of its own, from a folder."""
        variables = {name: str(value) for name, value in environment.items()}
        places = {"stdout": stdout, "stderr": stderr, "folder": folder or self.folder}
        question = {name: str(path) for name, path in places.items()}
        return ForkedTool(self, self.ask({"words": words, "environment": variables, **question}))

    def stop(self) -> None:
        if "process" in vars(self):
            self.process.communicate(timeout=60)


class ForkedTool:
    """A tool's process, as a ``subprocess.Popen``."""

    def __init__(self, server: ToolServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.ask({"pid": self.pid})
        return self.returncode

    def wait(self, _timeout: float | None = None) -> int | None:
        """Give the exit code of a tool that has ended."""
        return self.poll()


def serve() -> dict[str, Any] | None:
    """Answer questions; in a fork, give what to start."""
    for line in sys.stdin:
        question = json.loads(line)
        if "words" in question:
            answer = os.fork()
            if not answer:
                return question
        elif "pid" in question:
            pid, status = os.waitpid(question["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = None
        print(json.dumps(answer), flush=True)
    return None


def become(tool: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(tool.get("folder", "."))
    files = ((os.devnull, os.O_RDONLY), *((tool[n], os.O_WRONLY) for n in ("stdout", "stderr")))
    for descriptor, (path, flags) in enumerate(files):
        os.dup2(os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
    os.environ.update(tool.get("environment", {}))
    sys.argv = tool["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)


def leave(code: int) -> NoReturn:
    """End this process without taking the frameworks apart, which takes a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.disable()  # until all is imported, which leaves little behind
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("quick_frameworks").read_once()
    with contextlib.suppress(ImportError, ValueError):  # no config of this name
        paths = importlib.import_module("mmengine.config.utils")
        paths._get_cfg_metainfo(str(Path(importlib.import_module("mmdet").__file__).parent), "")
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        if finalizer.peek()[1].__module__ == "torch.library":
            finalizer.atexit = False  # a fork's end takes 0.03 s for 178 libraries of operators
    gc.freeze()  # a fork's collections leave alone, and so share, what is imported
    gc.enable()
    wanted = serve()
    if wanted is not None:
        become(wanted)
    leave(0)
