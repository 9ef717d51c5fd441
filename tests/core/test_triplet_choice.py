"""Which passes a device gets: kernels that are right and faster, or PyTorch's operators."""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from plugin_core.kernels import triplet_choice
from plugin_core.kernels.triplet_choice import chosen, failure_of
from plugin_core.kernels.triplet_torch import TorchPasses, wide_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Fast(TorchPasses):
    """Passes that are faster than PyTorch's operators on a map of a detector's size."""

    def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
        if x.shape == triplet_choice._CHECKED_SHAPE:
            return super().pool(x, indices)
        return [], []

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        if x.shape == triplet_choice._CHECKED_SHAPE:
            super().scale(x, gates, y)

    def input_gradient(self, g: Tensor, *maps: list[Tensor]) -> Tensor:
        return super().input_gradient(g, *maps) if maps[2] else g


class Slow(TorchPasses):
    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        time.sleep(0.01)
        return super().product(g, x)


class Failing(TorchPasses):
    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


class FailingOnLargeMaps(TorchPasses):
    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        if x.shape == triplet_choice._TIMED_SHAPE:
            raise RuntimeError("out of resource")
        return super().product(g, x)


class Differing(TorchPasses):
    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        return [s + 1 for s in super().product(g, x)]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As if no device had been seen yet."""
    monkeypatch.delenv("PLUGIN_KERNELS", raising=False)
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    monkeypatch.setattr(triplet_choice, "_FULL", set())
    monkeypatch.setenv("DETECTION_PLUGINS_CACHE", str(tmp_path))
    monkeypatch.setattr(triplet_choice, "_TIMED_SHAPE", (1, 8, 12, 16))
    monkeypatch.setattr(triplet_choice, "_ROUNDS", 2)
    triplet_choice._warn_once.cache_clear()
    yield
    triplet_choice._warn_once.cache_clear()


# ------------------------------------------------------------------------------------ whether right


class Exact(TorchPasses):
    """One rounding at the end, as kernels have."""

    def scale(self, x: Tensor, gates: list[Tensor], y: Tensor) -> None:
        exact = torch.empty_like(x, dtype=torch.float64)
        super().scale(x.double(), gates, exact)
        y.copy_(exact)

    def product(self, g: Tensor, x: Tensor) -> list[Tensor]:
        return [s.to(wide_of(x)) for s in super().product(g.double(), x.double())]

    def input_gradient(self, g: Tensor, *maps: list[Tensor]) -> Tensor:
        return super().input_gradient(g.double(), *maps).to(g.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_passes_what_is_right(dtype):
    assert failure_of(Exact(), CPU, dtype) is None


@pytest.mark.parametrize("name", ["pool", "scale", "product", "input_gradient"])
def test_check_names_the_pass_that_differs(name, monkeypatch):
    class Wrong(TorchPasses):
        pass

    def wrong(self: Wrong, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        first = first.clone()
        first[-1, -1, -1, -1] += 1
        return getattr(TorchPasses, name)(self, first, *args, **kwargs)

    monkeypatch.setattr(Wrong, name, wrong, raising=False)
    reason = failure_of(Wrong(), CPU, torch.float32)
    assert reason is not None and f"{name} differs" in reason


def test_check_tells_which_index_of_equal_maxima_is_right():
    class Last(TorchPasses):
        def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
            maps, at = super().pool(x, indices)
            if indices:
                at[0] = x.shape[3] - 1 - x.flip(3).max(3).indices.int()
            return maps, at

    reason = failure_of(Last(), CPU, torch.float32)
    assert reason is not None and "pool's indices differs" in reason


# ----------------------------------------------------------------------------------- which is taken


def test_faster_kernels_are_taken_and_both_times_logged(caplog):
    fast = Fast()
    with caplog.at_level(logging.INFO, logger="plugin_core"):
        assert chosen(CPU, torch.float32, lambda: fast) is fast
        assert chosen(CPU, torch.float32, lambda: pytest.fail("asked again")) is fast
    (line,) = [record.getMessage() for record in caplog.records]
    assert "float32" in line and "the kernels are used" in line and line.count(" ms") == 2


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (Slow(), r"the kernels take .* ms on cpu, .*, PyTorch's operators .* ms"),
        (Failing(), r"the kernels fail on cpu \(RuntimeError: Failed to find C compiler\.\)"),
        (Differing(), "product differs from PyTorch's result"),
        (FailingOnLargeMaps(), r"the kernels fail on cpu \(RuntimeError: out of resource\)"),
        ("Triton is not installed", "Triton is not installed"),
    ],
    ids=["slow", "failing", "differing", "failing on large maps", "missing"],
)
def test_other_kernels_are_left_with_one_warning(passes, reason):
    with pytest.warns(UserWarning, match=f"PyTorch's operators are used, as .*{reason}"):
        assert chosen(CPU, torch.float32, lambda: passes) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(CPU, torch.float32, lambda: passes) is None


def test_fast_forces_what_is_right_and_names_what_is_not(monkeypatch):
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    slow = Slow()
    assert chosen(CPU, torch.float32, lambda: slow) is slow
    with pytest.raises(RuntimeError, match="PLUGIN_KERNELS=fast: .*product differs"):
        chosen(CPU, torch.float64, Differing)
    monkeypatch.setenv("PLUGIN_KERNELS", "auto")
    with pytest.warns(UserWarning, match="the kernels take"):
        assert chosen(CPU, torch.float32, lambda: slow) is None


def test_graph_does_not_capture_the_measurement(monkeypatch):
    fast, capturing = Fast(), [True, False]
    monkeypatch.setattr(triplet_choice, "_is_capturing", lambda device: capturing.pop(0))
    assert chosen(CPU, torch.float32, lambda: fast) is None and triplet_choice._CHOSEN == {}
    assert chosen(CPU, torch.float32, lambda: fast) is fast
    assert chosen(CPU, torch.float32, lambda: fast) is fast  # nobody asks again
    monkeypatch.setattr(triplet_choice, "_is_capturing", lambda device: True)
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    assert chosen(CPU, torch.float32, lambda: fast) is fast  # unchecked


def test_full_gpu_says_nothing_about_the_kernels_and_is_asked_twice(monkeypatch):
    class Full(TorchPasses):
        def pool(self, x: Tensor, indices: bool) -> tuple[list[Tensor], list[Tensor]]:
            raise torch.cuda.OutOfMemoryError

    fast = Fast()
    assert chosen(CPU, torch.float32, Full) is None
    assert chosen(CPU, torch.float32, lambda: fast) is fast
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    with pytest.warns(UserWarning, match="cpu had no room to compare the kernels"):
        assert chosen(CPU, torch.float32, Full) is None
    assert chosen(CPU, torch.float32, lambda: pytest.fail("asked again")) is None
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        chosen(CPU, torch.float32, Full)


# --------------------------------------------------------------------------------- what is kept


def test_choice_is_kept_for_other_processes_by_device_dtype_and_versions(tmp_path, monkeypatch):
    fast = Fast()
    chosen(CPU, torch.float32, lambda: fast)
    known = json.loads((tmp_path / "kernels.json").read_text())
    (name,) = known
    assert name.startswith(f"cpu, float32, torch {torch.__version__}, triton ")
    # As another process, to which these kernels seem slow
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    monkeypatch.setattr(triplet_choice, "_measured", lambda *args: pytest.fail("measured again"))
    assert chosen(CPU, torch.float32, lambda: fast) is fast
    known[name] = {"kernels": 2.0, "operators": 1.0}
    (tmp_path / "kernels.json").write_text(json.dumps(known))
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    with pytest.warns(UserWarning, match="the kernels take 2e"):
        assert chosen(CPU, torch.float32, lambda: fast) is None


def choose_as_a_process(operators: float, answers: Any) -> None:
    def measured(*args: Any) -> dict[str, float]:
        answers.put("measured")
        time.sleep(0.3)
        return {"kernels": 1.0, "operators": operators}

    triplet_choice._measured = measured
    warnings.simplefilter("ignore")
    taken = chosen(CPU, torch.float32, TorchPasses)
    answers.put("operators" if taken is None else "kernels")


def test_processes_of_one_machine_take_the_same_choice():
    """One measures, and the others wait for it, though they would measure something else."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [
        context.Process(target=choose_as_a_process, args=(operators, answers))
        for operators in (0.5, 2.0, 0.5)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in range(4)]
    for process in processes:
        process.join()
    assert found.count("measured") == 1
    assert found.count("kernels") in (0, 3) and found.count("operators") in (0, 3)


