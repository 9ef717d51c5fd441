"""Triplet attention's passes on a CUDA GPU, by Triton.

No GPU has run these kernels yet. They were compiled for GPUs and run by Triton's interpreter. Notes
on speed are estimates from the compiled code, and nothing was tuned. So each GPU measures before it
uses them (:mod:`plugin_core.kernels.triplet_choice`).

``scale``, ``product`` and ``input_gradient`` read and write every tensor once. A program takes a
block of rows and columns of (Q, R) through some consecutive planes of P, so that its part of the
map QR stays in registers. Sums over several programs are small partial maps, which a second stage
adds up. Without atomics the same input always gives the same bits.

``pool`` reads x twice, once for PQ and PR and once for QR. With a single read, the threads of a row
would have to agree on maximum, index and sum in every block instead of once in a row. Compiled,
this takes half as many instructions again as both reads.

Features of a detector have a new size in every batch. Therefore no kernel is specialized on sizes,
all sizes share the blocks, and a kernel is compiled once for a dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plugin_core.kernels.triplet_choice import chosen, on
from plugin_core.kernels.triplet_torch import TorchPasses, wide_of

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs or for Windows comes without it
    triton = None

# With 64 columns half of a row's sum stays within a thread, and less is exchanged between threads.
# Larger blocks would be less full.
_BLOCK = {"BLOCK_Q": 32, "BLOCK_R": 64, "num_warps": 8}
# Its threads reduce a row block by block.
_BLOCK_OF_ROWS = {"BLOCK_Q": 32, "BLOCK_R": 32, "num_warps": 4}
_BLOCK_OF_PLANES = {"BLOCK": 1024, "num_warps": 4}
_BLOCK_OF_JOINED = {"BLOCK": 256, "num_warps": 4}
# Without a limit the input's gradient takes so many registers that a multiprocessor holds a single
# program. Numbers of 64 bits need more.
_FEWER_REGISTERS = {"maxnreg": 80}
# Programs that fit a multiprocessor at once, by their registers.
_AT_ONCE, _PLANES_AT_ONCE = 3, 8
# The least planes in a part. Each part costs a map of its own.
_PLANES_OF_A_PART = 8
# The least share of elements in the blocks. With 7×7 features blocks would be nearly idle.
_LEAST_FILLED = 1 / 8
# Offsets within a part have 32 bits.
_LARGEST_PART = 2**30

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CudaPasses(TorchPasses):
    """The passes of :mod:`plugin_core.kernels.triplet_operators` on tensors (B, P, Q, R).

    Args:
        processors: number of the GPU's multiprocessors.
    """

    def __init__(self, processors: int) -> None:
        self._processors = processors

    @staticmethod
    def of(x: Tensor) -> CudaPasses | None:
        """Make the passes for x (B, P, Q, R), or None where PyTorch's operators are faster.

        Raises:
            RuntimeError: if they do not work and ``PLUGIN_KERNELS=fast`` asks for them.
        """
        if x.device.type != "cuda" or x.dtype not in _DTYPES or not _fills_blocks(x):
            return None
        made: CudaPasses | None = chosen(x.device, x.dtype, lambda: _made(x.device, x.dtype))
        return made

    def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
        b, p, q, r = x.shape
        row_blocks = -(-q // _BLOCK_OF_ROWS["BLOCK_Q"])
        blocks = b * -(-q * r // _BLOCK_OF_PLANES["BLOCK"])
        planes, parts = self._parts(x, blocks, _PLANES_AT_ONCE)

        def empty(channels: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [
                x.new_empty(size, dtype=dtype)
                for size in (
                    (b, *channels, p, q),
                    (b, *channels, p, r),
                    (b, *channels, q, r),
                    (*channels, row_blocks, b, p, r),
                    (*channels, parts, b, q, r),
                )
            ]

        pq, pr, qr, partial_pr, partial_qr = empty((2,), wide_of(x))
        at = empty((), torch.int32) if indices else []
        without: list[Any] = [None] * 5
        pq_at, pr_at, qr_at, partial_pr_at, partial_qr_at = at or without
        with on(x.device):
            _pool_rows[(b * p * row_blocks,)](
                x, pq, partial_pr, pq_at, partial_pr_at, *x.shape, **_BLOCK_OF_ROWS
            )
            _pool_planes[(blocks * parts,)](
                x, partial_qr, partial_qr_at, *x.shape, planes, **_BLOCK_OF_PLANES
            )
            largest = b * max(p, q) * r
            _join[(-(-largest // _BLOCK_OF_JOINED["BLOCK"]), 2)](
                partial_pr, partial_qr, partial_pr_at, partial_qr_at, pr, qr, pr_at, qr_at,
                *x.shape, row_blocks, parts, **_BLOCK_OF_JOINED,
            )  # fmt: skip
        return [pq, pr, qr], at[:3]

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        blocks, planes, parts = self._tiles(x)
        with on(x.device):
            _scale[(blocks * parts,)](x, y, *gates, *x.shape, planes, **_BLOCK)

    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        b, p, q, r = x.shape
        blocks, planes, parts = self._tiles(x)
        row_blocks, column_blocks = -(-q // _BLOCK["BLOCK_Q"]), -(-r // _BLOCK["BLOCK_R"])
        sizes = ((column_blocks, b, p, q), (row_blocks, b, p, r), (parts, b, q, r))
        sums = [x.new_empty(size, dtype=wide_of(x)) for size in sizes]
        with on(x.device):
            _product[(blocks * parts,)](g, x, *sums, *x.shape, planes, **_BLOCK)
        return [s.sum(0) if len(s) > 1 else s[0] for s in sums]

    def input_gradient(
        self, g: Tensor, gates: list[Tensor], pooled: list[Tensor], indices: list[Tensor]
    ) -> Tensor:
        gx = torch.empty_like(g)
        blocks, planes, parts = self._tiles(g)
        options = _BLOCK if g.dtype is torch.float64 else _BLOCK | _FEWER_REGISTERS
        with on(g.device):
            _input_gradient[(blocks * parts,)](
                g, gx, *gates, *pooled, *indices, *g.shape, planes, **options
            )
        return gx

    def _tiles(self, x: Tensor) -> tuple[int, int, int]:
        """Choose the number of blocks, of planes in a part, and of parts."""
        b, _, q, r = x.shape
        blocks = b * -(-q // _BLOCK["BLOCK_Q"]) * -(-r // _BLOCK["BLOCK_R"])
        return blocks, *self._parts(x, blocks, _AT_ONCE)

    def _parts(self, x: Tensor, blocks: int, at_once: int) -> tuple[int, int]:
        """Choose the number of planes in a part and of parts of P to occupy the whole GPU."""
        _, p, q, r = x.shape
        at_once *= self._processors
        # Take the fewest well filled rounds of programs: a round with few lasts as long.
        for rounds in range(1, 5):
            parts = rounds * at_once // blocks
            if parts * blocks >= 0.8 * rounds * at_once:
                break
        planes = max(_PLANES_OF_A_PART, -(-p // max(1, parts)))
        planes = max(1, min(planes, p, _LARGEST_PART // (q * r)))
        return planes, -(-p // planes)


# ------------------------------------------------------------------------------------------ kernels
# Pointers are to contiguous tensors; maps come as PQ, PR, QR. Sizes have 32 bits, multiples of the
# batch 64.


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile once for the dtypes of the arguments, whatever their sizes and alignment."""
    if triton is None:
        return function
    arguments = [name for name in inspect.signature(function).parameters if not name.isupper()]
    return triton.jit(do_not_specialize=arguments)(function)


