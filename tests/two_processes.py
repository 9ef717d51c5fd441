"""Run a function in two processes that train together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def run(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``function(rank)``, of a module's top level, returns in each of two processes."""
    # A fork has imported the frameworks. PyTorch takes no gradients in one beside a GPU.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(
        _run, (function, str(folder)), nprocs=2, start_method=method
    )
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in (0, 1)]


def _run(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    group = f"file://{folder}/group"
    distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pth")
    distributed.destroy_process_group()
