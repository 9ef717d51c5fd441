"""Measurement of speed and memory: candidates in turn, medians and their ratios.

A machine's speed drifts. So only times of the same run are compared. In every round each candidate
is timed once, in a changing order. The first rounds are thrown away.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
import timeit
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils import benchmark
from torch.utils.benchmark import Measurement
from tqdm import tqdm

from plugin_core.kernels import VARIABLE

T = TypeVar("T")
NO_MEMORY = "the GPU's memory is too small"
# A faster candidate is repeated within a round.
_SECONDS_OF_A_ROUND = 0.02


class Impossible(Exception):
    """Raised where this machine or these arguments allow no measurement."""


@dataclass(frozen=True)
class Setting:
    """Settings of the command line."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    repetitions: int
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def warm_up(self) -> int:
        """Count the rounds to throw away: on a GPU the first may compile, the second may tune."""
        return 2 if self.on_gpu else 1


@dataclass(frozen=True)
class Target:
    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def at_least(bound: float) -> Target:
    return Target(bound, True)


def at_most(bound: float) -> Target:
    return Target(bound, False)


@dataclass(frozen=True)
class Quantity:
    """A number of a table, the interquartile range of its rounds, and its target."""

    value: float
    spread: float | None = None
    target: Target | None = None
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """The numbers of a case by the table's columns, or the reason why there are none."""

    case: str
    values: Mapping[str, Quantity] = field(default_factory=dict)
    group: str = ""
    not_measured: str | None = None
    has_failed: bool = False


def attempt(
    group: str, case: str, measure: Callable[[], list[Row] | dict[str, Quantity]]
) -> list[Row]:
    """Measure a case and print progress. If the case is impossible here, its row says so.

    Args:
        group: title of the table.
        case: name of the line, or the common part of several lines' names.
        measure: gives the line's values, or several lines.
    """
    print(f"  {case}", flush=True)
    start, outcome = time.perf_counter(), ""
    try:
        measured = measure()
        rows = measured if isinstance(measured, list) else [Row(case, measured, group)]
    except (Impossible, ImportError, torch.OutOfMemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError)
        reason = NO_MEMORY if is_memory else " ".join(str(error).split())
        rows, outcome = [Row(case, group=group, not_measured=reason)], f"; not measured: {reason}"
    except Exception as error:
        traceback.print_exc()
        reason = f"it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows = [Row(case, group=group, not_measured=reason, has_failed=True)]
        outcome = f"; {reason}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"    {time.perf_counter() - start:.1f} s{outcome}", flush=True)
    return rows


def interleaved(
    candidates: Mapping[str, Callable[[T], object]],
    inputs: Callable[[int], T],
    setting: Setting,
    repeat: bool = True,
    may_lack_memory: bool = False,
) -> dict[str, Measurement]:
    """Time the candidates in turn.

    ``torch.utils.benchmark`` has the statistics, and a clock that waits for a GPU. Its own
    ``Timer`` would run each candidate twice more in each round, unmeasured.

    Args:
        candidates: called with the result of ``inputs``.
        inputs: called with the number of the round, before the clock starts.
        setting: of the command line.
        repeat: call a fast candidate several times in a round; False where it must not see the same
            input twice.
        may_lack_memory: leave out candidates that do not fit a GPU's memory.

    Returns:
        The rounds of each candidate.

    Raises:
        Impossible: if a candidate does not fit a GPU's memory.
    """
    numbers = dict.fromkeys(candidates, 1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = range(setting.warm_up + setting.repetitions)
    for i in tqdm(rounds, "    rounds", leave=False, disable=None):  # only shown in a terminal
        given = inputs(i)
        for name in random.Random(i).sample(list(times), len(times)):
            call = timeit.Timer(partial(candidates[name], given), timer=benchmark.timer)
            try:
                seconds = call.timeit(numbers[name])
            except torch.OutOfMemoryError:
                if not may_lack_memory:
                    raise Impossible(f"{NO_MEMORY} for {name}") from None
                del times[name]
                torch.cuda.empty_cache()
                continue
            times[name].append(seconds)
            if i < setting.warm_up and repeat and not setting.quick:
                numbers[name] = math.ceil(_SECONDS_OF_A_ROUND / (seconds / numbers[name]))
    return {n: measurement(n, t[setting.warm_up :], numbers[n]) for n, t in times.items()}


def measurement(name: str, seconds: Sequence[float], number: int = 1) -> Measurement:
    """Make a measurement of rounds from their seconds and their number of calls."""
    task = benchmark.TaskSpec(name, setup="", num_threads=torch.get_num_threads())
    return Measurement(number, list(seconds), task)


def milliseconds(measured: Measurement) -> Quantity:
    rounds = tuple(1e3 * seconds for seconds in measured.times)
    return Quantity(1e3 * measured.median, 1e3 * measured.iqr, rounds=rounds)


def in_milliseconds(times: Mapping[str, Measurement]) -> dict[str, Quantity]:
    """Make a column for each candidate."""
    return {f"{name}, ms": milliseconds(measured) for name, measured in times.items()}


def ratio(above: Measurement, below: Measurement, target: Target | None = None) -> Quantity:
    """Divide two medians; the spread is of the rounds' ratios."""
    of_rounds = [a / b for a, b in zip(above.times, below.times, strict=True)]
    value = above.median / below.median
    return Quantity(value, interquartile_range(of_rounds), target, tuple(of_rounds))


def median_of_rounds(compared: Quantity) -> Quantity:
    """Take the median of the rounds' ratios. Medians of times mix the rounds' different sizes."""
    return replace(compared, value=statistics.median(compared.rounds))


def gigabytes_per_second(measured: Measurement, size: float) -> Quantity:
    return Quantity(size / measured.median / 1e9)


def interquartile_range(values: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the power of the size that a quantity grows with: the slope of the logarithms' line."""
    logarithms = [[math.log(value) for value in column] for column in (sizes, values)]
    return statistics.linear_regression(*logarithms).slope


def slope_through_origin(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit a straight line through the origin by least squares; returns its slope."""
    products = sum(x * y for x, y in zip(sizes, values, strict=True))
    return products / sum(x * x for x in sizes)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Set ``PLUGIN_KERNELS`` inside the context."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def with_kernels(choice: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with kernels(choice):
            return function(*args)

    return run


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
