#!/usr/bin/env python
"""Time and memory of one BatchFormer, beside PyTorch's encoder layer over the same tokens.

`benchmarks/batchformer.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import blocks
import timing
import torch
from blocks import Pair, Shape
from timing import Quantity, Row, Setting
from torch import nn

from plugin_core import BatchFormer

TITLE = "BatchFormer"
TEXT = """\
One BatchFormer on tokens (B, L, C), with 4 heads and without dropout, beside PyTorch's
`nn.TransformerEncoderLayer` that gets them as L sequences of B tokens, with the same weights. Extra
memory is the peak beyond the tokens, the output and the gradients, in percent of the tokens."""
MINUTES = 0.5
# The positions of a Deformable DETR's levels for images of 800×1333 pixels, on a CPU of 400×667
SHAPES = {"cpu": [(4, 5577, 256)], "cuda": [(8, 22223, 256)]}
QUICK_SHAPES = [(2, 12, 8)]
OURS, ENCODER = "BatchFormer", "TransformerEncoderLayer"


class Encoder(nn.TransformerEncoderLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def rows(setting: Setting) -> list[Row]:
    measured = []
    for dtype in setting.dtypes:
        for shape in QUICK_SHAPES if setting.quick else SHAPES[setting.device.type]:
            for what in blocks.PASSES:
                case = f"{blocks.text(shape)} {timing.name_of(dtype)}, {what}"
                measure = partial(block, shape, dtype, what, setting)
                measured += timing.attempt("", case, measure)
    return measured


def candidates(
    channels: int, dtype: torch.dtype, what: str, setting: Setting
) -> dict[str, Callable[[Pair], Any]]:
    ours = BatchFormer(channels, dropout=0.0)
    encoder = Encoder(channels, 4, channels, dropout=0.0, batch_first=True)
    blocks.prepare({ENCODER: encoder, OURS: ours}, setting, dtype, what)
    return {OURS: blocks.candidate(ours, what), ENCODER: blocks.candidate(encoder, what)}


def block(shape: Shape, dtype: torch.dtype, what: str, setting: Setting) -> dict[str, Quantity]:
    given = blocks.input_and_gradient(shape, setting, dtype)
    steps = candidates(shape[2], dtype, what, setting)
    return blocks.beside(steps, given, what, setting, (OURS, ENCODER))


if __name__ == "__main__":
    import run

    run.main(only="batchformer")
