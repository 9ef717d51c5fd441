#!/usr/bin/env python
"""Cost of the plugins in whole detectors: a training step and an inference.

`benchmarks/detector_step.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timing
import torch
from timing import Quantity, Row, Setting, Target, at_most
from torch import Tensor, nn
from torch.utils.benchmark import Measurement

TITLE = "Detectors"
TEXT = """\
A training step is forward, backward, the optimizer (with a learning rate of 0, so that all rounds
do the same) and setting the gradients to None. bfloat16 is autocast. The R-CNNs are Detectron2's
with ResNet-50 and FPN, with triplet attention in all blocks of all four stages, or IDA in the last
of res4 and of res5; res2 trains, without plugins, too. All have the same random weights, and the
plugins start as the identity, so that all have the same proposals and detections: the losses differ
by rounding only. The textbook's triplet attention has no such start. Deformable DETR is
MMDetection's with ResNet-50. BatchFormerV2 doubles the batch behind the first encoder layer; what
this costs by itself shows with the identity in the BatchFormer's place. Its dropout makes the
losses differ."""
MINUTES = 13
PLAIN, TRIPLET, IDA, TEXTBOOK = "without", "triplet attention", "IDA", "textbook triplet attention"
STREAMS, BATCHFORMER = "two streams without BatchFormer", "BatchFormerV2"
TRAINING, INFERENCE = "Training steps", "Inference"
COMPILED = "Training steps with a backbone by torch.compile"
CHANGING_SIZES = "Training steps with another size in every round"
DETR = "Training steps of a DETR with BatchFormerV2"
# Images in training, their size, and images in inference. Detectron2 evaluates single images.
BATCHES = {"cpu": (2, (480, 640), (1,)), "cuda": (8, (800, 1333), (8, 1))}
# Images, and the largest of changing sizes. A CPU has nothing to compile or to tune for a size.
CHANGING = (8, (800, 1333))
DETR_BATCHES = {"cpu": (2, (192, 256)), "cuda": (2, (800, 1333))}
COMPILED_BATCHES = {"cpu": (2, (256, 320)), "cuda": (8, (800, 1333))}
QUICK_SIZE = (64, 96)
Targets = Mapping[tuple[str, str], Target]
# With mixed precision on a GPU, and in float32 on a CPU
TARGETS: Mapping[tuple[str, torch.dtype], Targets] = {
    ("cpu", torch.float32): {
        ("training", TRIPLET): at_most(1.08),
        ("training", IDA): at_most(1.04),
        ("inference", TRIPLET): at_most(1.05),
    },
    ("cuda", torch.bfloat16): {
        ("training", TRIPLET): at_most(1.03),
        ("training", IDA): at_most(1.05),
        ("inference", TRIPLET): at_most(1.03),
    },
}


def rows(setting: Setting) -> list[Row]:
    measured = []
    for kind in ("Faster R-CNN", "Mask R-CNN"):
        for dtype in setting.dtypes:
            measured += steps_of_rcnn(kind, dtype, setting)
        if kind == "Faster R-CNN" and (setting.on_gpu or setting.quick):
            measured += changing_sizes(kind, setting)
    rcnns.cache_clear()
    measured += compiled(setting)
    images, size = DETR_BATCHES[setting.device.type]
    for dtype in setting.dtypes:
        case = Case("Deformable DETR", "training", images, small(size, setting), dtype)
        measure = partial(training_of_detr, case, setting)
        measured += timing.attempt(DETR, str(case), measure)
    return measured


@dataclass(frozen=True)
class Case:
    kind: str
    what: str
    images: int
    size: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        return self.named(self.what)

    def named(self, word: str) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        where = f"{images} of {self.size[0]}x{self.size[1]} {timing.name_of(self.dtype)}"
        return f"{self.kind}, {word}, {where}"


def small(size: tuple[int, int], setting: Setting) -> tuple[int, int]:
    return QUICK_SIZE if setting.quick else size


def steps_of_rcnn(kind: str, dtype: torch.dtype, setting: Setting) -> list[Row]:
    images, size, images_of_inference = BATCHES[setting.device.type]
    size = small(size, setting)
    targets = TARGETS.get((setting.device.type, dtype), {})
    case = Case(kind, "training", images, size, dtype)
    measured = timing.attempt(TRAINING, str(case), partial(training, case, targets, setting))
    for count in images_of_inference:
        case = Case(kind, "inference", count, size, dtype)
        measured += timing.attempt(INFERENCE, str(case), partial(inference, case, targets, setting))
        targets = {}  # only the first has targets
    return measured


def changing_sizes(kind: str, setting: Setting) -> list[Row]:
    images, size = CHANGING
    measured = []
    for dtype in setting.dtypes:
        case = Case(kind, "training", images, small(size, setting), dtype)
        measure = partial(training_in_changing_sizes, case, setting)
        measured += timing.attempt(CHANGING_SIZES, f"{case} at most", measure)
    return measured


@functools.lru_cache(maxsize=1)
def rcnns(kind: str, setting: Setting) -> dict[str, nn.Module]:
    import detectron2_detectors

    plugins = [PLAIN, TRIPLET, IDA, TEXTBOOK]
    if kind == "Mask R-CNN" and not (setting.on_gpu or setting.quick):
        plugins = [PLAIN, TRIPLET]  # more would take too long
    return detectron2_detectors.build_alike(kind, plugins, setting.device, setting.quick)


class TrainingStep:
    """Takes the round's number and its batch; keeps the loss."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Any], Tensor],
        dtype: torch.dtype,
        setting: Setting,
    ) -> None:
        self._model = model.train()
        self._loss_of = loss_of
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)
        self._autocast = partial(autocast, dtype, setting)
        self.loss = torch.zeros(())

    def __call__(self, given: tuple[int, Any]) -> None:
        seed, batch = given
        torch.manual_seed(seed)  # as regions are sampled
        with self._autocast():
            loss = self._loss_of(self._model, batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = loss.detach()

    def beside(self, plain: TrainingStep) -> dict[str, Quantity]:
        """Compare the last round's losses, to show that both had the same work."""
        loss, other = self.loss.item(), plain.loss.item()
        return {"losses differ, %": Quantity(100 * abs(loss - other) / abs(other))}


class Inference:
    """Takes a batch; keeps the number of detections."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, setting: Setting) -> None:
        self._model = model.eval()
        self._autocast = partial(autocast, dtype, setting)
        self.detections = 0

    def __call__(self, batch: list) -> None:
        with torch.no_grad(), self._autocast():
            outputs = self._model.inference(batch)
        self.detections = sum(len(output["instances"]) for output in outputs)

    def beside(self, plain: Inference) -> dict[str, Quantity]:
        """Compare the numbers of detections, to show that both had the same work."""
        return {
            "detections without": Quantity(plain.detections),
            "detections with": Quantity(self.detections),
        }


def autocast(dtype: torch.dtype, setting: Setting) -> torch.autocast:
    is_mixed = dtype is not torch.float32
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=is_mixed)


def training_steps(
    models: Mapping[str, nn.Module],
    loss_of: Callable[[nn.Module, Any], Tensor],
    dtype: torch.dtype,
    setting: Setting,
) -> dict[str, TrainingStep]:
    return {name: TrainingStep(model, loss_of, dtype, setting) for name, model in models.items()}


def training(case: Case, targets: Targets, setting: Setting) -> list[Row]:
    import detectron2_detectors as detectors

    batch = detectors.random_batch(case.images, case.size)
    steps = training_steps(rcnns(case.kind, setting), detectors.loss, case.dtype, setting)
    times = timing.interleaved(steps, lambda i: (i, batch), setting, may_lack_memory=True)
    return compare(case, steps, times, targets, TRAINING)


def inference(case: Case, targets: Targets, setting: Setting) -> list[Row]:
    import detectron2_detectors as detectors

    batch = detectors.random_batch(case.images, case.size)
    steps = {
        name: Inference(model, case.dtype, setting)
        for name, model in rcnns(case.kind, setting).items()
        if setting.on_gpu or name in (PLAIN, TRIPLET)
    }
    times = timing.interleaved(steps, lambda _: batch, setting, may_lack_memory=True)
    return compare(case, steps, times, targets, INFERENCE)


def training_in_changing_sizes(case: Case, setting: Setting) -> list[Row]:
    import detectron2_detectors as detectors

    def inputs(i: int) -> tuple[int, list]:
        chance = random.Random(i)
        size = tuple(chance.randint(side // 2, side) for side in case.size)
        return i, detectors.random_batch(case.images, size)

    models = {name: rcnns(case.kind, setting)[name] for name in (PLAIN, TRIPLET)}
    steps = training_steps(models, detectors.loss, case.dtype, setting)
    times = timing.interleaved(steps, inputs, setting, repeat=False, may_lack_memory=True)
    rows = compare(case, steps, times, {}, CHANGING_SIZES)
    name = "with / without"
    return [
        replace(row, values={**row.values, name: timing.median_of_rounds(row.values[name])})
        if name in row.values
        else row
        for row in rows
    ]


def compiled(setting: Setting) -> list[Row]:
    images, size = COMPILED_BATCHES[setting.device.type]
    measured = []
    for dtype in setting.dtypes:
        case = Case("Faster R-CNN R18-FPN, triplet attention", "training", images, size, dtype)
        measure = partial(training_compiled, case, setting)
        measured += timing.attempt(COMPILED, str(case), measure)
    return measured


def training_compiled(case: Case, setting: Setting) -> dict[str, Quantity]:
    """Compare a step with its backbone compiled and the same step in eager mode."""
    if setting.quick:
        raise timing.Impossible("--quick leaves it out, as it compiles for minutes")
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise timing.Impossible(f"there is no C++ compiler {compiler!r}; CXX names another")
    import detectron2_detectors as detectors

    batch = detectors.random_batch(case.images, case.size)
    kind = "Faster R-CNN R18"
    models = {
        name: detectors.build_alike(kind, [TRIPLET], setting.device)[TRIPLET]
        for name in ("eager", "compiled")
    }
    models["compiled"].backbone.compile()
    steps = training_steps(models, detectors.loss, case.dtype, setting)
    seconds = compile_now(lambda: steps["compiled"]((0, batch)))
    times = timing.interleaved(steps, lambda i: (i, batch), setting)
    torch.compiler.reset()
    values = timing.in_milliseconds(times)
    ratio = timing.ratio(times["compiled"], times["eager"], at_most(1.0))
    values |= {"compiled / eager": ratio, "compilation, s": Quantity(seconds)}
    return values | steps["compiled"].beside(steps["eager"])


def compile_now(run: Callable[[], object]) -> float:
    """Measure the seconds of the first call, with nothing in the compiler's cache."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        start = time.perf_counter()
        try:
            run()
            return time.perf_counter() - start
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def training_of_detr(case: Case, setting: Setting) -> list[Row]:
    import mmdet_detectors as detectors

    models = detectors.build_alike(setting.device, setting.quick)
    batch = detectors.random_batch(case.images, case.size)
    steps = training_steps(models, detectors.loss, case.dtype, setting)
    times = timing.interleaved(steps, lambda i: (i, batch), setting, may_lack_memory=True)
    rows = compare(case, steps, times, {}, DETR)
    if not {STREAMS, BATCHFORMER} <= times.keys():
        return rows
    share = timing.ratio(times[BATCHFORMER], times[STREAMS])
    values = {**rows[-1].values, "with / two streams": share}
    return [*rows[:-1], replace(rows[-1], values=values)]


def compare(
    case: Case,
    steps: Mapping[str, TrainingStep] | Mapping[str, Inference],
    times: Mapping[str, Measurement],
    targets: Targets,
    group: str,
) -> list[Row]:
    """Make a line for each plugin, beside the plain detector."""
    rows = []
    for name in steps:
        if name == PLAIN:
            continue
        if not {PLAIN, name} <= times.keys():
            rows.append(Row(case.named(name), group=group, not_measured=timing.NO_MEMORY))
            continue
        values = {
            "without, ms": timing.milliseconds(times[PLAIN]),
            "with, ms": timing.milliseconds(times[name]),
            "with / without": timing.ratio(
                times[name], times[PLAIN], targets.get((case.what, name))
            ),
        }
        rows.append(Row(case.named(name), {**values, **steps[name].beside(steps[PLAIN])}, group))
    return rows


if __name__ == "__main__":
    import run

    run.main(only="detector_step")
