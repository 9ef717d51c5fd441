"""Reading mmengine's checkpoints, refusing malicious ones, and resuming exactly."""

from __future__ import annotations

import builtins
import collections
import logging
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import HOOKS
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OneCycleLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator

from mm_plugins.resume import ExactResumeHook, allow_mmengine_checkpoints
from plugin_core.checkpoints.reading import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


class TinyModel(BaseModel):
    """A linear model whose loss depends on random numbers, as proposals do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, inputs: list[Tensor], mode: str = "tensor") -> Any:
        out = self.linear(nn.functional.dropout(torch.stack(inputs), 0.5))
        return {"loss": out.square().mean()} if mode == "loss" else out


class TinyDataset(Dataset):
    """Augments at random, as pipelines do."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        flipped, noise = random.random() < 0.5, np.random.rand()
        return {"inputs": torch.full((3,), float(index) * (-1 if flipped else 1)) + noise}


def run(folder: Path, iterations: int, *, seed: int | None = 3, resume: bool = False) -> Runner:
    """Train with checkpoints at every second iteration, and go on from the last one if asked."""
    runner = Runner(
        model=TinyModel(),
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 2,
            "dataset": TinyDataset(),
            "sampler": {"type": "InfiniteSampler", "shuffle": True},
        },
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": iterations},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
        default_hooks={
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": 2},
            "logger": {"type": "LoggerHook", "interval": 1},
        },
        log_processor={"by_epoch": False},
        custom_hooks=[{"type": "ExactResumeHook"}],
        randomness={"seed": seed} if seed is not None else {},
        resume=resume,
        default_scope="mmdet",
        log_level="WARNING",
        experiment_name=f"{folder.name}_{iterations}_{resume}",
    )
    runner.train()
    return runner


@pytest.fixture(autouse=True)
def _allowed() -> None:
    """Allow again what OneDL's mmengine takes back with each checkpoint that it loads."""
    allow_mmengine_checkpoints()


@pytest.fixture(scope="module")
def saved_by_mmengine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a training writes it."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, 4)
    return folder / "iter_4.pth"


# ------------------------------------------------------------------------------ reading checkpoints


def test_checkpoint_of_a_training_loads_by_default(saved_by_mmengine):
    checkpoint = torch.load(saved_by_mmengine)
    assert checkpoint["meta"]["iter"] == 4 and checkpoint["meta"]["seed"] == 3
    assert set(checkpoint["state_dict"]) == {"linear.weight", "linear.bias"}
    losses = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(losses, HistoryBuffer)
    values, counts = losses.data
    assert len(values) == 4 and np.isfinite(values).all() and (counts == 1).all()
    assert losses.current() == values[-1] and losses.statistics("max") == values.max()


def test_training_resumes_from_its_checkpoint(saved_by_mmengine):
    runner = run(saved_by_mmengine.parent, 6, resume=True)
    assert runner.iter == 6
    losses = runner.message_hub.get_scalar("train/loss")
    assert len(losses.data[0]) == 6


@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "u8", "?"])
def test_numpy_scalars_and_arrays_load(tmp_path, kind):
    value_type = np.dtype(kind).type
    content = {"scalar": value_type(1), "array": np.ones(3, value_type)}
    torch.save(content, tmp_path / "numbers.pth")
    loaded = torch.load(tmp_path / "numbers.pth")
    assert loaded["scalar"] == 1 and type(loaded["scalar"]) is value_type
    assert loaded["array"].dtype == value_type and (loaded["array"] == 1).all()


def test_a_look_at_a_file_takes_nothing_off_the_list_of_what_loads(tmp_path):
    torch.save({"array": np.ones(3)}, tmp_path / "numbers.pth")
    read_checkpoint(str(tmp_path / "numbers.pth"))
    assert (torch.load(tmp_path / "numbers.pth")["array"] == 1).all()


def test_checkpoint_is_refused_where_mm_plugins_is_not_imported(saved_by_mmengine):
    code = (
        "import torch, pickle, mmengine.logging\n"
        f"try: torch.load({str(saved_by_mmengine)!r})\n"
        "except pickle.UnpicklingError as error: print('refused:', error)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused: ") and "HistoryBuffer" in result.stdout


# ---------------------------------------------------------------------------- refusing what is more


