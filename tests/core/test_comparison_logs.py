"""Comparisons in other tools' logs: packages that are not installed are played by records."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from plugin_core.evaluation.comparison.logs import write_log
from plugin_core.evaluation.comparison.sections import Figure, Section

METRICS = {"plain": [{"AP": 30.0, "APs": float("nan")}, {"AP": 31.0}], "ida": [{"AP": 32.0}]}


@pytest.fixture
def sections() -> list[Section]:
    png = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(png, "PNG")
    return [Section("One", figures=[Figure("Precision / recall", png.getvalue())]), Section("Two")]


def test_wandb_has_a_run_for_each_detector_and_one_for_the_figures(monkeypatch, sections, tmp_path):
    logged: dict[str, list[Any]] = {}

    def init(*, name: str, project: str, group: str, dir: str) -> Any:
        assert (project, group, dir) == ("compare_detectors", tmp_path.name, str(tmp_path))
        calls = logged.setdefault(name, [])
        return SimpleNamespace(
            log=lambda values, step=None: calls.append((values, step)),
            finish=lambda: calls.append("finished"),
        )

    wandb = SimpleNamespace(init=init, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_log("wandb", tmp_path, METRICS, sections)
    assert logged == {
        "plain": [({"AP": 30.0}, 0), ({"AP": 31.0}, 1), "finished"],
        "ida": [({"AP": 32.0}, 0), "finished"],
        "report": [({"Precision / recall": (4, 3)}, None), "finished"],
    }


def test_mlflow_has_a_run_for_each_detector_and_one_for_the_figures(
    monkeypatch, sections, tmp_path
):
    logged: list[Any] = []

    @contextmanager
    def start_run(run_name: str) -> Any:
        logged.append(run_name)
        yield

    mlflow = SimpleNamespace(
        set_experiment=logged.append,
        start_run=start_run,
        log_metrics=lambda values, step: logged.append((values, step)),
        log_image=lambda picture, name: logged.append((picture.size, name)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    write_log("mlflow", tmp_path, METRICS, sections)
    assert logged == [
        tmp_path.name,
        *("plain", ({"AP": 30.0}, 0), ({"AP": 31.0}, 1)),
        *("ida", ({"AP": 32.0}, 0)),
        *("report", ((4, 3), "01-Precision - recall.png")),
    ]


def test_tensorboard_has_the_figures(sections, tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_log("tensorboard", tmp_path, METRICS, sections)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard/report")).Reload()
    (tag,) = events.Tags()["images"]
    assert tag.startswith("Precision")
