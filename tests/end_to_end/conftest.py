"""Runs the commands that a user types."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_server import ROOT, ToolServer, script_and_arguments

# On the CPU also where there is a GPU, whose kernels add up in an order that varies: the tests
# compare weights bit by bit.
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    # What the tests add to a tool, and the packages of this checkout
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
}
LIMIT_SECONDS = 600
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def tool_server() -> Iterator[ToolServer]:
    server = ToolServer(ROOT, ENVIRONMENT)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def run_tool(tool_server: ToolServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs ``python tools/<tool> arguments…`` and gives what it printed; fails if it fails.

    The tool is forked from a process with the frameworks imported. With ``anew`` it is started as
    a user does it. Several ``processes`` have the environment variables that torchrun sets; what
    the first one printed is given, or what the first one that failed did. It runs from the folder
    ``cwd``.
    """

    def run_forks(words: list[str], processes: int, cwd: Path) -> list[subprocess.CompletedProcess]:
        started = []
        port = free_port() if processes > 1 else 0
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            outputs = [tmp_path_factory.mktemp("printed") / n for n in ("stdout", "stderr")]
            environment = group if processes > 1 else {}
            started.append((tool_server.start(words, *outputs, cwd, **environment), outputs))
        limit = time.monotonic() + LIMIT_SECONDS
        while None in (codes := [process.poll() for process, _ in started]):
            if any(codes) or time.monotonic() > limit:  # the others would wait for the failed one
                for process in (p for p, _ in started if p.returncode is None):
                    os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        return [
            subprocess.CompletedProcess(words, process.poll(), *(p.read_text() for p in outputs))
            for process, outputs in started
        ]

    def run(
        tool: str,
        *arguments: object,
        check: bool = True,
        anew: bool = False,
        processes: int = 1,
        cwd: Path = ROOT,
    ) -> subprocess.CompletedProcess:
        words = script_and_arguments(tool, arguments)
        if anew:
            result = subprocess.run(
                [sys.executable, *words],
                capture_output=True,
                text=True,
                cwd=cwd,
                env=ENVIRONMENT,
                timeout=LIMIT_SECONDS,
            )
        else:
            results = run_forks(words, processes, cwd)
            # A signal's code is negative; that of a process which failed by itself comes first.
            result = max(results, key=lambda r: (r.returncode != 0, r.returncode))
        if check and result.returncode:
            pytest.fail(f"{tool} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def kill_tool_when(tool_server: ToolServer) -> Callable[..., None]:
    """Runs a tool and kills it, all its processes at once, when a file has been written."""

    def run(file: Path, tool: str, *arguments: object) -> None:
        log = file.parent.parent / "killed.log"
        process = tool_server.start(script_and_arguments(tool, arguments), log, log)
        limit = time.monotonic() + LIMIT_SECONDS
        while not has_content(file) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        if process.poll() is not None:
            pytest.fail(f"{tool} ended before it wrote {file.name}:\n{log.read_text()[-3000:]}")
        os.killpg(process.pid, signal.SIGKILL)
        while process.poll() is None:
            time.sleep(0.02)

    return run


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


@pytest.fixture(scope="session")
def photographs(coco_sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six train and four val images of the sample, with all labels and classes."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "annotations").mkdir()
    for split, count in (("train2017", 6), ("val2017", 4)):
        (folder / split).symlink_to(coco_sample / split)
        for labels in ("instances", "person_keypoints"):
            name = f"annotations/{labels}_{split}.json"
            content = json.loads((coco_sample / name).read_text())
            content["images"] = content["images"][:count]
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def broken_photographs(photographs: Path, tmp_path: Path) -> Path:
    """The same with train images that do not decode."""
    broken = tmp_path / "broken"
    (broken / "train2017").mkdir(parents=True)
    for name in ("annotations", "val2017"):
        (broken / name).symlink_to(photographs / name)
    for image in (photographs / "train2017").iterdir():
        (broken / "train2017" / image.name).write_bytes(b"no JPEG")
    return broken


@pytest.fixture
def earlier_run(tmp_path: Path) -> Path:
    """An output folder with something in it that must stay as it is."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "earlier.txt").write_text("kept")
    return folder


@pytest.fixture
def assert_refused(earlier_run: Path) -> Callable[[Any, list[str]], None]:
    """Asserts that a tool ended with an error that has some texts, and wrote nothing."""

    def check(result: subprocess.CompletedProcess, expected: list[str]) -> None:
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        error = result.stderr[result.stderr.index("error: ") :]
        assert [text for text in expected if text not in error] == [], error
        assert [file.name for file in earlier_run.iterdir()] == ["earlier.txt"]
        assert (earlier_run / "earlier.txt").read_text() == "kept"

    return check


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[dict, dict], None]:
    def check(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert not different

    return check
