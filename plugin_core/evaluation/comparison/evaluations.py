"""The frameworks' own evaluations of checkpoints: run as processes, kept for the next time."""

from __future__ import annotations

import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from plugin_core.files import file_state, make_folder, write_text
from plugin_core.inspection.config_kinds import FRAMEWORKS, side_of
from plugin_core.processes import LocalLauncher, tail
from plugin_core.training.errors import RunError

# A config of either framework, then what is behind its colon
_CONFIG = re.compile(r"(.+?\.(?:yaml|yml|py)):(.+)")
# "Inference done 11/58" of Detectron2; "Epoch(test) [11/58]" or "Iter(test) …" of MMDetection
_PROGRESS = re.compile(r"(?:Inference done |(?:Epoch|Iter)\(test\)\s*\[\s*)(\d+)/(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A trained detector: its config, and the path or address of its weights."""

    config: str
    weights: str


@dataclass(frozen=True)
class GroundTruth:
    """What detectors are evaluated on: a COCO-format file and the folder of its images."""

    annotations: str
    images: str


@dataclass(frozen=True)
class Evaluation:
    """A framework's own evaluation of a checkpoint.

    Args:
        command: words that run it.
        results: the file of detections that it leaves.
        content: of the config, as a text that differs between configs that differ.
        files: what it reads, to be written first: functions that give the texts.
    """

    command: Sequence[str]
    results: Path
    content: str
    files: Mapping[Path, Callable[[], str]] = field(default_factory=dict)


def read_seeds(files: Mapping[str, Sequence[str]]) -> dict[str, list[str | Checkpoint]]:
    """Tell checkpoints from results files.

    Args:
        files: of each detector, as :func:`named_files` gives them: ``CONFIG:WEIGHTS``, more weights
            of the same config after it, or results files, which end in ".json".

    Raises:
        ValueError: if a config or a checkpoint is missing, or one is given twice.
    """
    seeds: dict[str, list[str | Checkpoint]] = {}
    for name, listed in files.items():
        config = ""
        for file in listed:
            found = _CONFIG.fullmatch(file)
            config = found[1] if found else config
            if config and (found or not file.endswith(".json")):
                seed: str | Checkpoint = _checked(
                    found[2] if found else file, config, f"--detector {name}"
                )
            elif file.endswith((".yaml", ".yml", ".py", ".pth", ".pkl")):
                raise ValueError(
                    f"--detector {name}: {file} is neither results (.json) nor CONFIG:WEIGHTS"
                )
            else:
                seed = file
            if seed in seeds.setdefault(name, []):
                raise ValueError(f"--detector {name}: {file} is given twice; it is one seed")
            seeds[name].append(seed)
    return seeds


def read_models(
    configs: Sequence[str], seeds: Mapping[str, Sequence[str | Checkpoint]]
) -> dict[str, Checkpoint]:
    """Find the model of each detector: its first checkpoint, or what is given for its results.

    Args:
        configs: each ``NAME=CONFIG`` or ``NAME=CONFIG:WEIGHTS``.
        seeds: as :func:`read_seeds` gives them.

    Returns:
        The models of those detectors that have one; empty weights for a config alone.

    Raises:
        ValueError: if a config is of no detector, or of one that has a config, or files are
            missing.
    """
    given: dict[str, Checkpoint] = {}
    for text in configs:
        name, _, value = text.partition("=")
        name = name.strip()
        if name not in seeds:
            raise ValueError(f"--config {text}: no --detector is called {name!r}")
        if name in given or any(isinstance(seed, Checkpoint) for seed in seeds[name]):
            raise ValueError(f"--config {name}: the detector has a config already")
        found = _CONFIG.fullmatch(value)
        config, weights = (found[1], found[2]) if found else (value, "")
        given[name] = _checked(weights, config, f"--config {name}")
    models = {}
    for name, listed in seeds.items():
        checkpoints = [seed for seed in listed if isinstance(seed, Checkpoint)]
        if name in given or checkpoints:
            models[name] = given[name] if name in given else checkpoints[0]
    return models


def _checked(weights: str, config: str, option: str) -> Checkpoint:
    try:
        side_of(config)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    path = weights.partition("?")[0]  # Detectron2's options for loading follow
    if path and "://" not in path and not os.path.isfile(path):
        raise ValueError(f"{option}: there is no checkpoint {path!r}")
    return Checkpoint(config, weights)


class Task:
    """The evaluation of one seed of a detector, in a folder of its own.

    Args:
        name: of the detector.
        number: of the seed, from 0.
        checkpoint: to evaluate.
        truth: to evaluate it on.
        iou_type: "bbox", "segm" or "keypoints"; what results are for.
        out: folder of the comparison.

    Raises:
        ValueError: if the config cannot be evaluated like this.
    """

    def __init__(
        self,
        name: str,
        number: int,
        checkpoint: Checkpoint,
        truth: GroundTruth,
        iou_type: str,
        out: Path,
    ) -> None:
        self.name = f"{name}-seed{number}"
        self.iou_type = iou_type
        self.folder = (out / "evaluations" / quote(self.name, safe=" +,@()")).absolute()
        side = side_of(checkpoint.config)
        try:
            framework = importlib.import_module(f"{side}.evaluation_runs")
            self.evaluation: Evaluation = framework.prepare_evaluation(
                checkpoint, truth, self.folder, iou_type
            )
        except ImportError as error:
            reason = f"needs {FRAMEWORKS[side]}: {error}"
            raise ValueError(f"--detector {name}: {checkpoint.config}: {reason}") from error
        except ValueError as error:
            raise ValueError(f"--detector {name}: {checkpoint.config}: {error}") from error
        self._request = {
            "config": checkpoint.config,
            "content": self.evaluation.content,
            "weights": _state(checkpoint.weights),
            "annotations": _state(truth.annotations),
            "images": os.path.abspath(truth.images),
        }

    @property
    def results(self) -> str:
        return str(self.evaluation.results)

    @property
    def log(self) -> Path:
        return self.folder / "output.txt"

    def is_done(self) -> bool:
        """Tell whether the same evaluation has left its results here."""
        try:
            marker = json.loads((self.folder / "evaluated.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return marker == self._request and self.evaluation.results.is_file()

    def run(self) -> None:
        """Evaluate, showing the images that are done; raises RunError if it fails."""
        make_folder("--out", self.folder)
        for path in (self.folder / "evaluated.json", self.evaluation.results, self.log):
            path.unlink(missing_ok=True)
        for path, text in self.evaluation.files.items():
            write_text(path, text())
        launcher = LocalLauncher(alone=True)
        process = launcher.start(self.evaluation.command, self.log, 0)
        try:
            with tqdm(desc=self.name, unit="batch", mininterval=1) as bar:
                while process.poll() is None:
                    time.sleep(0.2)
                    done = _PROGRESS.findall(tail(self.log, 30))
                    if done:
                        bar.total = int(done[-1][1])
                        bar.update(max(0, int(done[-1][0]) - bar.n))
        finally:
            launcher.stop([process])
        if process.returncode:
            raise RunError(f"{self.name}: its evaluation failed:\n{tail(self.log)}\nsee {self.log}")
        if not self.evaluation.results.is_file():
            raise RunError(
                f"{self.name}: its evaluation has left no results for --iou-type {self.iou_type}; "
                f"see {self.log}"
            )
        write_text(self.folder / "evaluated.json", json.dumps(self._request))


def _state(path: str) -> list[Any]:
    """Tell a file from others, and from itself before a change."""
    local = path.partition("?")[0]
    if not os.path.isfile(local):  # an address
        return [path]
    return [os.path.abspath(local), path.partition("?")[2], *file_state(local)]


def run_all(tasks: Sequence[Task]) -> None:
    """Run what has no results of an earlier time; raises RunError for the first that fails."""
    for number, task in enumerate(tasks, 1):
        if task.is_done():
            print(f"{task.name}: evaluated before; the results are those of {task.results}")
            continue
        print(f"{task.name}: evaluating, {number} of {len(tasks)}; log: {task.log}", flush=True)
        task.run()
