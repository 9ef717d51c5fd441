"""Triplet attention (Misra et al., WACV 2021, arXiv:2010.03045, section 3.3).

For x of shape (B, C, H, W) three gates look at x along one axis each and see how the other two
interact. A gate Z-pools its axis, that is stacks maximum and mean, and turns the two maps into one
by convolution, normalization and sigmoid:

    g_cw(x): pools H, map of rows C and columns W
    g_hc(x): pools W, map of rows H and columns C
    g_hw(x): pools C, map of rows H and columns W

    y = x * g(x),   g = (g_hw + g_cw + g_hc) / 3,   or (g_cw + g_hc) / 2 with ``no_spatial``.

The paper rotates a copy of x for each gate. A gate only scales x, so it is enough to lay out the
three small maps along the axes of x and to let them broadcast.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from plugin_core.kernels import has_hooks, triplet

# Checkpoints of the paper exist in two spellings. Ours is the first one, so that what is saved
# here loads there; the second one, used by the published detectors, is renamed on loading.
PUBLISHED_SPELLING = {
    "ChannelGateH.spatial.": "cw.conv.",
    "ChannelGateW.spatial.": "hc.conv.",
    "SpatialGate.spatial.": "hw.conv.",
}
_NORMS = ("BN", "SyncBN", "FrozenBN")


class TripletAttention(nn.Module):
    """Scales its input by the mean of three cross-dimension gates (paper, eq. 4).

    It belongs after the last norm of a residual branch, before the shortcut is added. It has
    ``3 * (2 * kernel_size**2 + 2)`` parameters, whatever the number of channels.

    A fresh gate is about 1/2 everywhere, so it halves the features of a network that was trained
    without it. With ``warm_start`` the output is ``x * (1 + alpha * (g - 1))`` with a learnable
    scalar ``alpha`` that starts at 0: a pretrained network is unchanged at first and lets the gates
    in as it learns. ``alpha = 1`` is the published function; a state dict with gates but without
    ``alpha`` therefore loads with ``alpha = 1``. The other way round, what was trained with
    ``warm_start`` needs it to load.

    Args:
        kernel_size: side of the gates' convolution, odd; 7 in the paper, 3 in its ablation.
        no_spatial: leave ``g_hw`` out.
        warm_start: start as the exact identity.
        norm: of the gates, "BN" as published; "SyncBN", whose statistics are those of the batches
            of all processes of a distributed training, on CPUs too; or "FrozenBN", which always
            uses the running statistics and learns no scale and shift. State dicts are the same.
            PyTorch's ``convert_sync_batchnorm`` makes any of them a plain SyncBatchNorm.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype and memory format; B may be 0.

    Raises:
        ValueError: if ``kernel_size`` is not a positive odd number, ``norm`` is unknown, or the
            input is not 4-D.
        RuntimeError: if a state dict with ``alpha`` is loaded without ``warm_start``.
    """

    def __init__(
        self,
        kernel_size: int = 7,
        no_spatial: bool = False,
        warm_start: bool = False,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        if type(kernel_size) is not int or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be a positive odd number (3 or 7 in the paper), "
                f"got {kernel_size!r}"
            )
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        self.kernel_size = kernel_size
        self.norm = norm
        self.cw = _Gate(kernel_size, norm)
        self.hc = _Gate(kernel_size, norm)
        self.hw = None if no_spatial else _Gate(kernel_size, norm)
        self.alpha = nn.Parameter(torch.zeros(())) if warm_start else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(
                f"TripletAttention takes a 4-D input (B, C, H, W), got {x.dim()}-D of shape "
                f"{tuple(x.shape)}"
            )
        passes = triplet.passes_for(x)
        if passes is not None:
            return self._forward_in_few_passes(x, passes)
        g_cw, g_hc, g_hw = self.gates(x)
        g = (g_cw + g_hc) / 2 if g_hw is None else (g_hw + g_cw + g_hc) / 3
        if self.alpha is not None:
            g = 1 + self.alpha * (g - 1)
        return x * g

    def _forward_in_few_passes(self, x: Tensor, passes: triplet.Passes) -> Tensor:
        maps, links, exchanged = triplet.z_pool(x, passes)
        modules = [gate for gate in (self.cw, self.hc, self.hw) if gate is not None]
        gates = [
            gate(pooled, passes, is_exchanged)
            for gate, pooled, is_exchanged in zip(modules, maps, exchanged, strict=False)
        ]
        weight = 1 / len(gates) if self.alpha is None else self.alpha / len(gates)
        gates = [gate * weight for gate in gates]
        if self.alpha is not None:
            gates[0] = gates[0] + (1 - self.alpha)
        if self.hw is None:
            gates.append(torch.zeros_like(maps[2][:, :1]))
        return triplet.scale(x, gates, links, passes)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """g_cw (B, C, 1, W), g_hc (B, C, H, 1) and g_hw (B, 1, H, W), None with ``no_spatial``."""
        g_cw = self.cw(_z_pool(x, 2)).transpose(1, 2)  # (B, 1, C, W) → (B, C, 1, W)
        g_hc = self.hc(_z_pool(x, 3)).permute(0, 3, 2, 1)  # (B, 1, H, C) → (B, C, H, 1)
        g_hw = None if self.hw is None else self.hw(_z_pool(x, 1))
        return g_cw, g_hc, g_hw

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, no_spatial={self.hw is None}, "
            f"warm_start={self.alpha is not None}, norm={self.norm}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for published, ours in PUBLISHED_SPELLING.items():
            for key in [k for k in state_dict if k.startswith(prefix + published)]:
                renamed = prefix + ours + key.removeprefix(prefix + published)
                state_dict[renamed] = state_dict.pop(key)
        has_gates = f"{prefix}cw.conv.conv.weight" in state_dict
        # Frameworks load what fits and log the rest: without alpha the result would be wrong.
        if self.alpha is None and f"{prefix}alpha" in state_dict:
            raise RuntimeError(
                f"{prefix}alpha: this state dict was trained with warm_start=True, and the module "
                "was built with warm_start=False; build it with warm_start=True"
            )
        if self.alpha is not None and has_gates:
            state_dict.setdefault(f"{prefix}alpha", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Gate(nn.Module):
    """Sigmoid gate of a Z-pooled map: (B, 2, rows, columns) → (B, 1, rows, columns)."""

    def __init__(self, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False),
                bn=_GateNorm(norm),
            )
        )

    def forward(
        self,
        pooled: Tensor,
        passes: triplet.Passes | None = None,
        is_exchanged: bool = False,
    ) -> Tensor:
        conv, bn = self.conv
        if passes is None or not self._is_as_built(conv):
            normalized = self.conv(pooled.mT if is_exchanged else pooled)
            normalized = normalized.mT if is_exchanged else normalized
        else:
            # Rows and columns exchanged in both are so in the result.
            weight = conv.get_parameter("weight")
            normalized = triplet.correlate(pooled, weight.mT if is_exchanged else weight, passes)
            normalized = bn(normalized.to(weight.dtype))
        # Back from autocast's precision, while the map is small.
        return torch.sigmoid(normalized).to(pooled.dtype)

    def _is_as_built(self, conv: nn.Module) -> bool:
        """Whether nothing was fused into the convolution, hooked to it or put in its place."""
        is_ours = type(conv) is nn.Conv2d and conv.bias is None
        return is_ours and not (has_hooks(conv) or has_hooks(self.conv))


class _GateNorm(nn.BatchNorm2d):
    """BatchNorm2d of one channel that falls back to its running statistics where a batch has none.

    One channel makes this real: for one image of 1×1 features the map of ``g_hw`` is one value,
    which ``BatchNorm2d`` refuses in training, and an empty batch would make the statistics NaN.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None

    def __init__(self, norm: str) -> None:
        super().__init__(1, eps=1e-5, momentum=0.01)
        self.norm = norm
        if norm == "FrozenBN":
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.norm == "SyncBN" and _processes() > 1:
            return self._normalize_over_processes(x)
        if self.training and (self.norm == "FrozenBN" or x.numel() <= 1):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)

    def _normalize_over_processes(self, x: Tensor) -> Tensor:
        """Batch normalization with the joined statistics of all processes' x.

        PyTorch's own SyncBatchNorm refuses tensors on the CPU.
        """
        from torch.distributed.nn.functional import all_reduce  # not in every build of PyTorch

        # In float64, which makes the mean of squares safe to subtract from; the maps are small.
        wide = x.double()
        sums = torch.stack((wide.sum(), wide.square().sum(), wide.new_tensor(x.numel())))
        total, squares, count = all_reduce(sums)
        few = count <= 1
        mean = torch.where(few, self.running_mean.double(), total / count.clamp(min=1))
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
        variance = torch.where(few, self.running_var.double(), variance)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = torch.where(few, variance, variance * count / (count - 1).clamp(min=1))
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        normalized = (wide - mean) * torch.rsqrt(variance + self.eps)
        return (normalized * self.weight + self.bias).to(x.dtype)


def _processes() -> int:
    """How many processes train together."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def _z_pool(x: Tensor, dim: int) -> Tensor:
    """Maximum and mean of x (B, C, H, W) along ``dim``, as channels, the rest in order.

    ``dim`` 2 gives (B, 2, C, W), 3 gives (B, 2, H, C) and 1 gives (B, 2, H, W).
    """
    # max and not amax: of several equal maxima one takes the whole gradient, as in the paper's code
    pooled = torch.stack((x.max(dim).values, x.mean(dim)), dim=1)
    return pooled.transpose(2, 3) if dim == 3 else pooled
