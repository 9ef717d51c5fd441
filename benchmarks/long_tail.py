#!/usr/bin/env python
"""Does BatchFormer help the rare classes of a long tail?

    benchmarks/long_tail.py

draws train scenes with numbers of objects that fall geometrically over the classes, to 1/100, and
val scenes with equally frequent classes. It trains MMDetection's Faster R-CNN with and without
BatchFormer over the regions, and a small Deformable DETR with and without BatchFormerV2 in its
encoder, from several seeds. It measures AP of the frequent, the common and the rare classes. Mean
and spread over the seeds go to benchmarks/results/long_tail.md and .json.

Complete runs are kept: started again, this goes on where it was stopped. 12 runs; two at a time
(--jobs 2) take about an hour on 2 CPU cores.
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
from study import folder  # noqa: E402

from plugin_core.evaluation.context_bias import (  # noqa: E402
    average_precision,
    evaluate,
    load_detections,
    load_ground_truth,
)

RESULTS = Path("benchmarks/results")
CONFIGS = "configs/mm/synthetic"
CLASSES = ("person", "disk", "square", "triangle", "star", "ring", "cross")
DATA = {"--train": 1000, "--val": 700, "--imbalance": 100, "--size": 128, "--seed": 0}
GROUPS = ("frequent", "common", "rare")


def schedule(steps: int) -> dict[str, Any]:
    return {
        "train_cfg.max_iters": steps,
        "param_scheduler.1.end": steps,
        "param_scheduler.1.milestones": f"[{steps * 3 // 4},{steps * 11 // 12}]",
    }


RCNN = "faster-rcnn_r18-triplet_fpn_synthetic.py"
# Plain, and half as wide
RCNN_OPTIONS = {
    "model.backbone.plugins": "[]",
    "model.backbone.stem_channels": 32,
    "model.backbone.base_channels": 32,
    "model.neck.in_channels": "[32,64,128,256]",
    "model.neck.out_channels": 64,
    "model.rpn_head.in_channels": 64,
    "model.rpn_head.feat_channels": 64,
    "model.roi_head.bbox_roi_extractor.out_channels": 64,
    "model.roi_head.bbox_head.in_channels": 64,
    "model.roi_head.bbox_head.fc_out_channels": 256,
    "model.roi_head.bbox_head.num_classes": len(CLASSES),
    **schedule(800),
}
V1 = {"model.roi_head.bbox_head.type": "BatchFormerBBoxHead"}
DETR = "deformable-detr-refine-twostage_r18_synthetic.py"
DETR_V2 = "deformable-detr-refine-twostage_r18-batchformer_synthetic.py"
DETR_OPTIONS = {"model.bbox_head.num_classes": len(CLASSES), **schedule(1500)}
# Name of the detector → its config, and changes of the config on the command line
DETECTORS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Faster R-CNN": (RCNN, RCNN_OPTIONS),
    "Faster R-CNN, BatchFormer": (RCNN, {**RCNN_OPTIONS, **V1}),
    "Deformable DETR": (DETR, DETR_OPTIONS),
    "Deformable DETR, BatchFormerV2": (DETR_V2, DETR_OPTIONS),
}
# Evaluation is a command of its own
TRAIN_ONLY = {"train_cfg.val_begin": 100000, "default_hooks.checkpoint.max_keep_ckpts": 1}

TEMPLATE = """# A long tail of classes, with and without BatchFormer

`{command}` wrote this, but for the last section. {machine}.

Drawn scenes: the numbers of objects of the classes fall geometrically in train, and are equal in
val. MMDetection's Faster R-CNN with FPN (64 channels) and a small Deformable DETR (two-stage, with
refinement, two levels, 2 encoder and 2 decoder layers), both on a ResNet-18 of half the width, are
trained on 1000 images of 128 px in batches of 8, from random weights, {rcnn_steps} and {detr_steps}
steps, with BatchFormer or without on the same schedule. It is as in the papers (4 heads, dropout
0.5): over the regions of a batch, or as V2 after the first encoder layer. In evaluation there is
none. Box AP in percent (COCO, IoU 0.50:0.95) on 700 val images: of all classes, of thirds of them
by their number of train objects, each a mean over the classes, and of each class. Mean and sample
standard deviation over {seeds} seeds.

{classes}

{table}

Every run:

{single}

## Commands

The first seed's; another differs in `randomness.seed` and the folder.

```
{commands}
```

"""


def main() -> None:
    args = study.parse_args(__doc__, Path("work_dirs/long_tail"))
    study.draw(draw_command(args.work_dir))
    study.run_all(DETECTORS, steps, args)
    write(args)


def draw_command(work_dir: Path) -> study.Command:
    return study.draw_command(work_dir / "coco", DATA)


def annotations(work_dir: Path, split: str) -> Path:
    return work_dir / "coco" / "annotations" / f"instances_{split}2017.json"


def steps(name: str, seed: int, work_dir: Path) -> list[tuple[study.Command, Path]]:
    """List training and evaluation apart: MMDetection does not evaluate a finished training."""
    config, options = DETECTORS[name]
    out = folder(work_dir, name, seed)
    checkpoint = out / f"iter_{options['train_cfg.max_iters']}.pth"
    detections = out / "val.bbox.json"
    train = {**data_options(work_dir, "train", "val"), "randomness.seed": seed, **TRAIN_ONLY}
    test = {**data_options(work_dir, "test"), "test_evaluator.outfile_prefix": out / "val"}
    return [
        # A finished training ends at once when it is resumed. A checkpoint may be half written.
        (command("train", config, "--resume", out, {**options, **train}), detections),
        (command("test", config, checkpoint, out, {**options, **test}), detections),
    ]


def command(
    tool: str, config: str, argument: str | Path, out: Path, options: Mapping[str, Any]
) -> study.Command:
    pairs = [f"{key}={value}" for key, value in options.items()]
    words = [
        f"tools/{tool}_mmdet.py",
        f"{CONFIGS}/{config}",
        argument,
        "--work-dir",
        out,
        "--cfg-options",
        *pairs,
    ]
    return [str(word) for word in words]


def data_options(work_dir: Path, *parts: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in parts:
        options[f"{part}_dataloader.dataset.data_root"] = f"{work_dir / 'coco'}/"
        options[f"{part}_dataloader.dataset.metainfo.classes"] = f"[{','.join(CLASSES)}]"
        if part != "train":
            options[f"{part}_evaluator.ann_file"] = annotations(work_dir, "val")
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


def measured(
    name: str, seed: int, truth: COCO, thirds: Mapping[int, str], work_dir: Path
) -> dict[str, float]:
    """Compute AP of all classes, of each third and of each class, in percent."""
    results = json.loads((folder(work_dir, name, seed) / "val.bbox.json").read_text())
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
    runs = {
        name: {seed: measured(name, seed, truth, third, args.work_dir) for seed in args.seeds}
        for name in DETECTORS
    }
    commands = [draw_command(args.work_dir)]
    for name in DETECTORS:
        commands += [command for command, _ in steps(name, args.seeds[0], args.work_dir)]
    headers = list(next(iter(next(iter(runs.values())).values())))
    study.write(
        RESULTS / "long_tail",
        TEMPLATE,
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
