#!/usr/bin/env python
"""Time and memory of one triplet attention, beside the textbook's and a copy of its input.

`benchmarks/triplet_attention.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import blocks
import timing
import torch
from blocks import Pair, Shape
from textbook import TextbookTripletAttention
from timing import Quantity, Row, Setting, at_least, at_most
from torch.utils.benchmark import Measurement

from plugin_core import TripletAttention
from plugin_core.inspection import devices
from plugin_core.kernels import choice, triplet_operators
from plugin_core.kernels.triplet_torch import TorchPasses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Triplet attention"
TEXT = """\
One block on x (B, C, H, W). "Textbook" rotates x for two of three gates and copies it each time, as
the paper describes it; "plain" are the same passes by PyTorch's operators, as with
`PLUGIN_KERNELS=plain`. A copy of x (`copy_`) reads and writes it once; `clone` has to get memory
for it from the system first, as every operator does whose output is large. The floor is what the
block cannot do without, at the speed of a copy. The forward reads x twice, since a gate sees a
whole axis before it scales, and writes the output: 1.5 copies, and new memory once. The backward
reads the gradient and x for the gates, both again for the gradient of x, and writes that: with the
forward 4 copies, and new memory twice. GB/s count the same bytes. Extra memory is the peak beyond
x, the output and the gradients, in percent of x. It is bounded by the small maps, of which one set
is 1/C + 1/H + 1/W of x, 7% at 2048x25x38: the convolutions' gradients need maximum and mean, the
norms their input and the sigmoids their output, and all have gradients."""
MINUTES = 3.5
SHAPES = [
    (16, 2048, 7, 7),
    (2, 256, 200, 304),
    (2, 512, 100, 152),
    (2, 1024, 50, 76),
    (2, 2048, 25, 38),
]
QUICK_SHAPES = [(1, 8, 12, 10)]
OURS, PLAIN, TEXTBOOK = "TripletAttention", "plain", "textbook"
# Least number of passes over memory
NEEDED = {"forward": 3, "forward + backward": 8}
SPEEDUP = {
    ("cpu", "forward"): 5.0,
    ("cpu", "forward + backward"): 4.0,
    ("cuda", "forward"): 4.0,
    ("cuda", "forward + backward"): 5.0,
}


def rows(setting: Setting) -> list[Row]:
    measured = missing_fast_paths(setting)
    for shape, layout, dtype, what, case in blocks.cases(shapes(setting), setting):
        measure = partial(block, shape, layout, dtype, what, setting)
        measured += timing.attempt("", case, measure)
    measured += changing_sizes(setting)
    return measured + growth(setting)


def shapes(setting: Setting) -> list[Shape]:
    return QUICK_SHAPES if setting.quick else SHAPES


def missing_fast_paths(setting: Setting) -> list[Row]:
    """List the dtypes without a fast path, for which PyTorch's operators are timed."""
    found = []
    for dtype in setting.dtypes:
        x = torch.empty(shapes(setting)[-1], device=setting.device, dtype=dtype)
        if type(triplet_operators.backend(x)) is TorchPasses:
            case = f"fast path in {timing.name_of(dtype)}"
            reason = f"there is none on {setting.device} with PLUGIN_KERNELS={choice()}"
            print(f"  {case}: {reason}")
            found.append(Row(case, not_measured=f"{reason}, so {OURS} is by PyTorch's operators"))
    return found


def candidates(setting: Setting, dtype: torch.dtype, what: str) -> dict[str, Callable[..., Any]]:
    modules = {OURS: TripletAttention(), TEXTBOOK: TextbookTripletAttention()}
    blocks.prepare(modules, setting, dtype, what)
    steps = {name: blocks.candidate(module, what) for name, module in modules.items()}
    return {**steps, PLAIN: timing.with_kernels("plain", steps[OURS])}


def block(
    shape: Shape, layout: str, dtype: torch.dtype, what: str, setting: Setting
) -> dict[str, Quantity]:
    given = blocks.input_and_gradient(shape, setting, dtype, layout)
    steps = candidates(setting, dtype, what)
    times = blocks.measure(steps, given, setting)
    size = devices.nbytes(given[0])
    values = timing.in_milliseconds(times)
    target = at_least(SPEEDUP[setting.device.type, what])
    values["textbook / TripletAttention"] = timing.ratio(times[TEXTBOOK], times[OURS], target)
    values["plain / TripletAttention"] = timing.ratio(times[PLAIN], times[OURS])
    values["TripletAttention / floor"] = timing.ratio(
        times[OURS],
        floor(times["copy_"], times["clone"], what),
        at_most(1.5) if setting.on_gpu else None,
    )
    bytes_needed = NEEDED[what] * size
    values["TripletAttention, GB/s"] = timing.gigabytes_per_second(times[OURS], bytes_needed)
    values["copy_, GB/s"] = timing.gigabytes_per_second(times["copy_"], 2 * size)
    if what != "forward":
        for name, limit in ((OURS, at_most(5.0)), (PLAIN, None)):
            share = blocks.share_of_input(steps[name], given, setting)
            values[f"{name}, extra memory, %"] = Quantity(share, target=limit)
    return values


