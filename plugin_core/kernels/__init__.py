"""Fast paths of the methods, and operators with second derivatives.

The methods' own files hold the formulas in plain PyTorch. A fast path computes the same function in
fewer passes over memory. Triplet attention has one, made of operators that PyTorch's dispatcher
knows, and each operator has several backends: compiled C on a CPU, Triton on a CUDA GPU, and
PyTorch's operators everywhere. ``PLUGIN_KERNELS``, or :func:`set_kernels`, chooses at every call:

- ``auto`` (the default): compiled C where it applies; Triton where it was measured to be right and
  faster on this GPU; otherwise PyTorch's operators;
- ``plain``: PyTorch's operators;
- ``fast``: compiled C and Triton. An error says what this machine lacks.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from plugin_core.errors import check_one_of

CHOICES = ("auto", "plain", "fast")
VARIABLE = "PLUGIN_KERNELS"


def set_kernels(kernels: str) -> None:
    """Choose the kernels of this process and of those that it starts, as ``PLUGIN_KERNELS`` does.

    Args:
        kernels: one of :data:`CHOICES`.

    Raises:
        ArgumentError: if it is none of them.
    """
    check_one_of("kernels", kernels, CHOICES)
    os.environ[VARIABLE] = kernels


def choice() -> str:
    """Read ``PLUGIN_KERNELS``.

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


def is_compiling() -> bool:
    """Tell whether ``torch.compile`` or ``torch.export`` traces this call."""
    known = getattr(torch.compiler, "is_compiling", None)  # since PyTorch 2.3
    return bool(torch._dynamo.is_compiling() if known is None else known())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of the module runs hooks, which may also change its parameters."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
