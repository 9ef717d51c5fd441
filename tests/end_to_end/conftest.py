"""Runs the commands that a user types."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
# On the CPU also where there is a GPU, whose kernels add up in an order that varies: the tests
# compare weights bit by bit.
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(Path(__file__).parent),  # of what the tests add to a tool
}
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def run_tool() -> Run:
    """Runs ``python tools/<tool> arguments…`` and gives what it printed; fails if it fails.

    With ``processes`` it is torchrun that starts the tool.
    """

    def run(
        tool: str, *arguments: object, check: bool = True, processes: int = 0
    ) -> subprocess.CompletedProcess:
        line = command(tool, arguments)
        if processes:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            line = [sys.executable, *torchrun, str(processes), *line[1:]]
        result = subprocess.run(
            line,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
            timeout=600,
        )
        if check and result.returncode:
            pytest.fail(f"{tool} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
        return result

    return run


@pytest.fixture(scope="session")
def kill_tool_when() -> Callable[..., None]:
    """Runs a tool and kills it, all its processes at once, when a file has been written."""

    def run(file: Path, tool: str, *arguments: object) -> None:
        # A file and not a pipe takes the output: nobody reads it while the tool is running.
        with open(file.parent.parent / "killed.log", "w+") as log:
            process = subprocess.Popen(
                command(tool, arguments),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=ENVIRONMENT,
                start_new_session=True,
            )
            limit = time.monotonic() + 600
            while not has_content(file) and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.05)
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"{tool} ended before it wrote {file.name}:\n{log.read()[-3000:]}")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return run


def has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def command(tool: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]


@pytest.fixture
def broken_sample(coco_sample: Path, tmp_path: Path) -> Path:
    """The sample with train images that do not decode."""
    broken = tmp_path / "broken"
    (broken / "val2017").mkdir(parents=True)
    (broken / "train2017").mkdir()
    (broken / "annotations").symlink_to(coco_sample / "annotations")
    for image in (coco_sample / "train2017").iterdir():
        (broken / "train2017" / image.name).write_bytes(b"no JPEG")
    return broken


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[dict, dict], None]:
    def check(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
        assert first.keys() == second.keys()
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert not different

    return check
