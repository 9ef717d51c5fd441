#!/usr/bin/env python
"""Does IDA classify images of several labels better than a linear head, on small real data?

    benchmarks/multi_label.py chess/ resnet18.pth

trains a ResNet-18 of ImageNet with MMPretrain's linear multi-label head over the mean of its last
map, and with IDA's head on the map itself. The data is a folder with train.json, val.json and
test.json in COCO's format and images/. The weights are in torchvision's names. Mean and spread over
the seeds go to benchmarks/results/multi_label.md and .json.

Started again, this goes on where it was stopped. 6 runs take about 25 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "benchmarks")]

import study  # noqa: E402

from mm_plugins.mmpretrain.coco_multi_label import CocoMultiLabel  # noqa: E402

CONFIG = ROOT / "benchmarks" / "real_data" / "resnet18_multi-label.py"
CHANNELS = 512
# Name of the classifier → settings of its model
CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    "linear head": {
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "MultiLabelLinearClsHead"},
    },
    "IDA head": {"head": {"type": "IDAClsHead"}},
}
METRICS = ("mAP", "CF1", "OF1")

TEMPLATE = """# Several labels in an image, with IDA's head and a linear one

`{command}` wrote this, but for the last section. {machine}.

{data}: {numbers} images for training, validation and test, and {classes} classes. A ResNet-18 with
ImageNet's weights is trained for {epochs} epochs of batches of 16 at {size}×{size}, with Adam at up
to 3e-4 (OneCycle), a cutout of half the width and RandAugment. MMPretrain's
`MultiLabelLinearClsHead` classifies the mean of the last map, `IDAClsHead` (light, 4 heads) the map
itself. Both use binary cross entropy. Nothing was chosen by results, so validation and test images
are evaluated together, after the last epoch. Percent, mean and sample standard deviation over
{seeds} seeds.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="ImageNet ResNet-18")
    parser.add_argument("--seeds", type=int, default=3, help="of each classifier (default: 3)")
    parser.add_argument("--epochs", type=int, help="of each training, for a try")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/multi_label"))
    args = parser.parse_args()
    args.results = args.work_dir if args.epochs else Path("benchmarks/results")
    try:
        options = base_options(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    runs: dict[str, dict[int, dict[str, float]]] = {}
    commands = []
    for seed in range(args.seeds):
        for name, model in CLASSIFIERS.items():
            folder = args.work_dir / f"{name.partition(' ')[0].lower()}-seed{seed}"
            config = folder.with_suffix(".py")
            study.write_config(config, CONFIG, {**options, **model_options(model, options, seed)})
            command = ["tools/train_mmpretrain.py", str(config), "--work-dir", str(folder)]
            commands.append(command)
            runs.setdefault(name, {})[seed] = trained(command, folder)
    write(args, options, runs, commands)


def base_options(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of every run: the data and the weights.

    Raises:
        ValueError: for data that cannot be read.
    """
    splits = ("train", "val", "test")
    sets = [CocoMultiLabel(f"{s}.json", data_root=str(args.data)) for s in splits]
    args.numbers, args.classes = [len(dataset) for dataset in sets], sets[0].CLASSES
    args.work_dir.mkdir(parents=True, exist_ok=True)
    options = {
        "model.backbone.init_cfg.checkpoint": str(args.weights),
        "data_preprocessor.num_classes": len(args.classes),
        "train_dataloader.dataset.data_root": str(args.data),
        "val_dataloader.dataset.datasets.0.data_root": str(args.data),
        "val_dataloader.dataset.datasets.1.data_root": str(args.data),
    }
    if args.epochs:
        options |= {"train_cfg.max_epochs": args.epochs, "param_scheduler.end": args.epochs}
        options["train_cfg.val_interval"] = args.epochs
    return options


def model_options(
    model: Mapping[str, Any], options: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    size = {"num_classes": options["data_preprocessor.num_classes"], "in_channels": CHANNELS}
    parts = {f"model.{part}": settings for part, settings in model.items()}
    return {**parts, "model.head": {**model["head"], **size}, "randomness.seed": seed}


def trained(command: study.Command, folder: Path) -> dict[str, float]:
    """Train unless this was done before, and read the last evaluation."""
    done = folder / "done.json"
    if not done.is_file():
        resume = ["--resume"] if (folder / "last_checkpoint").is_file() else []
        subprocess.run([sys.executable, *command, *resume], cwd=ROOT, check=True)
        last = sorted(folder.glob("*/vis_data/scalars.json"))[-1]
        lines = [json.loads(line) for line in last.read_text().splitlines()]
        found = [line for line in lines if "multi-label/mAP" in line][-1]
        done.write_text(json.dumps({name: found[f"multi-label/{name}"] for name in METRICS}))
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
    numbers: dict[str, float] = json.loads(done.read_text())
    return numbers


def write(
    args: argparse.Namespace, options: Mapping[str, Any], runs: study.Runs, commands: list
) -> None:
    from mmengine.config import Config

    base = Config.fromfile(CONFIG)
    study.write(
        args.results / "multi_label",
        TEMPLATE + study.TABLES,
        runs,
        METRICS,
        commands,
        "classifier",
        data=f"`{args.data.name}`",
        numbers=" + ".join(map(str, args.numbers)),
        classes=len(args.classes),
        epochs=options.get("train_cfg.max_epochs", base.train_cfg.max_epochs),
        size=base.size,
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
