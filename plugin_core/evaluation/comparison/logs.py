"""A comparison in the logs of TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

import importlib
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plugin_core.evaluation.comparison.sections import Figure, Section

LOGS = ("tensorboard", "wandb", "mlflow")  # which their packages are called, too
_REPORT = "report"  # the run that has the figures, which are of all detectors


def check_log(log: str) -> None:
    """Check that a log's package is installed; raises ValueError."""
    try:
        importlib.import_module(log)
    except ImportError as error:
        raise ValueError(f"--log {log}: is not installed: pip install {log}") from error


def write_log(
    log: str,
    folder: Path,
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
    sections: Sequence[Section],
) -> None:
    """Log each detector as a run with its metrics, a step for each seed, and the figures as one.

    Args:
        log: one of ``LOGS``.
        folder: of the comparison. TensorBoard's and Weights & Biases' files go below it; MLflow has
            its own place, which MLFLOW_TRACKING_URI names.
        metrics: of each seed, in percent, by the detectors' names; NaN is left out.
        sections: of the report.
    """
    figures = [figure for section in sections for figure in section.figures]
    _WRITERS[log](folder, {n: [_finite(m) for m in seeds] for n, seeds in metrics.items()}, figures)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


_Metrics = Mapping[str, Sequence[Mapping[str, float]]]


def _to_tensorboard(folder: Path, metrics: _Metrics, figures: Sequence[Figure]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # of an earlier comparison
    for name, seeds in metrics.items():
        with SummaryWriter(str(folder / "tensorboard" / _as_folder(name))) as writer:
            for step, values in enumerate(seeds):
                for metric, value in values.items():
                    writer.add_scalar(metric, value, step)
    with SummaryWriter(str(folder / "tensorboard" / _REPORT)) as writer:
        for figure in figures:
            pixels = np.asarray(_picture(figure))
            writer.add_image(figure.title, pixels, dataformats="HWC")


def _to_wandb(folder: Path, metrics: _Metrics, figures: Sequence[Figure]) -> None:
    wandb: Any = importlib.import_module("wandb")
    settings = {"project": "compare_detectors", "group": folder.absolute().name, "dir": str(folder)}
    for name, seeds in metrics.items():
        run = wandb.init(name=name, **settings)
        for step, values in enumerate(seeds):
            run.log(dict(values), step=step)
        run.finish()
    run = wandb.init(name=_REPORT, **settings)
    run.log({figure.title: wandb.Image(_picture(figure)) for figure in figures})
    run.finish()


def _to_mlflow(folder: Path, metrics: _Metrics, figures: Sequence[Figure]) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(folder.absolute().name)
    for name, seeds in metrics.items():
        with mlflow.start_run(run_name=name):
            for step, values in enumerate(seeds):
                mlflow.log_metrics(dict(values), step=step)
    with mlflow.start_run(run_name=_REPORT):
        for number, figure in enumerate(figures, 1):
            mlflow.log_image(_picture(figure), f"{number:02}-{_as_folder(figure.title)}.png")


_WRITERS: dict[str, Callable[[Path, _Metrics, Sequence[Figure]], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "mlflow": _to_mlflow,
}


def _as_folder(name: str) -> str:
    return name.replace("/", "-")


def _picture(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(figure.png)).convert("RGB")
