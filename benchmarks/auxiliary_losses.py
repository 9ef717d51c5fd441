#!/usr/bin/env python
"""Cost of attention mask consistency and functional entropy in a training step of detectors.

`benchmarks/auxiliary_losses.py` runs this alone; its arguments are those of `benchmarks/run.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import detector_step
import timing
import torch
from detector_step import PLAIN, Case, TrainingStep
from timing import Quantity, Row, Setting, Target, at_most
from torch import Tensor, nn
from torch.utils.benchmark import Measurement

from plugin_core.inspection import devices

TITLE = "Auxiliary losses"
TEXT = """\
Attention mask consistency (AMC) and functional entropy differentiate gradients of the detector. A
training step is one of "Detectors" above, and all detectors of a kind have the same random weights.
AMC takes phrases, or classes, of each image at random; each is a differentiation of its own. For
AMC in every 4th step the time is the mean of 4 steps; its memory is that of AMC of 1 phrase.
Functional entropy has one noisy copy of each image and text. Grounding DINO is MMDetection's with
ResNet-50, 6 layers in the encoder and 6 in the decoder, no activation checkpoints (AMC cannot have
them), a small text model of random weights and a caption of 4 phrases; on a CPU it has 100 queries,
not 900, and where the losses differentiate twice, deformable attention is faster than mmcv's, which
the detector has otherwise. Faster R-CNN and RetinaNet are Detectron2's with ResNet-50 and FPN.
Memory is the most that a step has allocated at once, its gradients too, beyond the weights and the
optimizer's state; on a CPU, what PyTorch has not handed out itself is not seen. The losses that
differ are the detector's own; they differ by rounding only."""
MINUTES = 6
AMC, AMC_ALL, AMC_SELDOM = "AMC of 1 phrase", "AMC of all 4 phrases", "AMC in every 4th step"
ENTROPY, AMC_CLASS = "functional entropy", "AMC of 1 class"
GROUNDING, CLASSES = "Detectors that read a text", "Detectors of classes"
# Arguments of PluginGroundingDINO
GROUNDING_LOSSES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    AMC: {"attention_mask_consistency": {"phrases": 1}},
    AMC_ALL: {"attention_mask_consistency": {"phrases": None}},
    AMC_SELDOM: {"attention_mask_consistency": {"phrases": 1, "every": 4}},
    ENTROPY: {"functional_entropy": {"samples": 1}},
}
STEPS_OF_A_CALL = {AMC_SELDOM: 4}
AUXILIARY = ("loss_amc_mean", "loss_amc_max", "loss_functional_entropy")
# Number of images, and their size
GROUNDING_BATCHES = {"cpu": (1, (192, 256)), "cuda": (2, (800, 1333))}
CLASS_BATCHES = {"cpu": (2, (320, 448)), "cuda": (8, (800, 1333))}
QUERIES = {"cpu": 100, "cuda": 900}
# Time and memory of a step in float32 on a CPU
TARGETS: Mapping[tuple[str, str], tuple[Target, Target]] = {
    ("Grounding DINO", AMC): (at_most(1.15), at_most(1.4)),
    ("Grounding DINO", ENTROPY): (at_most(2.0), at_most(2.0)),
    ("Faster R-CNN", AMC_CLASS): (at_most(1.3), at_most(1.4)),
}
LossesOf = Callable[[nn.Module, Any, int], Mapping[str, Tensor]]


def rows(setting: Setting) -> list[Row]:
    measured = []
    images, size = GROUNDING_BATCHES[setting.device.type]
    for dtype in setting.dtypes:
        case = Case("Grounding DINO", "training", images, detector_step.small(size, setting), dtype)
        measured += timing.attempt(GROUNDING, str(case), partial(grounding, case, setting))
    images, size = CLASS_BATCHES[setting.device.type]
    for kind in ("Faster R-CNN", "RetinaNet"):
        for dtype in setting.dtypes:
            case = Case(kind, "training", images, detector_step.small(size, setting), dtype)
            measured += timing.attempt(CLASSES, str(case), partial(of_classes, case, setting))
    return measured