def floor(copy: Measurement, clone: Measurement, what: str) -> Measurement:
    """Compute the least time for moving the bytes, round by round."""
    outputs = 1 if what == "forward" else 2
    seconds = [
        NEEDED[what] / 2 * old + outputs * max(0.0, new - old)
        for old, new in zip(copy.times, clone.times, strict=True)
    ]
    return timing.measurement("floor", seconds)


def changing_sizes(setting: Setting) -> list[Row]:
    what, shape = "forward + backward", shapes(setting)[-3:][0]
    found = []
    for dtype in setting.dtypes:
        measure = partial(
            blocks.compare_in_changing_sizes,
            partial(candidates, setting, dtype, what),
            blocks.changing(shape, (2, 3), setting, dtype),
            setting,
            (TEXTBOOK, OURS),
        )
        case = f"up to {blocks.text(shape)} {timing.name_of(dtype)}, {what}"
        found += timing.attempt(blocks.CHANGING, case, measure)
    return found


def growth(setting: Setting) -> list[Row]:
    """Measure five sizes of H·W, and five of B."""
    small, large = (50, 76), (64, 96)
    if setting.quick:
        small = large = (4, 6)
    elif setting.on_gpu:  # so large that a kernel's start does not count
        small, large = (100, 152), (200, 304)
    batch, channels = (8 if setting.on_gpu else 2), (8 if setting.quick else 256)
    maps = [tuple(round(side * scale) for side in small) for scale in (1, 1.5, 2, 3, 4)]
    batches = [size * (2 if setting.on_gpu else 1) for size in (1, 2, 4, 8, 16)]
    by_axis = {
        "H·W": {height * width: (batch, channels, height, width) for height, width in maps},
        "B": {size: (size, channels, *large) for size in batches},
    }
    found = []
    for axis, by_size in by_axis.items():
        case = f"{timing.name_of(setting.dtypes[0])}, forward + backward"
        measure = partial(growth_over, axis, by_size, case, setting)
        found += timing.attempt(f"Growing {axis}", f"growing {axis}, {case}", measure)
    return found


def growth_over(axis: str, by_size: Mapping[int, Shape], case: str, setting: Setting) -> list[Row]:
    dtype = setting.dtypes[0]
    step = candidates(setting, dtype, "forward + backward")[OURS]
    given = {
        size: blocks.input_and_gradient(shape, setting, dtype) for size, shape in by_size.items()
    }
    steps = {str(size): partial(_ignoring_round, step, pair) for size, pair in given.items()}
    times = timing.interleaved(steps, lambda i: i, setting)
    found = [
        Row(
            f"{blocks.text(shape)} {case}",
            {axis: Quantity(size), "TripletAttention, ms": timing.milliseconds(times[str(size)])},
            f"Growing {axis}",
        )
        for size, shape in by_size.items()
    ]
    medians = [times[str(size)].median for size in by_size]
    power = Quantity(timing.exponent(list(by_size), medians))
    name = f"exponent of {axis} that time grows with"
    return [*found, Row(f"all, {case}", {name: power}, f"Growing {axis}")]


def _ignoring_round(step: Callable[[Pair], Any], pair: Pair, _: int) -> Any:
    return step(pair)


def plot(measured: Sequence[Row]) -> Figure | None:
    """Plot time over H·W and over B, with straight lines through the origin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    drawn = False
    for axes, name in zip(figure.subplots(1, 2), ("H·W", "B"), strict=True):
        points = [row.values for row in measured if name in row.values]
        if not points:
            continue
        drawn = True
        sizes = [values[name].value for values in points]
        times = [values["TripletAttention, ms"] for values in points]
        medians = [quantity.value for quantity in times]
        slope = timing.slope_through_origin(sizes, medians)
        axes.plot([0, max(sizes)], [0, slope * max(sizes)], color="0.6", label="proportional")
        spreads = [quantity.spread / 2 for quantity in times]
        axes.errorbar(sizes, medians, spreads, fmt="o", capsize=3, label="measured")
        power = timing.exponent(sizes, medians)
        axes.set(xlabel=name, ylabel="forward + backward, ms", title=f"exponent {power:.2f}")
        axes.legend()
    return figure if drawn else None


if __name__ == "__main__":
    import run

    run.main(only="triplet_attention")
