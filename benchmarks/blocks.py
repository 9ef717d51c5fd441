"""Inputs and passes for the benchmarks of single blocks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import timing
import torch
from timing import Quantity, Setting
from torch import Tensor, nn
from torch.utils.benchmark import Measurement

from plugin_core.inspection import devices

Shape = tuple[int, ...]
Pair = tuple[Tensor, Tensor]
CHANGING = "Another size in every round"
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PASSES = ("forward", "forward + backward")


def cases(
    shapes: list[Shape], setting: Setting
) -> Iterator[tuple[Shape, str, torch.dtype, str, str]]:
    """List shape, memory format, dtype, pass and name of each case."""
    for dtype, shape, layout, what in itertools.product(setting.dtypes, shapes, FORMATS, PASSES):
        yield shape, layout, dtype, what, f"{text(shape)} {layout} {timing.name_of(dtype)}, {what}"


def text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def input_and_gradient(
    shape: Shape, setting: Setting, dtype: torch.dtype, layout: str = "contiguous"
) -> Pair:
    """Draw a random x (B, C, H, W) and a random gradient of a block's output."""
    tensors = (torch.randn(shape, device=setting.device, dtype=dtype) for _ in range(2))
    x, g = (t.contiguous(memory_format=FORMATS[layout]) for t in tensors)
    return x.requires_grad_(), g


def prepare(
    modules: Mapping[str, nn.Module], setting: Setting, dtype: torch.dtype, what: str
) -> dict[str, nn.Module]:
    """Put modules on the device with the weights of the first, in training or not."""
    first, *_ = modules.values()
    for module in modules.values():
        module.load_state_dict(first.state_dict())
        module.to(setting.device, dtype).train(what != "forward")
    return dict(modules)


def candidate(module: nn.Module, what: str) -> Callable[[Pair], Any]:
    return forward(module) if what == "forward" else forward_and_backward(module)


def forward(module: nn.Module) -> Callable[[Pair], Tensor]:
    def run(given: Pair) -> Tensor:
        with torch.no_grad():
            return module(given[0].detach())  # features without gradients

    return run


def forward_and_backward(module: nn.Module) -> Callable[[Pair], tuple[Tensor, ...]]:
    """Make a step that gives the output and all gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]

    def run(given: Pair) -> tuple[Tensor, ...]:
        x, g = given
        y = module(x)
        return y, *torch.autograd.grad(y, [x, *parameters], g)

    return run


def measure(
    candidates: Mapping[str, Callable[[Pair], Any]], given: Pair, setting: Setting
) -> dict[str, Measurement]:
    """Time candidates beside copies of x into new and into old memory."""
    x = given[0].detach()
    into = torch.empty_like(x)
    copies = {"clone": lambda _: x.clone(), "copy_": lambda _: into.copy_(x)}
    return timing.interleaved({**candidates, **copies}, lambda _: given, setting)


def beside(
    steps: Mapping[str, Callable[[Pair], Any]],
    given: Pair,
    what: str,
    setting: Setting,
    ratio: tuple[str, str],
) -> dict[str, Quantity]:
    """Measure the times of steps, the ratio of two, and with a backward the extra memory of all."""
    times = measure(steps, given, setting)
    values = timing.in_milliseconds(times)
    values[" / ".join(ratio)] = timing.ratio(*(times[name] for name in ratio))
    if what != "forward":
        for name, step in steps.items():
            share = share_of_input(step, given, setting)
            values[f"{name}, extra memory, %"] = Quantity(share)
    return values


def share_of_input(step: Callable[[Pair], Any], given: Pair, setting: Setting) -> float:
    """Measure peak memory beyond input, output and gradients, in percent of the input."""
    extra = devices.peak_extra_bytes(lambda: step(given), setting.device)
    return 100 * extra / devices.nbytes(given[0])


def changing(
    shape: Shape, axes: Sequence[int], setting: Setting, dtype: torch.dtype
) -> Callable[[int], Pair]:
    """Make inputs with random axes in each round, from half the given lengths to the full ones."""

    def inputs(i: int) -> Pair:
        chance, sizes = random.Random(i), list(shape)
        for axis in axes:
            sizes[axis] = chance.randint(-(-shape[axis] // 2), shape[axis])
        return input_and_gradient(tuple(sizes), setting, dtype)

    return inputs


def compare_in_changing_sizes(
    make_candidates: Callable[[], Mapping[str, Callable[[Pair], Any]]],
    inputs: Callable[[int], Pair],
    setting: Setting,
    names: tuple[str, str],
) -> dict[str, Quantity]:
    """Time candidates that rarely see a size twice, and take the ratio of two of them.

    A detector's images rarely repeat a size: compiling or tuning for each size shows here.
    """
    times = timing.interleaved(make_candidates(), inputs, setting, repeat=False)
    values = timing.in_milliseconds(times)
    ratio = timing.median_of_rounds(timing.ratio(*(times[name] for name in names)))
    values[" / ".join(names)] = ratio
    values["of the worst round"] = Quantity(min(ratio.rounds))
    return values
