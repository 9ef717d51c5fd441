#!/usr/bin/env python
"""Time and memory of one IDA block, as in the stages of a ResNet, beside the textbook's.

`benchmarks/ida.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import blocks
import timing
import torch
from blocks import Shape
from textbook import TextbookIDABlock
from timing import Quantity, Row, Setting

from plugin_core import IDABlock

TITLE = "IDA in a stage"
TEXT = """\
One block on x (B, C, H, W), with 80 queries and 16 heads. "Textbook" does every step at every
position, the scale of each channel too. Extra memory is the peak beyond x, the output and the
gradients, in percent of x."""
MINUTES = 0.7
SHAPES = [(2, 1024, 50, 76), (2, 2048, 25, 38)]
QUICK_SHAPES = [(1, 16, 12, 10)]
OURS, TEXTBOOK = "IDABlock", "textbook"


def rows(setting: Setting) -> list[Row]:
    shapes = QUICK_SHAPES if setting.quick else SHAPES
    measured = []
    for shape, layout, dtype, what, case in blocks.cases(shapes, setting):
        measure = partial(block, shape, layout, dtype, what, setting)
        measured += timing.attempt("", case, measure)
    shape, what = shapes[0], "forward + backward"
    for dtype in setting.dtypes:
        measure = partial(
            blocks.compare_in_changing_sizes,
            partial(candidates, shape[1], setting, dtype, what),
            blocks.changing(shape, (2, 3), setting, dtype),
            setting,
            (TEXTBOOK, OURS),
        )
        case = f"up to {blocks.text(shape)} {timing.name_of(dtype)}, {what}"
        measured += timing.attempt(blocks.CHANGING, case, measure)
    return measured


def candidates(
    channels: int, setting: Setting, dtype: torch.dtype, what: str
) -> dict[str, Callable[..., Any]]:
    ours = IDABlock(channels)
    modules = {OURS: ours, TEXTBOOK: TextbookIDABlock(channels)}
    blocks.prepare(modules, setting, dtype, what)
    return {name: blocks.candidate(module, what) for name, module in modules.items()}


def block(
    shape: Shape, layout: str, dtype: torch.dtype, what: str, setting: Setting
) -> dict[str, Quantity]:
    given = blocks.input_and_gradient(shape, setting, dtype, layout)
    steps = candidates(shape[1], setting, dtype, what)
    return blocks.beside(steps, given, what, setting, (TEXTBOOK, OURS))


if __name__ == "__main__":
    import run

    run.main(only="ida")
