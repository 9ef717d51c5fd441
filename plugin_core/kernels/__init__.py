"""Fast paths of the methods, and operators with second derivatives.

The methods' own files hold the formulas in plain PyTorch, which runs everywhere. A fast path
computes the same function in fewer passes over memory: compiled C on a CPU, Triton on a CUDA GPU.
Triplet attention has one. The environment variable ``PLUGIN_KERNELS`` chooses at every call:

- ``auto`` (the default): compiled C where it applies, otherwise plain PyTorch;
- ``plain``: plain PyTorch;
- ``fast``: Triton as well, which no GPU has run yet. An error says what this machine lacks.

Traced, exported and compiled models hold the plain formulas. ``torch.compile`` fuses them itself.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

CHOICES = ("auto", "plain", "fast")
VARIABLE = "PLUGIN_KERNELS"


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


def is_plain_tensor(x: Tensor) -> bool:
    """Tell whether a kernel may read x from memory, and nothing records or transforms operators."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not torch.jit.is_tracing()
        and not _is_compiling()
        # FLOP counters, fake tensors and make_fx see PyTorch's operators only.
        and _get_current_dispatch_mode() is None
        and not _has_transforms()
        and getattr(forward_ad, "_current_level", -1) < 0  # no dual numbers
        and _has_storage(x)
    )


def _has_storage(x: Tensor) -> bool:
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):  # torch.autograd's vmap over gradients
        return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of the module runs hooks, which may also change its parameters."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _is_compiling() -> bool:
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # since PyTorch 2.3
    if is_compiling is None:
        return bool(torch._dynamo.is_compiling())
    return bool(is_compiling())


def _has_transforms() -> bool:
    # Under torch.func a tensor stands for several.
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active is not None and active())
