#!/usr/bin/env python
"""Does triplet attention help a small detector? Ask it of drawn scenes, in both frameworks.

The demo draws a small COCO-format dataset. In each framework tools/try_plugins.py trains a Faster
R-CNN on it, plain and with triplet attention, with two processes of one thread each. The report of
tools/compare_detectors.py says whether the difference is real. The demo ends with a table, and
draws detections on val images. Everything is written below work_dirs/demo. It takes about 12
minutes on 2 CPU cores, and goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tabulate import tabulate

from plugin_core.evaluation.coco_files import Source
from plugin_core.evaluation.comparison.accuracy import accuracy
from plugin_core.evaluation.comparison.detections import Truth
from plugin_core.evaluation.comparison.inputs import read_detector, read_truth
from plugin_core.evaluation.comparison.pictures import IOU, draw
from plugin_core.files import make_folder

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("work_dirs/demo")
SCENES = OUT / "scenes"  # the config of MMDetection names it, too
DRAW = (
    *("tools/make_synthetic_coco.py", str(SCENES), "--train", "400", "--val", "100"),
    *("--size", "128", "--classes", "4", "--class-colors"),
)
REGISTER = [
    word
    for part in ("train", "val")
    for word in (
        "--register-coco",
        f"synthetic_{part}",
        f"{SCENES}/annotations/instances_{part}2017.json",
        f"{SCENES}/{part}2017",
    )
]
PICTURES = 8
SCORE = 0.5  # least score of a drawn detection


@dataclass(frozen=True)
class Trial:
    """A framework's use of tools/try_plugins.py."""

    framework: str
    config: str
    data: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return OUT / f"try_{self.framework.lower()}"

    @property
    def command(self) -> list[str]:
        return [
            *("tools/try_plugins.py", self.config, *self.data, "--with", "triplet_attention"),
            *("--seeds", "1", "--jobs", "2", "--out", str(self.folder)),
        ]


TRIALS = (
    Trial("Detectron2", "configs/d2/Synthetic-Detection/faster_rcnn_R_18_FPN_demo.yaml", REGISTER),
    Trial("MMDetection", "configs/mm/synthetic/faster-rcnn_r18_fpn_demo.py"),
)


def main() -> None:
    start = time.monotonic()
    say("1/4  drawing 400 train and 100 val images")
    if SCENES.is_dir():
        print(f"{SCENES} is there")
    else:
        run(DRAW)
    for number, trial in enumerate(TRIALS, start=2):
        say(f"{number}/4  {trial.framework}: training plain and with triplet attention, comparing")
        run(trial.command)
    say("4/4  drawing ground truth and detections")
    rows = [row for trial in TRIALS for row in finish(trial)]
    table = tabulate(rows, HEADERS, "github", floatfmt=FORMATS, intfmt=",")
    (OUT / "results.md").write_text(f"{table}\n", encoding="utf-8")
    print(f"\n{table}\n\nBox AP in percent on 100 val images. s/step: median, one thread.")
    for trial in TRIALS:
        print(f"{trial.framework}: is the difference real? {trial.folder}/comparison/report.html")
        print(f"{trial.framework}: ground truth and detections: {trial.folder}/pictures/")
    print(f"This run of the demo took {(time.monotonic() - start) / 60:.1f} minutes.")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(command: Sequence[str]) -> None:
    """Run a command of this project as a user would type it."""
    print("$", shlex.join(command), flush=True)
    # Which the frameworks' own imports bring about in every process
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:pkg_resources is deprecated"}
    code = subprocess.run([sys.executable, *command], check=False, env=environment).returncode
    if code:
        sys.exit(f"failed: {command[0]}, see above; the same command goes on (without {OUT}: anew)")


HEADERS = ("framework", "detector", "parameters", "s/step", "AP", "AP50")
FORMATS = ("", "", "", ".2f", ".1f", ".1f")


def finish(trial: Trial) -> list[list[Any]]:
    """Draw what a trial's detectors found; returns the rows of the table."""
    plan = json.loads((trial.folder / "plan.json").read_text(encoding="utf-8"))
    annotations = Source("annotations", plan["annotations"])
    content = read_truth(annotations, "bbox")
    truth = Truth(content, "bbox")
    rows, names, found = [], [], []
    for one in plan["runs"]:
        label, file = one["label"], str(trial.folder / one["results"])
        detections = read_detector(label, [file], truth, content, annotations).seeds[0]
        metrics = accuracy(detections).metrics
        parameters, seconds = plan["parameters"][label], one["finished"]["seconds_a_step"]
        name = label.replace("_", " ")
        names.append(name)
        found.append(detections)
        rows.append([trial.framework, name, parameters, seconds, metrics["AP"], metrics["AP50"]])
    make_folder("--out", trial.folder / "pictures")
    matches = [detections.match(IOU, score_threshold=SCORE) for detections in found]
    for index, image in enumerate(truth.images[:PICTURES]):
        with Image.open(SCENES / "val2017" / image["file_name"]) as picture:
            png = draw(picture.convert("RGB"), found, matches, names, index)
        name = Path(image["file_name"]).with_suffix(".png")
        (trial.folder / "pictures" / name).write_bytes(png)
    return rows


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