class Call:
    """Makes ``pickle`` call ``function(*arguments)`` when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class OwnClass:
    pass


def executed(path: str) -> None:
    Path(path).touch()


MALICIOUS = {
    "os.system": lambda trace: Call(os.system, f"touch {trace}"),
    "eval": lambda trace: Call(builtins.eval, f"__import__('pathlib').Path({trace!r}).touch()"),
    "exec": lambda trace: Call(builtins.exec, f"import os; os.mkdir({trace!r})"),
    "a function of the file's author": lambda trace: Call(executed, trace),
    "a class of the file's author": lambda trace: OwnClass(),
    "the constructor of HistoryBuffer": lambda trace: Call(getattr, HistoryBuffer, "__init__"),
    "the globals of HistoryBuffer": lambda trace: Call(getattr, HistoryBuffer, "__dict__"),
    "a method of a dict": lambda trace: Call(getattr, collections.OrderedDict, "fromkeys"),
    "a method of an array": lambda trace: Call(getattr, np.ndarray, "tofile"),
    "an allowed name of another class": lambda trace: Call(getattr, np.ndarray, "min"),
    "a module": lambda trace: Call(getattr, Call(__import__, "os"), "system"),
    "an instance of HistoryBuffer": lambda trace: Call(getattr, HistoryBuffer([1.0], [1]), "min"),
    "getattr of three arguments": lambda trace: Call(getattr, HistoryBuffer, "none", 1),
    "setattr": lambda trace: Call(setattr, HistoryBuffer, "min", 1),
}


@pytest.mark.parametrize("attack", MALICIOUS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malicious_checkpoint_is_refused_and_runs_nothing(tmp_path, attack, legacy):
    trace = tmp_path / "executed"
    content = {"state_dict": {}, "message_hub": MALICIOUS[attack](str(trace))}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    # A refusal, or the stand-in for getattr that is called with what it does not take.
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        torch.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["min", "max", "current", "mean"])
def test_the_four_statistics_of_a_history_are_allowed(tmp_path, name):
    torch.save({"method": Call(getattr, HistoryBuffer, name)}, tmp_path / "checkpoint.pth")
    assert torch.load(tmp_path / "checkpoint.pth")["method"] is getattr(HistoryBuffer, name)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_the_state_of_a_one_cycle_schedule_can_be_read(tmp_path, strategy):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = OneCycleLR(optimizer, eta_max=1.0, total_steps=10, anneal_strategy=strategy)
    torch.save({"param_schedulers": [schedule.state_dict()]}, tmp_path / "checkpoint.pth")
    (state,) = torch.load(tmp_path / "checkpoint.pth")["param_schedulers"]
    assert state["anneal_func"] is schedule.anneal_func


def test_getattr_itself_is_not_replaced():
    assert builtins.getattr is getattr and getattr(SimpleNamespace(a=1), "a") == 1  # noqa: B009


# ----------------------------------------------------------------------------------- exact resuming


def fake_runner(
    *,
    seed: int = 3,
    iteration: int = 0,
    epoch: int = 0,
    loop: type = EpochBasedTrainLoop,
    persistent_workers: bool = False,
    **iterator: Any,
) -> Any:
    train_loop: Any = loop.__new__(loop)
    train_loop.dataloader_iterator = SimpleNamespace(**iterator)
    return SimpleNamespace(
        seed=seed,
        iter=iteration,
        epoch=epoch,
        train_loop=train_loop,
        train_dataloader=SimpleNamespace(persistent_workers=persistent_workers),
        _randomness_cfg={"seed": seed},
        logger=logging.getLogger("test_mm_resume"),
    )


def number_in_iteration(**runner: int) -> float:
    ExactResumeHook().before_train_iter(fake_runner(**runner), batch_idx=0)
    return torch.rand(()).item()


def draw() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), torch.rand(()).item()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def numbers_in_epoch(**runner: Any) -> tuple[float, float, float]:
    ExactResumeHook().before_train_epoch(fake_runner(**runner))
    return draw()


def test_random_numbers_of_an_iteration_do_not_depend_on_what_ran_before():
    expected = number_in_iteration(iteration=5)
    torch.manual_seed(99)
    assert number_in_iteration(iteration=5) == expected
    assert number_in_iteration(iteration=5, epoch=2) == expected


def test_random_numbers_differ_between_iterations_and_seeds():
    numbers = [number_in_iteration(iteration=i, seed=s) for i in range(4) for s in (0, 3)]
    assert len(set(numbers)) == 8


def test_random_numbers_of_an_epoch_do_not_depend_on_what_ran_before():
    expected = numbers_in_epoch(epoch=2)
    seed_all(99)
    assert numbers_in_epoch(epoch=2, iteration=7) == expected
    for other in (numbers_in_epoch(epoch=3), numbers_in_epoch(epoch=2, seed=4)):
        assert all(a != b for a, b in zip(other, expected, strict=True))


def test_iteration_based_loop_is_not_seeded_by_epoch():
    seed_all(5)
    expected = draw()
    seed_all(5)
    assert numbers_in_epoch(loop=IterBasedTrainLoop) == expected


@pytest.mark.parametrize("seed", [None, 0, 3])
def test_missing_seed_is_warned_of(seed, caplog):
    runner = fake_runner()
    runner._randomness_cfg = {"seed": seed} if seed is not None else {}
    with caplog.at_level(logging.WARNING, logger="test_mm_resume"):
        ExactResumeHook().before_train(runner)
    assert [r.getMessage() for r in caplog.records] == (
        ["ExactResumeHook has no effect without randomness = dict(seed=…)"] if seed is None else []
    )


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("loop", [EpochBasedTrainLoop, IterBasedTrainLoop])
def test_persistent_workers_are_warned_of_where_they_matter(loop, persistent, caplog):
    with caplog.at_level(logging.WARNING, logger="test_mm_resume"):
        ExactResumeHook().before_train(fake_runner(loop=loop, persistent_workers=persistent))
    warned = any("persistent_workers to False" in r.getMessage() for r in caplog.records)
    assert warned == (persistent and loop is EpochBasedTrainLoop)


@pytest.mark.parametrize("loop", [EpochBasedTrainLoop, IterBasedTrainLoop])
def test_data_that_is_skipped_without_loading_it_is_warned_of(loop, caplog):
    with caplog.at_level(logging.WARNING, logger="test_mm_resume"):
        ExactResumeHook().before_train(fake_runner(loop=loop, skip_iter=None))
    warned = any("does not load again" in r.getMessage() for r in caplog.records)
    assert warned == (loop is IterBasedTrainLoop)


def test_hook_is_registered_and_runs_before_others():
    hook = HOOKS.build({"type": "ExactResumeHook"})
    assert type(hook) is ExactResumeHook and hook.priority == "VERY_HIGH"


@pytest.mark.skipif(
    hasattr(_InfiniteDataloaderIterator, "skip_iter"),
    reason="this mmengine does not load again what a resumed training has seen",
)
def test_resumed_training_ends_with_the_weights_of_one_that_was_not_interrupted(tmp_path):
    whole = run(tmp_path / "whole", 6).model.state_dict()
    run(tmp_path / "stopped", 2)
    resumed = run(tmp_path / "stopped", 6, resume=True).model.state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