class Step(TrainingStep):
    """Takes the round's number and its batch; keeps the sum of the detector's own losses.

    Args:
        model: the detector.
        losses_of: gives the detector's losses by name for a batch and the number of the step.
        dtype: as in :class:`TrainingStep`.
        setting: of the command line.
        steps: number of steps in a call; they are numbered from 0.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: LossesOf,
        dtype: torch.dtype,
        setting: Setting,
        steps: int = 1,
    ) -> None:
        super().__init__(model, self._sum, dtype, setting)
        self._losses_of = losses_of
        self._device = setting.device
        self._own = torch.zeros(())
        self._number = 0
        self.steps = steps
        self.peak: int | None = None
        self.target: Target | None = None  # of the memory

    def __call__(self, given: tuple[int, Any]) -> None:
        for number in range(self.steps):
            self._number = number
            super().__call__(given)
        self.loss = self._own

    def _sum(self, model: nn.Module, batch: Any) -> Tensor:
        losses = self._losses_of(model, batch, self._number)
        own = [loss.detach() for name, loss in losses.items() if name not in AUXILIARY]
        self._own = torch.stack(own).sum()
        return torch.stack(list(losses.values())).sum()

    def measure_peak(self, given: tuple[int, Any]) -> None:
        """Find a call's peak of allocated bytes."""

        def call() -> tuple[Tensor, ...]:
            self(given)
            gc.collect()  # or the next call would count the garbage of this one
            return ()

        gc.collect()
        gc.freeze()  # the collections within a call need not look at what is there already
        self.peak = devices.peak_extra_bytes(call, self._device)
        gc.unfreeze()

    def beside(self, plain: TrainingStep) -> dict[str, Quantity]:
        values = super().beside(plain)
        if isinstance(plain, Step) and plain.peak and self.peak is not None:
            values["without, MiB"] = Quantity(plain.peak / 2**20)
            values["with, MiB"] = Quantity(self.peak / 2**20)
            ratio = self.peak / plain.peak
            values["memory, with / without"] = Quantity(ratio, target=self.target)
        return values


def grounding(case: Case, setting: Setting) -> list[Row]:
    import grounding_dino_detectors as detectors

    queries = QUERIES[setting.device.type]
    models = detectors.build_alike(GROUNDING_LOSSES, queries, setting.device, setting.quick)
    batch = detectors.random_batch(case.images, case.size)
    return measure(case, models, detectors.losses, batch, setting, GROUNDING)


def of_classes(case: Case, setting: Setting) -> list[Row]:
    import amc_detectors as detectors
    from detectron2_detectors import random_batch

    names = (PLAIN, AMC_CLASS)
    models = detectors.build_alike(case.kind, names, setting.device, setting.quick)
    batch = random_batch(case.images, case.size)
    return measure(case, models, detectors.losses, batch, setting, CLASSES)


def measure(
    case: Case,
    models: Mapping[str, nn.Module],
    losses_of: LossesOf,
    batch: Any,
    setting: Setting,
    group: str,
) -> list[Row]:
    """Measure a line for each loss, beside the plain detector."""
    steps = {
        name: Step(model, losses_of, case.dtype, setting, STEPS_OF_A_CALL.get(name, 1))
        for name, model in models.items()
    }
    is_bound = not setting.on_gpu and case.dtype is torch.float32
    targets = {}
    for name in [name for name in steps if is_bound and (case.kind, name) in TARGETS]:
        targets[case.what, name], steps[name].target = TARGETS[case.kind, name]
    calls = timing.interleaved(steps, lambda i: (i, batch), setting, may_lack_memory=True)
    last = setting.warm_up + setting.repetitions - 1  # losses of the last round are compared
    for name in calls:
        if name != AMC_SELDOM:  # it has the same peak as AMC
            steps[name].measure_peak((last, batch))
    times = {name: of_one_step(call, steps[name].steps) for name, call in calls.items()}
    return detector_step.compare(case, steps, times, targets, group)


def of_one_step(call: Measurement, steps: int) -> Measurement:
    """Compute the mean time of a call's steps."""
    return timing.measurement("", call.raw_times, steps * call.number_per_run)


if __name__ == "__main__":
    import run

    run.main(only="auxiliary_losses")
