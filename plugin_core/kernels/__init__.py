"""Fast paths of the methods, where the machine and the input allow them.

The methods' own files hold the formulas in plain PyTorch, which work everywhere. What is here
computes the same functions in fewer passes over memory: compiled C on a CPU, Triton on a CUDA GPU.
The environment variable ``PLUGIN_KERNELS`` chooses:

- ``auto`` (the default): a fast path wherever there is one for the input;
- ``plain``: never;
- ``fast``: as ``auto``, but what is missing for it on this machine is an error that says why.

It is read at every call. Traced, exported and compiled models always hold the plain formulas, which
``torch.compile`` fuses by itself.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

CHOICES = ("auto", "plain", "fast")
VARIABLE = "PLUGIN_KERNELS"


def choice() -> str:
    """What ``PLUGIN_KERNELS`` says.

    Raises:
        ValueError: if it is none of :data:`CHOICES`.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise ValueError(
            f"the environment variable {VARIABLE} must be one of {', '.join(CHOICES)}, "
            f"got {value!r}"
        )
    return value


def is_plain_tensor(x: Tensor) -> bool:
    """Whether x has memory of its own that a kernel may read, and nothing records what is done."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and not torch.jit.is_tracing()
        and not torch.jit.is_scripting()
        and not _is_compiling()
        # Counters of FLOPs, fake tensors and make_fx see PyTorch's operators only.
        and _get_current_dispatch_mode() is None
        and not _has_transforms()
    )


def _is_compiling() -> bool:
    compiler = getattr(torch, "compiler", None)
    return bool(compiler is not None and compiler.is_compiling())


def _has_transforms() -> bool:
    # torch.func's, under which a tensor stands for several
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active is not None and active())
