#!/usr/bin/env python
"""Does BatchFormer help the rare classes of a long tail?

    benchmarks/long_tail.py

draws train scenes with numbers of objects that fall geometrically over the classes, to 1/100, and
val scenes with equally frequent classes. tools/try_plugins.py trains MMDetection's Faster R-CNN
with and without BatchFormer over the regions, and a small Deformable DETR with and without
BatchFormerV2 in its encoder. AP of the frequent, the common and the rare classes is measured. Mean
and spread over the seeds go to benchmarks/results/long_tail.md and .json.

Started again, this goes on where it was stopped. 12 runs; two at a time (--jobs 2) take about an
hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import study  # noqa: E402
import try_plugins  # noqa: E402

from plugin_core.evaluation.context_bias import (  # noqa: E402
    average_precision,
    evaluate,
    load_detections,
    load_ground_truth,
)

CONFIGS = ROOT / "configs/mm/synthetic"
CLASSES = ("person", "disk", "square", "triangle", "star", "ring", "cross")
DATA = {"--train": 1000, "--val": 700, "--imbalance": 100, "--size": 128, "--seed": 0}
GROUPS = ("frequent", "common", "rare")


def schedule(steps: int) -> dict[str, Any]:
    return {
        "train_cfg.max_iters": steps,
        "param_scheduler.1.end": steps,
        "train_cfg.val_interval": steps,
        "param_scheduler.1.milestones": [steps * 3 // 4, steps * 11 // 12],
        "default_hooks.checkpoint.max_keep_ckpts": 1,
    }


# Plain, and half as wide
RCNN_OPTIONS = {
    "model.backbone.plugins": [],
    "model.backbone.stem_channels": 32,
    "model.backbone.base_channels": 32,
    "model.neck.in_channels": [32, 64, 128, 256],
    "model.neck.out_channels": 64,
    "model.rpn_head.in_channels": 64,
    "model.rpn_head.feat_channels": 64,
    "model.roi_head.bbox_roi_extractor.out_channels": 64,
    "model.roi_head.bbox_head.in_channels": 64,
    "model.roi_head.bbox_head.fc_out_channels": 256,
    "model.roi_head.bbox_head.num_classes": len(CLASSES),
    **schedule(800),
}
DETR_OPTIONS = {"model.bbox_head.num_classes": len(CLASSES), **schedule(1500)}
# Trial → its config, changes of the config, and the plugin
TRIALS: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "rcnn": ("faster-rcnn_r18-triplet_fpn_synthetic.py", RCNN_OPTIONS, "batchformer_v1"),
    "detr": (
        "deformable-detr-refine-twostage_r18_synthetic.py",
        DETR_OPTIONS,
        "batchformer_v2",
    ),
}
# Name of the detector → its trial and label there
DETECTORS = {
    "Faster R-CNN": ("rcnn", "plain"),
    "Faster R-CNN, BatchFormer": ("rcnn", "batchformer_v1"),
    "Deformable DETR": ("detr", "plain"),
    "Deformable DETR, BatchFormerV2": ("detr", "batchformer_v2"),
}

TEMPLATE = """# A long tail of classes, with and without BatchFormer

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes: the numbers of objects of the classes fall geometrically in train, and are equal in
val. MMDetection's Faster R-CNN with FPN (64 channels) and a small Deformable DETR (two-stage, with
refinement, two levels, 2 encoder and 2 decoder layers), both on a ResNet-18 of half the width, are
trained on 1000 images of 128 px in batches of 8, from random weights, {rcnn_steps} and {detr_steps}
steps, with BatchFormer or without on the same schedule and from the same weights but its own. It is
as in the papers (4 heads, dropout 0.5): over the regions of a batch, or as V2 after the first
encoder layer. In evaluation there is none. Box AP in percent (COCO, IoU 0.50:0.95) on 700 val
images: of all classes, of thirds of them by their number of train objects, each a mean over the
classes, and of each class. Mean and sample standard deviation over {seeds} seeds.

{classes}

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/long_tail"))
    study.draw(draw_command(args.work_dir))
    for name, (config, options, _) in TRIALS.items():
        of_data = data_options(args.work_dir)
        study.write_config(args.work_dir / f"{name}.py", CONFIGS / config, {**options, **of_data})
        try_plugins.main(trial_command(name, args)[1:])
    write(args)


def draw_command(work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / "coco", DATA)


def trial_command(name: str, args: argparse.Namespace) -> study.Command:
    config, out = args.work_dir / f"{name}.py", args.work_dir / f"trial_{name}"
    return study.trial_command(config, [TRIALS[name][2]], out, args)


def annotations(work_dir: Path, split: str) -> Path:
    return work_dir / "coco" / "annotations" / f"instances_{split}2017.json"


def data_options(work_dir: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"val_evaluator.ann_file": str(annotations(work_dir, "val"))}
    for part in ("train", "val"):
        options[f"{part}_dataloader.dataset.data_root"] = f"{work_dir / 'coco'}/"
        options[f"{part}_dataloader.dataset.metainfo.classes"] = CLASSES
    return options


def groups(content: Mapping[str, Any]) -> dict[int, str]:
    """Sort the classes into thirds by their numbers of objects, which may be 0: id → third.

    Args:
        content: annotations of the train images in COCO's format.
    """
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    ids = [category["id"] for category in content["categories"]]
    ranked = sorted(ids, key=lambda category_id: -counts[category_id])
    return {c: GROUPS[rank * len(GROUPS) // len(ranked)] for rank, c in enumerate(ranked)}


def measured(path: Path, truth: COCO, thirds: Mapping[int, str]) -> dict[str, float]:
    """Compute AP of all classes, of each third and of each class, in percent."""
    results = json.loads(path.read_text())
    detections = load_detections(truth, results)
    aps = {
        category_id: average_precision(
            evaluate(truth, detections, "bbox", category_id, truth.getImgIds())
        )
        for category_id in thirds
    }
    means = {
        f"AP {group}": statistics.mean(ap for c, ap in aps.items() if thirds[c] == group)
        for group in GROUPS
    }
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    each = {names[category_id]: ap for category_id, ap in aps.items()}
    return {"AP": statistics.mean(aps.values()), **means, **each}


def write(args: argparse.Namespace) -> None:
    """Write the table over the seeds, every run's numbers, and how to repeat them."""
    train, val = (json.loads(annotations(args.work_dir, s).read_text()) for s in ("train", "val"))
    third, truth = groups(train), load_ground_truth(val)
    detectors = {
        name: (args.work_dir / f"trial_{trial}", label)
        for name, (trial, label) in DETECTORS.items()
    }
    runs = study.measure_runs(detectors, lambda path: measured(path, truth, third), args)
    commands = [draw_command(args.work_dir), *(trial_command(name, args) for name in TRIALS)]
    headers = list(next(iter(next(iter(runs.values())).values())))
    study.write(
        args.results / "long_tail",
        TEMPLATE + study.TABLES,
        runs,
        headers,
        commands,
        classes=class_table(train, val),
        rcnn_steps=RCNN_OPTIONS["train_cfg.max_iters"],
        detr_steps=DETR_OPTIONS["train_cfg.max_iters"],
    )


def class_table(train: Mapping[str, Any], val: Mapping[str, Any]) -> str:
    third = groups(train)
    counts = [
        Counter(annotation["category_id"] for annotation in content["annotations"])
        for content in (train, val)
    ]
    names = {category["id"]: category["name"] for category in train["categories"]}
    rows = [[names[c], group, *(count[c] for count in counts)] for c, group in third.items()]
    return tabulate(rows, ["class", "third", "train objects", "val objects"], "github")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
