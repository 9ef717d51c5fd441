"""What detectors cost: parameters, multiply-adds, time and memory, and accuracy against each."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import timer
from tqdm import tqdm

from plugin_core.evaluation.comparison.drawing import new_figure, to_png
from plugin_core.evaluation.comparison.evaluations import Checkpoint
from plugin_core.evaluation.comparison.sections import Figure, Section, Table
from plugin_core.inspection.attention_maps import Detector, Picture
from plugin_core.inspection.building import silence
from plugin_core.inspection.config_kinds import side_of
from plugin_core.inspection.devices import device_name, nbytes, peak_extra_bytes
from plugin_core.inspection.opening import count, load
from plugin_core.inspection.sheets import no_formula

SECONDS = 10.0  # of the measured rounds, all detectors together
ROUNDS = (3, 50)  # at least, even if they take longer, and at most
IMAGES = 8  # that are detected in, in turn
_Key = TypeVar("_Key", bound=Hashable)


@dataclass
class Cost:
    """What is known of a detector's cost; None where it is not.

    Attributes:
        parameters: number of them.
        flops: multiply-adds for an image of ``size``.
        size: (height, width) of the config's test images, in pixels.
        memory: peak of the bytes that PyTorch allocates for one image, with the weights.
        device: that it was timed on.
        seconds: of an image, one number for each round, by the number of images in a batch.
        notes: reasons of what is missing.
    """

    parameters: int | None = None
    flops: int | None = None
    size: tuple[int, int] | None = None
    memory: int | None = None
    device: str | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def milliseconds(self, batch: int = 1) -> tuple[float, float] | None:
        """Median and interquartile range over the rounds."""
        if not self.seconds.get(batch):
            return None
        first, median, third = 1e3 * np.quantile(self.seconds[batch], (0.25, 0.5, 0.75))
        return float(median), float(third - first)


def measure_costs(
    models: Mapping[str, Checkpoint], images: Sequence[Path], seconds: float = SECONDS
) -> dict[str, Cost]:
    """Measure detectors by their configs; those with weights on this machine are timed, too.

    Without weights the time would not be that of the trained detector: it depends on the number of
    proposals and detections.

    Args:
        models: by the detectors' names; empty weights for a config alone.
        images: files to detect in, in turn; noise of the test size if there are none.
        seconds: to spend on the measured rounds.
    """
    costs = {name: Cost() for name in models}
    for name in tqdm(models, "counting GFLOPs", unit="detector", disable=None):
        _count(models[name].config, costs[name])
    timed = {name: model for name, model in models.items() if model.weights}
    with TemporaryDirectory() as folder, torch.no_grad():
        calls: dict[tuple[str, int], Callable[[int], None]] = {}
        for name in tqdm(timed, "first images", unit="detector", disable=None):
            try:
                calls |= _start(name, timed[name], costs[name], images, Path(folder))
            except Exception as error:  # of a config's own code, or the GPU's memory
                costs[name].notes.append(f"not timed: {' '.join(str(error).split())}")
        for (name, batch), times in time_in_turn(calls, seconds).items():
            costs[name].seconds[batch] = [one / batch for one in times]
    return costs


def _count(config: str, cost: Cost) -> None:
    try:
        with silence():
            report = count(side_of(config), config, None, activations=False)
    except ValueError as error:
        cost.notes.append(f"not counted: {error}")
        return
    cost.parameters, cost.flops = report.total.parameters, report.total.flops
    cost.size = report.image_size


def _start(
    name: str, model: Checkpoint, cost: Cost, images: Sequence[Path], folder: Path
) -> dict[tuple[str, int], Callable[[int], None]]:
    """Load a detector, measure its memory and warm it up; returns what is to be timed."""
    with silence():
        detector = load(side_of(model.config), model.config, model.weights.partition("?")[0])
    pictures = [detector.read(str(path)) for path in images or [_noise(cost.size, folder)]]
    device = next(detector.model.parameters()).device
    calls: dict[tuple[str, int], Callable[[int], None]] = {
        (name, batch): partial(_evaluate, detector, pictures, batch)
        for batch in dict.fromkeys((1, detector.batch_size))
    }

    def one_image() -> tuple[()]:
        calls[name, 1](0)
        return ()

    weights = nbytes(*detector.model.parameters(), *detector.model.buffers())
    on_gpu = device.type == "cuda"  # which may tune and compile first
    cost.memory = weights + peak_extra_bytes(one_image, device, warm_up=on_gpu)
    for (_, batch), call in calls.items():
        for number in range(2 if on_gpu else int(batch > 1)):
            call(number)
    cost.device = device_name(device)
    return calls


def _evaluate(detector: Detector, pictures: Sequence[Picture], batch: int, number: int) -> None:
    places = range(number * batch, (number + 1) * batch)
    detector.evaluate([pictures[place % len(pictures)] for place in places])


def _noise(size: tuple[int, int] | None, folder: Path) -> Path:
    height, width = size or (800, 1333)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    path = folder / f"noise-{height}-{width}.png"
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


def time_in_turn(
    calls: Mapping[_Key, Callable[[int], None]], seconds: float
) -> dict[_Key, list[float]]:
    """Time calls round after round, so that a drift of the machine's speed is the same for all.

    Args:
        calls: each is given the number of the round.
        seconds: to spend, with at least and at most as many rounds as ``ROUNDS`` says.

    Returns:
        The seconds of each round.
    """
    times: dict[_Key, list[float]] = {key: [] for key in calls}
    began = time.monotonic()
    for number in tqdm(range(ROUNDS[1] if calls else 0), "timing", unit="round", disable=None):
        spent = time.monotonic() - began
        if number >= ROUNDS[0] and spent + spent / number > seconds:
            break
        order = [*calls] if number % 2 == 0 else [*calls][::-1]
        for key in order:
            start = timer()  # which waits for a GPU
            calls[key](number)
            times[key].append(timer() - start)
    return times


def cost_section(
    costs: Mapping[str, Cost], accuracy: Mapping[str, float], metric: str, images: str
) -> Section:
    """Lay out the costs.

    Args:
        costs: by the detectors' names.
        accuracy: of each detector, in percent.
        metric: name of the accuracy, such as "AP".
        images: where the timed images are from, such as "noise".
    """
    rows = []
    for name, cost in costs.items():
        size = f"{cost.size[0]}×{cost.size[1]}" if cost.size else None
        gflops = cost.flops / 1e9 if cost.flops is not None else None
        memory = cost.memory / 2**20 if cost.memory is not None else None
        times = cost.milliseconds() or (None, None)
        rows.append([name, cost.parameters, gflops, size, *times, memory])
    headers = ["detector", "parameters", "GFLOPs", "image", "ms an image", "IQR", "peak MiB"]
    notes = " ".join(f"{name}: {note}." for name, cost in costs.items() for note in cost.notes)
    tables = [Table("Cost", headers, rows, notes)]
    batches = [
        [name, batch, *(cost.milliseconds(batch) or (None, None))]
        for name, cost in costs.items()
        for batch in cost.seconds
        if batch > 1
    ]
    if batches:
        headers = ["detector", "images in a batch", "ms an image", "IQR"]
        tables.append(Table("Time in batches of the config's test", headers, batches))
    text = (
        "Parameters and GFLOPs (multiply-adds) are counted as tools/analyze_model.py does, for one "
        "image of the config's test size.\n\n" + _how_timed(costs, images)
    )
    data: dict[str, Any] = {name: vars(cost) for name, cost in costs.items()}
    png = _draw(costs, accuracy, metric)
    figures = [Figure(f"{metric} against the cost", png)] if png else []
    return Section("What it costs", text, tables, figures, data)


def _how_timed(costs: Mapping[str, Cost], images: str) -> str:
    timed = {name: cost for name, cost in costs.items() if cost.seconds}
    if not timed:
        return "Nothing was timed: that needs weights (--config NAME=CONFIG:WEIGHTS)."
    devices = dict.fromkeys(cost.device for cost in timed.values())
    where = next(iter(devices))
    if len(devices) > 1:
        where = "; ".join(f"{name} on {cost.device}" for name, cost in timed.items())
    rounds = len(next(iter(next(iter(timed.values())).seconds.values())))
    return (
        f"Time is that of the detector on {where}, from a resized image to the detections, for one "
        f"image at a time: the median of {rounds} rounds after a warm-up, in each of which every "
        "detector has its turn, and the interquartile range (IQR) over them. The images are "
        f"{images}. Peak memory is what PyTorch allocates for one image, with the weights; on a "
        "CPU it lacks the libraries' own scratch memory."
    )


def _draw(costs: Mapping[str, Cost], accuracy: Mapping[str, float], metric: str) -> bytes | None:
    """Draw the accuracy against each cost that two or more detectors have."""
    values: dict[str, dict[str, float]] = {
        "million parameters": {},
        "GFLOPs": {},
        "ms an image": {},
        "peak MiB": {},
    }
    for name, cost in costs.items():
        if cost.parameters is not None:
            values["million parameters"][name] = cost.parameters / 1e6
        if cost.flops is not None:
            values["GFLOPs"][name] = cost.flops / 1e9
        if times := cost.milliseconds():
            values["ms an image"][name] = times[0]
        if cost.memory is not None:
            values["peak MiB"][name] = cost.memory / 2**20
    panels = {label: of for label, of in values.items() if len(of) > 1}
    if not panels:
        return None
    figure = new_figure(3.2 * len(panels) + 0.6, 3.2)
    for axes, (label, of) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for i, name in enumerate(costs):
            if name in of:
                axes.plot(of[name], accuracy[name], "o", color=f"C{i % 10}")
                axes.annotate(
                    no_formula(name),
                    (of[name], accuracy[name]),
                    xytext=(4, (4, -10)[i % 2]),  # apart where points are near
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.margins(x=0.4, y=0.2)  # for the names
        axes.locator_params(axis="x", nbins=3)
        axes.grid(alpha=0.4)
        axes.set_axisbelow(True)
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel(f"{metric} (%)")
    return to_png(figure)


def pick_images(content: Mapping[str, Any], folder: Path | None) -> list[Path]:
    """Pick images of an annotation file, evenly over it, that are in a folder."""
    if folder is None:
        return []
    names = [image.get("file_name") for image in content["images"]]
    found = [folder / name for name in names if isinstance(name, str) and (folder / name).is_file()]
    number = min(IMAGES, len(found))
    return [found[i * len(found) // number] for i in range(number)]
