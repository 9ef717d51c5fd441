"""Kills a training at random moments, resumes it each time, and compares how it ends."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tool_server import ForkedTool, ToolServer

KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("KILL_SEED", "0"))
LIMIT_SECONDS = 300


def check_survival(
    server: ToolServer,
    folder: Path,
    command: Callable[[Path, bool], list[str]],
    weights: Callable[[Path], dict[str, torch.Tensor]],
) -> str:
    """Check that a killed and resumed training ends with the weights of an undisturbed one.

    Args:
        server: starts the trainings.
        folder: for their output.
        command: the words that start a training with an output folder, resuming or not. The
            training ends within seconds and writes several checkpoints.
        weights: reads the last weights in an output folder.

    Returns:
        The figures, in a line.
    """
    whole, killed = folder / "undisturbed", folder / "killed"
    logs = {path: folder / f"{path.name}.log" for path in (whole, killed)}

    def start(output: Path, resume: bool = False) -> ForkedTool:
        return server.start(command(output, resume), logs[output], logs[output])

    def finish(process: ForkedTool, output: Path) -> None:
        assert ends_within(process, LIMIT_SECONDS), f"{output} takes too long"
        assert process.poll() == 0, logs[output].read_text()[-3000:]

    server.wait()
    began = time.monotonic()
    finish(start(whole), whole)
    length = time.monotonic() - began
    expected = weights(whole)
    moments, trainings, kills, resumed, parts, left = random.Random(SEED), 0, 0, 0, 0, 0
    while kills < KILLS or not trainings:
        checkpoints = len(list(killed.glob("*.pth")))
        resumed += bool(checkpoints)
        process = start(killed, resume=killed.exists())
        if kills < KILLS and not ends_within(process, moments.uniform(0.1, 0.95) * length):
            os.killpg(process.pid, signal.SIGKILL)
            assert ends_within(process, 60)
            kills += 1
            left += len(list(killed.glob("*.pth"))) > checkpoints
            parts += bool(list(killed.glob("*.part-*")))
            continue
        finish(process, killed)
        found = weights(killed)
        assert found.keys() == expected.keys()
        assert not [name for name in found if not torch.equal(found[name], expected[name])]
        assert not list(killed.glob("*.part-*"))
        trainings += 1
        if kills < KILLS:  # begin another
            for file in [*killed.glob("*.pth"), killed / "last_checkpoint"]:
                file.unlink()
    return (
        f"{kills} kills in {trainings} trainings of {length:.1f} s (seed {SEED}): after {left} "
        f"there were new checkpoints, {parts} hit a checkpoint while it was written, {resumed} "
        "starts found checkpoints; all trainings ended with the weights of the undisturbed one"
    )


def ends_within(process: ForkedTool, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return process.poll() is not None