def test_folder_that_cannot_be_written_to_leaves_a_process_alone_with_its_measurement(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DETECTION_PLUGINS_CACHE", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_text("")
    fast = Fast()
    assert chosen(CPU, torch.float32, lambda: fast) is fast
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    with pytest.warns(UserWarning, match="several processes cannot agree"):
        assert chosen(CPU, torch.float32, lambda: fast) is None


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"NAME": {}}', '{"NAME": {"kernels": "?"}}'])
def test_broken_file_is_measured_anew(text, tmp_path):
    fast = Fast()
    name = triplet_choice._name(CPU, torch.float32, fast)
    (tmp_path / "kernels.json").write_text(text.replace("NAME", name))
    assert chosen(CPU, torch.float32, lambda: fast) is fast
    assert json.loads((tmp_path / "kernels.json").read_text())[name].keys() > {"kernels"}


def test_kernels_that_won_elsewhere_are_left_where_they_fail(tmp_path):
    name = triplet_choice._name(CPU, torch.float32, Failing())
    won = {"kernels": 1.0, "operators": 2.0}
    (tmp_path / "kernels.json").write_text(json.dumps({name: won}))
    with pytest.warns(UserWarning, match="the kernels fail on cpu"):
        assert chosen(CPU, torch.float32, Failing) is None
