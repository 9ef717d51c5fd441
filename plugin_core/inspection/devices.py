"""What a model runs on: the device's name, and the memory that it takes there."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import profile


def device_name(device: torch.device) -> str:
    """Name a GPU, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def nbytes(*tensors: Tensor) -> int:
    """Add up the sizes of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_extra_bytes(
    step: Callable[[], Sequence[Tensor]], device: torch.device, *, warm_up: bool = True
) -> int:
    """Measure the peak of memory that ``step`` allocates, beyond the tensors that it returns.

    Memory allocated before does not count. On a CPU, only memory of PyTorch's allocator is seen. A
    convolution's scratch memory in oneDNN, for example, is not.

    Args:
        step: to measure.
        device: that it runs on.
        warm_up: whether to run it once before; caches, workspaces and compiled kernels stay.
    """
    if warm_up:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = step()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before - nbytes(*results))
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it calls a missing GPU an error
    with profile(use_kineto=True, profile_memory=True) as trace:
        results = step()
    # PyTorch's table of events, and exporting them, would take five times as long.
    events = trace.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return max(0, peak - nbytes(*results))
