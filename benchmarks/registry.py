#!/usr/bin/env python
"""Time and memory of one block of every block plugin, with a warm start, side by side.

`benchmarks/registry.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

import itertools
from functools import partial
from importlib.util import find_spec

import blocks
import timing
import torch
from blocks import Shape
from timing import Quantity, Row, Setting

from plugin_core import build_block_plugin, registered_block_plugins

TITLE = "Block plugins"
TEXT = """\
One block of each plugin on x (B, C, H, W), with a warm start. The ratio is to a copy of x into new
memory, which is the least that a block can do."""
MINUTES = 0.6
SHAPES = [(2, 512, 100, 152)]
QUICK_SHAPES = [(1, 16, 12, 10)]
TIMM = ("timm:se", "timm:eca", "timm:cbam", "timm:gc")


def rows(setting: Setting) -> list[Row]:
    names = [*registered_block_plugins(), *(TIMM if find_spec("timm") else ())]
    names = names[-2:] if setting.quick else names
    measured = []
    for shape in QUICK_SHAPES if setting.quick else SHAPES:
        for dtype, what, name in itertools.product(setting.dtypes, blocks.PASSES, names):
            case = f"{name}, {blocks.text(shape)} {timing.name_of(dtype)}, {what}"
            measured += timing.attempt("", case, partial(block, name, shape, dtype, what, setting))
    return measured


def block(
    name: str, shape: Shape, dtype: torch.dtype, what: str, setting: Setting
) -> dict[str, Quantity]:
    given = blocks.input_and_gradient(shape, setting, dtype)
    module = build_block_plugin(name, shape[1], True).to(setting.device, dtype)
    step = blocks.candidate(module.train(what != "forward"), what)
    times = blocks.measure({"block": step}, given, setting)
    values = timing.in_milliseconds(times)
    values["block / clone"] = timing.ratio(times["block"], times["clone"])
    if what != "forward":
        values["extra memory, %"] = Quantity(blocks.share_of_input(step, given, setting))
    return values


if __name__ == "__main__":
    import run

    run.main(only="registry")
