"""A detector that is trained by both frameworks' command lines: what differs between these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2_sample
import mmdet_sample


@dataclass
class Side:
    """A command line, and the files that it leaves.

    Without weight decay, which would move weights that have no gradient.
    """

    tool: str
    arguments: Callable[..., list[str]]  # of the sample's folder, the output folder, and flags
    halfway: str  # checkpoint of step 10 of 20
    final: str
    weights: str  # key of a checkpoint
    results: str

    def resume_from_halfway(self, whole: Path, output: Path) -> None:
        """Make a folder as a training that was stopped after step 10 leaves it."""
        output.mkdir()
        shutil.copy(whole / self.halfway, output)
        last = (whole / "last_checkpoint").read_text()  # a name in Detectron2, else a path
        last = last.replace(self.final, self.halfway).replace(str(whole), str(output))
        (output / "last_checkpoint").write_text(last)


def detectron2(config: str, **options: str) -> Side:
    return Side(
        "train_net.py",
        lambda sample, output, *flags: detectron2_sample.arguments(
            sample, output, *flags, config=config, **{"SOLVER.WEIGHT_DECAY": "0.0", **options}
        ),
        "model_0000009.pth",
        "model_final.pth",
        "model",
        "inference/coco_instances_results.json",
    )


def mmdetection(config: Path, **options: Any) -> Side:
    return Side(
        "train_mmdet.py",
        lambda sample, output, *flags: [
            str(config),
            *flags,
            *mmdet_sample.options(
                sample, output, "optim_wrapper.optimizer.weight_decay=0.0", **options
            ),
        ],
        "iter_10.pth",
        "iter_20.pth",
        "state_dict",
        "results.bbox.json",
    )


def losses(output: Path) -> list[float]:
    if (output / "metrics.json").exists():
        lines = (output / "metrics.json").read_text().splitlines()
        return [r["total_loss"] for r in map(json.loads, lines) if "total_loss" in r]
    return [record["loss"] for record in mmdet_sample.scalars(output) if "loss" in record]
