"""Run a function in two processes that train together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

# Import them once for all processes of a test session, where they are installed.
PRELOADED = [
    *("torch.nn.parallel.distributed", "torch._dynamo"),
    *("mmdet.models", "mmdet.datasets", "mmdet.engine", "mmdet.evaluation", "mm_plugins"),
]


def run(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``function(rank)``, of a module's top level, returns in each of two processes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    arguments = (function, str(folder))
    torch.multiprocessing.start_processes(_run, arguments, nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in (0, 1)]


def _run(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pth")
    distributed.destroy_process_group()
