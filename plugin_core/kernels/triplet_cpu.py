"""Triplet attention's passes on a CPU, by triplet_attention.c."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from plugin_core.kernels.library import library, pointer, pointers
from plugin_core.kernels.triplet_torch import wide_of

# Columns that a convolution handles at once, LANES in the C code.
_LANES = 16
# The least planes in a part of an image. Each part costs a map of its own.
_PLANES_OF_A_PART = 16

_SUFFIXES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "p", "q", "r", "parts")]


class CpuPasses:
    """The passes of :mod:`plugin_core.kernels.triplet_operators` on tensors (B, P, Q, R)."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        self._functions = functions

    @staticmethod
    def of(x: Tensor) -> CpuPasses | None:
        """Make the passes for x (B, C, H, W), or None."""
        if x.device.type != "cpu" or x.dtype not in _SUFFIXES:
            return None
        functions = library()
        return None if functions is None else CpuPasses(functions)

    def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
        shape, (b, p, q, r) = _shape(x), x.shape
        sizes = ((b, 2, p, q), (b, 2, p, r), (shape.parts, b, 2, q, r))
        maps = [x.new_empty(size, dtype=wide_of(x)) for size in sizes]
        at: list[Tensor] = []
        if indices:
            at = [x.new_empty(m.shape[:-3] + m.shape[-2:], dtype=torch.int32) for m in maps]
        self._call("pool", x, pointer(x), shape, pointers(maps), pointers(at or [None] * 3))
        maps[2], at[2:] = _join(maps[2], at[2:])
        return maps, at

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        self._call("scale", x, pointer(x), pointer(y), _shape(x), pointers(gates))

    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        shape, (b, p, q, r) = _shape(x), x.shape
        sizes = ((b, p, q), (b, p, r), (shape.parts, b, q, r))
        sums = [x.new_empty(size, dtype=wide_of(x)) for size in sizes]
        self._call("product", x, pointer(g), pointer(x), shape, pointers(sums))
        sums[2] = sums[2].sum(0) if shape.parts > 1 else sums[2][0]
        return sums

    def input_gradient(
        self, g: Tensor, gates: list[Tensor], pooled: list[Tensor], indices: list[Tensor]
    ) -> Tensor:
        gx = torch.empty_like(g)
        arrays = (pointers(gates), pointers(pooled), pointers(indices))
        self._call("grad", g, pointer(g), pointer(gx), _shape(g), *arrays)
        return gx

    def correlate(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve x (B, I, H, W) with weight (O, I, k, k), k odd, to (B, O, H, W)."""
        if x.shape[2] > x.shape[3]:  # Long rows fill whole vectors.
            return self.correlate(x.mT, weight.mT).mT.contiguous()
        (b, inputs, rows, columns), outputs, k = x.shape, weight.shape[0], weight.shape[2]
        padded, weight = _pad(x, k), weight.contiguous()
        out = x.new_empty((b, outputs, rows, columns))
        sizes = (b, inputs, outputs, rows, columns, padded.shape[3], k)
        self._call("correlate", x, *map(pointer, (padded, weight, out)), *_integers(sizes))
        return out

    def correlate_weight_gradient(self, g: Tensor, x: Tensor, k: int) -> Tensor:
        """Give the gradient of the weight (1, I, k, k) for the gradient g (B, 1, H, W)."""
        if x.shape[2] > x.shape[3]:
            return self.correlate_weight_gradient(g.mT, x.mT, k).mT.contiguous()
        padded = _pad(x, k)
        g = F.pad(g, (0, -g.shape[3] % _LANES)).contiguous()
        tasks = torch.get_num_threads()
        sums = x.new_zeros((tasks, x.shape[1], k, k, _LANES))
        sizes = (*x.shape[:3], g.shape[3], padded.shape[3], k, tasks)
        self._call("correlate_weights", x, *map(pointer, (padded, g, sums)), *_integers(sizes))
        return sums.sum((0, 4)).unsqueeze(0)

    def _call(self, name: str, x: Tensor, *arguments: object) -> None:
        function = getattr(self._functions, f"{name}_{_SUFFIXES[x.dtype]}")
        function(*arguments, ctypes.c_int(torch.get_num_threads()))


def _shape(x: Tensor) -> _Shape:
    """Choose the sizes, and a number of parts of P that keeps all threads equally busy."""
    batch, p = x.shape[:2]
    threads = torch.get_num_threads()
    parts = -(-threads // batch)
    if batch * parts % threads:
        parts *= 2
    return _Shape(*x.shape, min(parts, max(1, p // _PLANES_OF_A_PART)))


def _join(maps: Tensor, indices: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Join the maps of the parts."""
    if len(maps) == 1:
        return maps[0], [i[0] for i in indices]
    # Of equal maxima the first counts, as within a part.
    maximum, part = maps[:, :, 0].max(0)
    joined = torch.stack((maximum, maps[:, :, 1].sum(0)), 1)
    return joined, [i.gather(0, part.unsqueeze(0))[0] for i in indices]


def _pad(x: Tensor, k: int) -> Tensor:
    """Pad each map with zeros, on the right up to whole vectors."""
    half = k // 2
    return F.pad(x, (half, half + -x.shape[3] % _LANES, half, half)).contiguous()


def _integers(values: tuple[int, ...]) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
