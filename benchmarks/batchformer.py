#!/usr/bin/env python
"""BatchFormer, one layer: time beside PyTorch's transformer layer over the batch.

`benchmarks/batchformer.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import blocks
import timing
import torch
from blocks import Shape
from timing import Quantity, Row, Setting, at_least
from torch import nn

from plugin_core import BatchFormer
from plugin_core.kernels import choice
from plugin_core.kernels.batchformer_cpu import layer_function

TITLE = "BatchFormer"
TEXT = """\
Forward + backward of one layer on x (B, L, C), B images of L positions, 4 heads, dropout 0.5.
PyTorch's `nn.TransformerEncoderLayer` takes the same x as L sequences of B tokens, as the authors
use it. At 800x1066 pixels a DETR has 850 positions, and the four levels of a Deformable DETR have
17821."""
MINUTES = 2
CHANNELS, HEADS, DROPOUT = 256, 4, 0.5
BATCHES, LENGTHS = (2, 4, 8), (850, 17821)
OURS, PYTORCH = "BatchFormer", "nn.TransformerEncoderLayer"
SPEEDUP = {"cpu": 1.5, "cuda": 2.0}
WHAT = "forward + backward"


def rows(setting: Setting) -> list[Row]:
    channels = 16 if setting.quick else CHANNELS
    batches, lengths = ((2,), (6,)) if setting.quick else (BATCHES, LENGTHS)
    measured = missing_fast_paths(channels, setting)
    for dtype, length, batch in itertools.product(setting.dtypes, lengths, batches):
        shape = (batch, length, channels)
        case = f"{blocks.text(shape)} {timing.name_of(dtype)}, {WHAT}"
        measured += timing.attempt("", case, partial(layer, shape, dtype, setting))
    shape = (batches[0], 6 if setting.quick else 5 * lengths[0], channels)
    for dtype in setting.dtypes:
        measure = partial(
            blocks.compare_in_changing_sizes,
            partial(candidates, channels, dtype, setting),
            blocks.changing(shape, (1,), setting, dtype),
            setting,
            (PYTORCH, OURS),
        )
        case = f"up to {blocks.text(shape)} {timing.name_of(dtype)}, {WHAT}"
        measured += timing.attempt(blocks.CHANGING, case, measure)
    return measured


def missing_fast_paths(channels: int, setting: Setting) -> list[Row]:
    """Where PyTorch's operators are timed for want of others, it must be said."""
    found = []
    for dtype in setting.dtypes:
        x = torch.empty((2, 1, channels), device=setting.device, dtype=dtype)
        layer = BatchFormer(channels, HEADS).to(setting.device, dtype).layers[0]
        if layer_function(layer, x) is None:
            case = f"fast path in {timing.name_of(dtype)}"
            reason = f"there is none on {setting.device} with PLUGIN_KERNELS={choice()}"
            print(f"  {case}: {reason}")
            found.append(Row(case, not_measured=f"{reason}, so {OURS} is the plain one"))
    return found


def candidates(
    channels: int, dtype: torch.dtype, setting: Setting
) -> dict[str, Callable[..., Any]]:
    """Both with the same weights, in training."""
    pytorch = nn.TransformerEncoderLayer(channels, HEADS, channels, DROPOUT)
    ours = BatchFormer(channels, HEADS, dropout=DROPOUT)
    ours.load_state_dict(pytorch.state_dict())
    return {
        name: blocks.forward_and_backward(module.to(setting.device, dtype).train())
        for name, module in ((OURS, ours), (PYTORCH, pytorch))
    }


def layer(shape: Shape, dtype: torch.dtype, setting: Setting) -> dict[str, Quantity]:
    given = blocks.input_and_gradient(shape, setting, dtype)
    steps = candidates(shape[2], dtype, setting)
    times = timing.interleaved(steps, lambda _: given, setting)
    values = timing.in_milliseconds(times)
    target = at_least(SPEEDUP[setting.device.type])
    values[f"{PYTORCH} / {OURS}"] = timing.ratio(times[PYTORCH], times[OURS], target)
    return values


if __name__ == "__main__":
    import run

    run.main(only="batchformer")
