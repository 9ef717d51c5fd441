"""benchmarks/auxiliary_losses.py: what it times as a step, and whose losses it compares."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import auxiliary_losses  # noqa: E402
from auxiliary_losses import AMC_SELDOM, CLASSES, Step  # noqa: E402
from detector_step import PLAIN, Case  # noqa: E402
from timing import Impossible, Setting, measurement  # noqa: E402

SETTING = Setting(torch.device("cpu"), (torch.float32,), repetitions=2, quick=True)
CASE = Case("Linear", "training", 3, (1, 4), torch.float32)


def losses_of(factor: float, seen: list[int] | None = None):
    """Of a linear layer; the auxiliary one is taken in every 4th step."""

    def losses(model, batch, step):
        if seen is not None:
            seen.append(step)
        own = {"loss_cls": model(batch).square().sum(), "loss_box": model(batch).abs().sum()}
        return own if step % 4 else {**own, "loss_amc_mean": factor * model.weight.sum()}

    return losses


def test_only_the_detectors_own_losses_are_compared():
    model, batch = nn.Linear(4, 1), torch.rand(3, 4)
    plain, other = (
        Step(model, losses_of(factor), torch.float32, SETTING) for factor in (0.0, 100.0)
    )
    for step in (plain, other):
        step((0, batch))
    y = model(batch)
    torch.testing.assert_close(other.loss, (y.square().sum() + y.abs().sum()).detach())
    assert other.beside(plain)["losses differ, %"].value == 0


def test_a_call_has_the_steps_of_which_one_has_the_loss():
    seen: list[int] = []
    step = Step(nn.Linear(4, 1), losses_of(1.0, seen), torch.float32, SETTING, steps=4)
    step((0, torch.rand(3, 4)))
    assert seen == [0, 1, 2, 3]


def test_the_time_of_a_call_is_shared_by_its_steps():
    call = measurement("", [8.0, 16.0, 24.0], number=2)
    assert auxiliary_losses.of_one_step(call, 4).times == [1.0, 2.0, 3.0]
    assert auxiliary_losses.of_one_step(call, 1).times == call.times


def test_each_loss_has_a_line_and_memory_unless_it_is_that_of_another():
    models = {name: nn.Linear(4, 1) for name in (PLAIN, "AMC", AMC_SELDOM)}
    for model in models.values():
        model.load_state_dict(models[PLAIN].state_dict())
    lines = auxiliary_losses.measure(
        CASE, models, losses_of(1.0), torch.rand(3, 4), SETTING, CLASSES
    )
    size = "3 images of 1x4 float32"
    assert [row.case for row in lines] == [f"Linear, AMC, {size}", f"Linear, {AMC_SELDOM}, {size}"]
    memory = {"without, MiB", "with, MiB", "memory, with / without"}
    assert memory <= lines[0].values.keys() and not memory & lines[1].values.keys()
    assert all(row.values["losses differ, %"].value == 0 for row in lines)
    assert all(row.group == CLASSES for row in lines)


def test_time_and_memory_have_targets_on_a_cpu():
    models = {name: nn.Linear(4, 1) for name in (PLAIN, auxiliary_losses.AMC)}
    case = Case("Grounding DINO", "training", 3, (1, 4), torch.float32)
    given = models, losses_of(1.0), torch.rand(3, 4), SETTING, CLASSES
    (line,) = auxiliary_losses.measure(case, *given)
    found = {
        name: quantity.target.bound for name, quantity in line.values.items() if quantity.target
    }
    assert found == {"with / without": 1.15, "memory, with / without": 1.4}


def test_the_two_detectors_of_a_kind_differ_by_their_auxiliary_losses_only():
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import amc_detectors
    from detectron2_detectors import random_batch

    batch = random_batch(2, (64, 96))
    for kind in amc_detectors.CONFIGS:
        names = (PLAIN, auxiliary_losses.AMC_CLASS)
        models = amc_detectors.build_alike(kind, names, SETTING.device, small=True)
        found = []
        for model in models.values():
            torch.manual_seed(0)
            found.append(amc_detectors.losses(model.train(), batch, step=0))
        plain, other = found
        assert set(other) - set(plain) == {"loss_amc_mean", "loss_amc_max"}
        for name, loss in plain.items():
            torch.testing.assert_close(other[name], loss)


def test_mmcv_without_its_cuda_operators_is_a_reason(monkeypatch):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    import grounding_dino_detectors as detectors

    monkeypatch.setattr(detectors, "get_compiling_cuda_version", lambda: "not available")
    with pytest.raises(Impossible, match="CUDA operators"):
        detectors.build_alike(auxiliary_losses.GROUNDING_LOSSES, 9, torch.device("cuda"))


def test_the_spans_are_those_of_the_phrases():
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    import grounding_dino_detectors as detectors

    sample = detectors.random_batch(1, (64, 96))["data_samples"][0]
    spans = [sample.tokens_positive[label] for label in range(4)]
    assert tuple(sample.text[start:end] for [[start, end]] in spans) == detectors.PHRASES
    assert sample.gt_instances.labels.unique().tolist() == [0, 1, 2, 3]