@_kernel
def _tile(
    p: tl.tensor, q: tl.tensor, r: tl.tensor, planes: tl.tensor,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
) -> Any:  # fmt: skip
    """Find this program's image (64 bits), first plane, number of planes, first row and column."""
    program = tl.program_id(0)
    column_blocks, row_blocks = tl.cdiv(r, BLOCK_R), tl.cdiv(q, BLOCK_Q)
    column = program % column_blocks * BLOCK_R
    row = program // column_blocks % row_blocks * BLOCK_Q
    part = program // column_blocks // row_blocks % tl.cdiv(p, planes)
    image = program // column_blocks // row_blocks // tl.cdiv(p, planes)
    first = part * planes
    return image.to(tl.int64), first, tl.minimum(planes, p - first), row, column


@_kernel
def _block(r: tl.tensor, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr) -> Any:
    """Find a block's rows and columns, and the offsets of its elements from its first one.

    A block has the axes (rows, columns / 32, 32). The warps share the rows. A thread holds several
    columns of a row, which leaves less to exchange between threads.
    """
    rows = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_R // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return rows, columns, rows[:, None, None] * r + columns[None, :, :]


@_kernel
def _found(here: tl.tensor, positions: tl.tensor) -> Any:
    # Nothing is found among NaN only. Then the index is cut to the last position; any will do.
    return tl.where(here, positions, 2147483647)


