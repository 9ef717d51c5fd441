"""Fast paths of the methods, where the machine and the input allow them.

The methods' own files hold the formulas in plain PyTorch, which work everywhere. What is here
computes the same functions in fewer passes over memory: compiled C on a CPU, Triton on a CUDA GPU.
The environment variable ``PLUGIN_KERNELS`` chooses:

- ``auto`` (the default): the compiled C wherever it applies;
- ``plain``: never;
- ``fast``: Triton as well, which no GPU has run yet, and what is missing for either on this machine
  is an error that says why.

It is read at every call. Traced, exported and compiled models always hold the plain formulas, which
``torch.compile`` fuses by itself.
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
        type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not torch.jit.is_tracing()
        and not _is_compiling()
        # Counters of FLOPs, fake tensors and make_fx see PyTorch's operators only.
        and _get_current_dispatch_mode() is None
        and not _has_transforms()
        and getattr(forward_ad, "_current_level", -1) < 0  # no dual numbers
        and _has_storage(x)
    )


def _has_storage(x: Tensor) -> bool:
    try:
        x.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a batch of gradients, of torch.autograd's vmap
        return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether something has to see the module called, or changes its parameters when it is."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_autocast_on_cpu() -> bool:
    """Whether autocast is on for what runs on a CPU."""
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before PyTorch 2.4
        return torch.is_autocast_cpu_enabled()


def _is_compiling() -> bool:
    is_compiling = getattr(torch.compiler, "is_compiling", None)  # since PyTorch 2.3
    if is_compiling is None:
        return bool(torch._dynamo.is_compiling())
    return bool(is_compiling())


def _has_transforms() -> bool:
    # torch.func's, under which a tensor stands for several
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active is not None and active())
