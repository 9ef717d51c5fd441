"""Triplet attention (Misra et al., WACV 2021, arXiv:2010.03045, section 3.3).

For x of shape (B, C, H, W) three gates look at x along one axis each and see how the other two
interact. A gate Z-pools its axis, that is stacks maximum and mean, and turns the two maps into one
by convolution, normalization and sigmoid::

    g_cw(x): pools H, map of rows C and columns W
    g_hc(x): pools W, map of rows H and columns C
    g_hw(x): pools C, map of rows H and columns W

    y = x * g(x),   g = (g_hw + g_cw + g_hc) / 3,   or (g_cw + g_hc) / 2 with ``no_spatial``.

The paper rotates a copy of x for each gate. A gate only scales x, so it is enough to lay out the
three small maps along the axes of x and to let them broadcast.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from plugin_core.block_plugins import register_block_plugin, rename_published
from plugin_core.errors import ArgumentError, check_bool, check_one_of
from plugin_core.kernels import has_hooks, triplet, triplet_operators

_NORMS = ("BN", "SyncBN", "FrozenBN")
_INITS = ("kaiming_zero_spatial", "kaiming", "pytorch")


@register_block_plugin("triplet_attention")
class TripletAttention(nn.Module):
    """Scales its input by the mean of three cross-dimension gates (paper, eq. 4).

    It belongs after the last norm of a residual branch, before the shortcut is added. It has
    ``3 * (2 * kernel_size**2 + 2)`` parameters, whatever the number of channels.

    A fresh gate is 1/2 in the mean, so it halves the features of a network that was trained
    without it. A pretrained one needs the warm start of :class:`plugin_core.BlockPlugin`, which
    makes the output x * (1 + alpha * (g - 1)).

    Args:
        channels: C, which every block plugin is built from; triplet attention needs none.
        kernel_size: side of the gates' convolution, odd; 7 in the paper, 3 in its ablation.
        no_spatial: leave ``g_hw`` out.
        norm: of the gates, "BN" as published; "SyncBN", whose statistics are those of the batches
            of all processes of a distributed training, on CPUs too; or "FrozenBN", which always
            uses the running statistics and learns no scale and shift. State dicts are the same.
            PyTorch's ``convert_sync_batchnorm`` makes any of them a plain SyncBatchNorm.
        init: of the gates. "kaiming_zero_spatial" is that of the published ResNet classifiers: the
            convolutions' weights are normal of mean 0 and standard deviation sqrt(2) /
            ``kernel_size`` (Kaiming, fan-out), the norms' scales 1, but 0 in ``g_hw``, which so
            starts as 1/2 everywhere (with "FrozenBN", which would keep it there, 1). "kaiming", of
            the published MobileNetV2 and Detectron2 backbones, has scales of 1 in all. "pytorch"
            leaves what PyTorch draws: weights uniform in ±1 / (sqrt(2) * ``kernel_size``), scales
            1. A warm start takes this one unless another is given.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype and memory format; B may be 0.

    Raises:
        ArgumentError: if ``kernel_size`` is not a positive odd number, or ``norm`` or ``init`` is
            unknown.
        ValueError: if the input is not 4-D.
    """

    # Trainings with a warm start, which nothing published has, keep the weights of their seed.
    warm_start_arguments: Mapping[str, Any] = MappingProxyType({"init": "pytorch"})
    # What the authors' blocks called their child before.
    published_children: tuple[str, ...] = ("pcam", "triplet")
    # Checkpoints of the paper exist in two spellings. Ours is the first one, so that a checkpoint
    # saved here loads there. The second one, of the published detectors, is renamed on loading.
    published_names: Mapping[str, str] = MappingProxyType(
        {
            "ChannelGateH.spatial.": "cw.conv.",
            "ChannelGateW.spatial.": "hc.conv.",
            "SpatialGate.spatial.": "hw.conv.",
        }
    )

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 7,
        no_spatial: bool = False,
        norm: str = "BN",
        init: str = "kaiming_zero_spatial",
    ) -> None:
        super().__init__()
        if type(kernel_size) is not int or kernel_size < 1 or kernel_size % 2 == 0:
            raise ArgumentError(
                "kernel_size",
                f"must be a positive odd number (3 or 7 in the paper), got {kernel_size!r}",
            )
        check_bool(no_spatial=no_spatial)
        check_one_of("norm", norm, _NORMS)
        check_one_of("init", init, _INITS)
        self.kernel_size = kernel_size
        self.norm = norm
        self.cw = _Gate(kernel_size, norm)
        self.hc = _Gate(kernel_size, norm)
        self.hw = None if no_spatial else _Gate(kernel_size, norm)
        if init != "pytorch":
            for gate in (self.cw, self.hc, self.hw):
                if gate is not None:
                    nn.init.kaiming_normal_(gate.get_parameter("conv.conv.weight"), mode="fan_out")
        if init == "kaiming_zero_spatial" and self.hw is not None and norm != "FrozenBN":
            nn.init.zeros_(self.hw.get_parameter("conv.bn.weight"))

    def forward(self, x: Tensor, warm_start: Tensor | None = None) -> Tensor:
        """Scale x by the gates' mean g, or with a scalar alpha by 1 + alpha * (g - 1)."""
        if x.dim() != 4:
            raise ValueError(
                f"TripletAttention takes a 4-D input (B, C, H, W), got {x.dim()}-D of shape "
                f"{tuple(x.shape)}"
            )
        if triplet.is_offered():
            return self._forward_in_few_passes(x, warm_start)
        g_cw, g_hc, g_hw = self.gates(x)
        g = (g_cw + g_hc) / 2 if g_hw is None else (g_hw + g_cw + g_hc) / 3
        if warm_start is not None:
            g = 1 + warm_start * (g - 1)
        return x * g

    def _forward_in_few_passes(self, x: Tensor, alpha: Tensor | None) -> Tensor:
        maps, links = triplet.z_pool(x)
        modules = [gate for gate in (self.cw, self.hc, self.hw) if gate is not None]
        gates = [
            gate(pooled, in_few_passes=True) for gate, pooled in zip(modules, maps, strict=False)
        ]
        if self.hw is None:
            gates.append(torch.zeros_like(maps[2][:, :1]))
        one = gates[0].new_ones(())
        alpha = one if alpha is None else alpha
        return triplet.scale(x, gates, links, alpha / len(modules), one - alpha)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """g_cw (B, C, 1, W), g_hc (B, C, H, 1) and g_hw (B, 1, H, W), None with ``no_spatial``."""
        g_cw = self.cw(_z_pool(x, 2)).transpose(1, 2)  # (B, 1, C, W) → (B, C, 1, W)
        g_hc = self.hc(_z_pool(x, 3)).permute(0, 3, 2, 1)  # (B, 1, H, C) → (B, C, H, 1)
        g_hw = None if self.hw is None else self.hw(_z_pool(x, 1))
        return g_cw, g_hc, g_hw

    @staticmethod
    def arguments_in(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments that a state dict tells."""
        return {
            "kernel_size": state_dict["cw.conv.conv.weight"].shape[-1],
            "no_spatial": "hw.conv.conv.weight" not in state_dict,
        }

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The gates over x, (B, H, W) each; g_cw and g_hc are the mean over the channels."""
        g_cw, g_hc, g_hw = self.gates(x)
        maps = {"gate hw": g_hw[:, 0]} if g_hw is not None else {}
        for name, gate in (("gate cw, mean over C", g_cw), ("gate hc, mean over C", g_hc)):
            maps[name] = gate.mean(1).expand(len(x), *x.shape[2:])
        return maps

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, no_spatial={self.hw is None}, norm={self.norm}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        rename_published(state_dict, prefix, self.published_names)
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

    def forward(self, pooled: Tensor, in_few_passes: bool = False) -> Tensor:
        conv: Any = self.conv.conv
        bn: Any = self.conv.bn
        if not (in_few_passes and self._is_as_built(conv)):
            # Back from autocast's precision, while the map is small.
            return torch.sigmoid(self.conv(pooled)).to(pooled.dtype)
        weight, is_exchanged = conv.weight, triplet_operators.is_exchanged(pooled)
        if is_exchanged:  # rows and columns exchanged in both are so in the result
            pooled, weight = pooled.mT, weight.mT
        normalized = bn(triplet.correlate(pooled, weight).to(weight.dtype))
        gate = torch.sigmoid(normalized).to(pooled.dtype)
        return gate.mT if is_exchanged else gate

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