@_kernel
def _pool_rows(
    x: tl.tensor, pq: tl.tensor, pr: tl.tensor, pq_at: tl.tensor, pr_at: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Write PQ (batch, 2, P, Q), maximum and mean, and PR (2, row blocks, batch, P, R), and sum."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(q, BLOCK_Q)
    row = program % row_blocks * BLOCK_Q
    own = (program // row_blocks).to(tl.int64)  # plane of the batch
    rows, columns, offsets = _block(r, BLOCK_Q, BLOCK_R)
    in_rows = rows < q - row
    x += (own * q + row) * r
    map_rows = batch.to(tl.int64) * p
    pr += (row // BLOCK_Q * map_rows + own) * r
    pr_sum = pr + row_blocks * map_rows * r
    if pr_at is not None:
        pr_at += (row // BLOCK_Q * map_rows + own) * r

    wide = pq.dtype.element_ty
    nothing = float("-inf")
    maximum_of_pq = tl.full(offsets.shape, nothing, wide)
    sum_of_pq = tl.zeros(offsets.shape, wide)
    index_of_pq = tl.zeros(offsets.shape, tl.int32)
    for column in range(0, r, BLOCK_R):
        in_columns = columns < r - column
        inside = in_rows[:, None, None] & in_columns[None, :, :]
        value = tl.load(x + (offsets + column), inside, 0.0).to(wide)
        only_inside = tl.where(inside, value, nothing)
        sum_of_pq += value
        if pq_at is not None:
            index_of_pq = tl.where(only_inside > maximum_of_pq, column, index_of_pq)
        maximum_of_pq = tl.maximum(maximum_of_pq, only_inside)
        maximum = tl.max(only_inside, 0)
        tl.store(pr + (column + columns), maximum, in_columns)
        tl.store(pr_sum + (column + columns), tl.sum(value, 0), in_columns)
        if pr_at is not None:
            here = inside & (only_inside == maximum[None, :, :])
            index = tl.min(_found(here, row + rows[:, None, None]), 0)
            tl.store(pr_at + (column + columns), index, in_columns)

    to = (own + own // p * p) * q + row  # an image has two maps
    maximum = tl.max(tl.max(maximum_of_pq, 1), 1)
    tl.store(pq + to + rows, maximum, in_rows)
    pq_mean = pq + p.to(tl.int64) * q + to
    tl.store(pq_mean + rows, tl.sum(tl.sum(sum_of_pq, 1), 1) / r, in_rows)
    if pq_at is not None:
        here = maximum_of_pq == maximum[:, None, None]
        index = tl.min(tl.min(_found(here, index_of_pq + columns[None, :, :]), 1), 1)
        tl.store(pq_at + (own * q + row) + rows, tl.minimum(index, r - 1), in_rows)


@_kernel
def _pool_planes(
    x: tl.tensor, qr: tl.tensor, qr_at: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor, planes: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write QR (2, parts, batch, Q, R), maximum and sum."""
    program = tl.program_id(0)
    size = q * r
    blocks, parts = tl.cdiv(size, BLOCK), tl.cdiv(p, planes)
    start = program % blocks * BLOCK
    part = program // blocks % parts
    image = (program // blocks // parts).to(tl.int64)
    first = part * planes
    offsets = tl.arange(0, BLOCK)
    inside = offsets < size - start
    x += (image * p + first) * size + start
    wide = qr.dtype.element_ty
    maximum = tl.full((BLOCK,), float("-inf"), wide)
    added = tl.zeros((BLOCK,), wide)
    index = tl.zeros((BLOCK,), tl.int32)
    for plane in range(tl.minimum(planes, p - first)):
        value = tl.load(x + offsets, inside, 0.0).to(wide)
        x += size
        added += value
        if qr_at is not None:
            index = tl.where(value > maximum, plane, index)
        maximum = tl.maximum(maximum, value)
    batch = batch.to(tl.int64)
    to = (part * batch + image) * size + start
    tl.store(qr + to + offsets, maximum, inside)
    tl.store(qr + parts * batch * size + to + offsets, added, inside)
    if qr_at is not None:
        tl.store(qr_at + to + offsets, first + index, inside)


@_kernel
def _join(
    partial_pr: tl.tensor, partial_qr: tl.tensor,
    partial_pr_at: tl.tensor, partial_qr_at: tl.tensor,
    pr: tl.tensor, qr: tl.tensor, pr_at: tl.tensor, qr_at: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor,
    parts_of_pr: tl.tensor, parts_of_qr: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write PR and QR (batch, 2, rows, columns), maximum and mean, and their indices."""
    batch = batch.to(tl.int64)
    if tl.program_id(1) == 0:
        _join_map(partial_pr, partial_pr_at, pr, pr_at, parts_of_pr, batch, p, r, q, BLOCK)
    else:
        _join_map(partial_qr, partial_qr_at, qr, qr_at, parts_of_qr, batch, q, r, p, BLOCK)


@_kernel
def _join_map(
    partial: tl.tensor, partial_at: tl.tensor, joined: tl.tensor, joined_at: tl.tensor,
    parts: tl.tensor, batch: tl.tensor, rows: tl.tensor, columns: tl.tensor, length: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    size = rows.to(tl.int64) * columns
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < batch * size
    partial_sum = partial + parts * batch * size
    maximum = tl.load(partial + position, inside, 0.0)
    added = tl.load(partial_sum + position, inside, 0.0)
    index = tl.zeros((BLOCK,), tl.int32)
    if joined_at is not None:
        index = tl.load(partial_at + position, inside, 0)
    for part in range(1, parts):
        here = part * batch * size + position
        other = tl.load(partial + here, inside, 0.0)
        added += tl.load(partial_sum + here, inside, 0.0)
        if joined_at is not None:
            # Parts come in order, so the first of equal maxima stays.
            index = tl.where(other > maximum, tl.load(partial_at + here, inside, 0), index)
        maximum = tl.maximum(maximum, other)
    to = position + position // size * size
    tl.store(joined + to, maximum, inside)
    tl.store(joined + to + size, added / length, inside)
    if joined_at is not None:
        tl.store(joined_at + position, tl.minimum(index, length - 1), inside)


@_kernel
def _scale(
    x: tl.tensor, y: tl.tensor, pq: tl.tensor, pr: tl.tensor, qr: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor, planes: tl.tensor,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Write x times the sum of three maps."""
    image, first, own_planes, row, column = _tile(p, q, r, planes, BLOCK_Q, BLOCK_R)
    rows, columns, offsets = _block(r, BLOCK_Q, BLOCK_R)
    in_rows, in_columns = rows < q - row, columns < r - column
    inside = in_rows[:, None, None] & in_columns[None, :, :]
    own = image * p + first
    start = (own * q + row) * r + column
    x += start
    y += start
    pq += own * q + row
    pr += own * r + column
    gate_of_block = tl.load(qr + (image * q + row) * r + column + offsets, inside, 0.0)
    for plane in range(own_planes):
        gate_of_rows = tl.load(pq + (plane * q + rows), in_rows, 0.0)
        gate_of_columns = tl.load(pr + (plane * r + columns), in_columns, 0.0)
        gate = gate_of_block + gate_of_rows[:, None, None] + gate_of_columns[None, :, :]
        here = offsets + plane * (q * r)
        value = tl.load(x + here, inside, 0.0).to(gate.dtype) * gate
        tl.store(y + here, value.to(y.dtype.element_ty), inside)


@_kernel
def _product(
    g: tl.tensor, x: tl.tensor, pq: tl.tensor, pr: tl.tensor, qr: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor, planes: tl.tensor,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Write partial maps (parts, batch, rows, columns), sums of g x over each axis."""
    image, first, own_planes, row, column = _tile(p, q, r, planes, BLOCK_Q, BLOCK_R)
    rows, columns, offsets = _block(r, BLOCK_Q, BLOCK_R)
    in_rows, in_columns = rows < q - row, columns < r - column
    inside = in_rows[:, None, None] & in_columns[None, :, :]
    batch = batch.to(tl.int64)
    start = ((image * p + first) * q + row) * r + column
    g += start
    x += start
    pq += ((column // BLOCK_R * batch + image) * p + first) * q + row
    pr += ((row // BLOCK_Q * batch + image) * p + first) * r + column
    qr += ((first // planes * batch + image) * q + row) * r + column
    wide = pq.dtype.element_ty
    sum_of_qr = tl.zeros(offsets.shape, wide)
    for plane in range(own_planes):
        here = offsets + plane * (q * r)
        value = tl.load(g + here, inside, 0.0).to(wide) * tl.load(x + here, inside, 0.0).to(wide)
        sum_of_qr += value
        tl.store(pq + (plane * q + rows), tl.sum(tl.sum(value, 1), 1), in_rows)
        tl.store(pr + (plane * r + columns), tl.sum(value, 0), in_columns)
    tl.store(qr + offsets, sum_of_qr, inside)


@_kernel
def _input_gradient(
    g: tl.tensor, gx: tl.tensor, pq_gate: tl.tensor, pr_gate: tl.tensor, qr_gate: tl.tensor,
    pq: tl.tensor, pr: tl.tensor, qr: tl.tensor,
    pq_at: tl.tensor, pr_at: tl.tensor, qr_at: tl.tensor,
    batch: tl.tensor, p: tl.tensor, q: tl.tensor, r: tl.tensor, planes: tl.tensor,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
) -> None:  # fmt: skip
    """Write g times the sum of the gates, plus the gradient that goes through the pooled maps."""
    image, first, own_planes, row, column = _tile(p, q, r, planes, BLOCK_Q, BLOCK_R)
    rows, columns, offsets = _block(r, BLOCK_Q, BLOCK_R)
    in_rows, in_columns = rows < q - row, columns < r - column
    inside = in_rows[:, None, None] & in_columns[None, :, :]
    own = image * p + first
    start = (own * q + row) * r + column
    g += start
    gx += start
    pq_gate += own * q + row
    pq_at += own * q + row
    pr_gate += own * r + column
    pr_at += own * r + column
    own += image * p  # an image has a map of maxima and one of means
    pq += own * q + row
    pq_mean = pq + p.to(tl.int64) * q
    pr += own * r + column
    pr_mean = pr + p.to(tl.int64) * r

    wide = pq.dtype.element_ty
    share_p, share_q, share_r = 1.0 / p.to(wide), 1.0 / q.to(wide), 1.0 / r.to(wide)
    size = q.to(tl.int64) * r  # of a map QR
    block = row.to(tl.int64) * r + column
    gate_of_block = tl.load(qr_gate + (image * size + block) + offsets, inside, 0.0)
    index_of_block = tl.load(qr_at + (image * size + block) + offsets, inside, 0) - first
    maximum_of_block = tl.load(qr + (image * 2 * size + block) + offsets, inside, 0.0)
    mean_of_block = tl.load(qr + (image * 2 * size + size + block) + offsets, inside, 0.0) * share_p
    for plane in range(own_planes):
        in_pq, in_pr = plane * q + rows, plane * r + columns
        gate_of_rows = tl.load(pq_gate + in_pq, in_rows, 0.0)
        index_of_rows = tl.load(pq_at + in_pq, in_rows, 0) - column
        maximum_of_rows = tl.load(pq + in_pq, in_rows, 0.0)
        mean_of_rows = tl.load(pq_mean + in_pq, in_rows, 0.0) * share_r
        gate_of_columns = tl.load(pr_gate + in_pr, in_columns, 0.0)
        index_of_columns = tl.load(pr_at + in_pr, in_columns, 0) - row
        maximum_of_columns = tl.load(pr + in_pr, in_columns, 0.0)
        mean_of_columns = tl.load(pr_mean + in_pr, in_columns, 0.0) * share_q

        here = offsets + plane * (q * r)
        value = tl.load(g + here, inside, 0.0).to(gate_of_block.dtype)
        value *= gate_of_block + gate_of_rows[:, None, None] + gate_of_columns[None, :, :]
        value += mean_of_block + mean_of_rows[:, None, None] + mean_of_columns[None, :, :]
        value += tl.where(index_of_block == plane, maximum_of_block, 0.0)
        at_maximum = index_of_rows[:, None, None] == columns[None, :, :]
        value += tl.where(at_maximum, maximum_of_rows[:, None, None], 0.0)
        at_maximum = index_of_columns[None, :, :] == rows[:, None, None]
        value += tl.where(at_maximum, maximum_of_columns[None, :, :], 0.0)
        tl.store(gx + here, value.to(gx.dtype.element_ty), inside)


# ------------------------------------------------------------------------------- whether they work


def _fills_blocks(x: Tensor) -> bool:
    """Tell whether blocks suit x (B, P, Q, R): neither tiny nor huge."""
    q, r = x.shape[2:]
    in_blocks = (q + -q % _BLOCK["BLOCK_Q"]) * (r + -r % _BLOCK["BLOCK_R"])
    return q * r <= _LARGEST_PART and q * r >= _LEAST_FILLED * in_blocks


def _made(device: torch.device, dtype: torch.dtype) -> CudaPasses | str:
    """Make the passes for a GPU, or give the reason why there are none."""
    if triton is None:
        return "Triton, which compiles the kernels, is not installed"
    properties = torch.cuda.get_device_properties(device)
    needed = (8, 0) if dtype is torch.bfloat16 else (7, 0)
    if (properties.major, properties.minor) < needed:
        return (
            f"{properties.name} has the compute capability {properties.major}.{properties.minor}, "
            f"and the kernels for {dtype} need {needed[0]}.{needed[1]}"
        )
    return CudaPasses(properties.multi_processor_count)
