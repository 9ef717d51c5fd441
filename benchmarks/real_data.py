#!/usr/bin/env python
"""Do the plugins help on small real data? One use of tools/try_plugins.py for all of them.

    benchmarks/real_data.py chess/ resnet18.pth --framework detectron2 --out work_dirs/chess

The data is a folder with train.json, val.json and test.json in COCO's format and images/. The
weights are an ImageNet ResNet-18 in torchvision's names. The trial evaluates on val.json. Then
tools/compare_detectors.py compares the checkpoints of all runs on test.json, which chose nothing.
Its report goes to --results without pictures. The same command goes on where an earlier one was
stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from plugin_core.files import write_text

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "benchmarks" / "real_data"
PLUGINS = ("triplet_attention", "ida", "timm:eca", "timm:cbam", "batchformer_v1", "amc")
LAST = {"detectron2": "model_final.pth", "mmdetection": "iter_{steps}.pth"}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        config = write_config(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    trial = args.out / "trial"
    words = ["tools/try_plugins.py", str(config), "--out", str(trial)]
    words += ["--seeds", str(args.seeds), "--jobs", str(args.jobs)]
    for plugin in args.plugins or PLUGINS:
        words += ["--with", plugin]
    if args.framework == "detectron2":
        for split in ("train", "val"):
            words += ["--register-coco", split, *map(str, paths(args.data, split))]
    run([*words, *(["--steps", str(args.steps)] if args.steps else [])])
    annotations, images = paths(args.data, "test")
    run(
        ["tools/compare_detectors.py", str(annotations), "--images", str(images)]
        + detectors(trial, args.framework)
        + ["--out", str(args.out / "test")]
    )
    name = f"{args.data.name}-{args.framework}"
    args.results.mkdir(parents=True, exist_ok=True)
    for suffix, change in ((".md", without_pictures), (".json", str)):
        report = (args.out / "test" / f"report{suffix}").read_text(encoding="utf-8")
        # Where the folders are on this machine says nothing.
        report = report.replace(f"{args.data}/", f"{args.data.name}/").replace(f"{args.out}/", "")
        write_text(args.results / f"{name}{suffix}", change(report))
    print(f"wrote {args.results / name}.md and .json")


def paths(data: Path, split: str) -> tuple[Path, Path]:
    return data / f"{split}.json", data / "images"


def write_config(args: argparse.Namespace) -> Path:
    """Write the detector's config for this data and these weights."""
    classes = [
        c["name"] for c in json.loads(paths(args.data, "train")[0].read_text())["categories"]
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.framework == "detectron2":
        base = str(CONFIGS / "faster_rcnn_R_18_FPN.yaml")
        weights = args.out / "resnet18_d2.pth"
        if not weights.is_file():
            words = ["tools/convert_checkpoint.py", str(args.weights), str(weights), "--to", "d2"]
            run([*words, "--config", base])
        model = {"WEIGHTS": str(weights), "ROI_HEADS": {"NUM_CLASSES": len(classes)}}
        settings = {"_BASE_": base, "MODEL": model}
        path = args.out / "plain.yaml"
        write_text(path, yaml.safe_dump(settings, sort_keys=False))
        return path
    loaded = {"type": "Pretrained", "checkpoint": str(args.weights)}
    root = f"{args.data}/"
    lines = [
        f"_base_ = {str(CONFIGS / 'faster-rcnn_r18_fpn.py')!r}",
        f"model = dict(backbone=dict(init_cfg={loaded}),",
        f"    roi_head=dict(bbox_head=dict(num_classes={len(classes)})))",
    ]
    for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = {"data_root": root, "ann_file": f"{split}.json", "metainfo": {"classes": classes}}
        lines.append(f"{part}_dataloader = dict(dataset={dataset})")
        if part != "train":
            lines.append(f"{part}_evaluator = dict(ann_file={root + split + '.json'!r})")
    path = args.out / "plain.py"
    write_text(path, "\n".join(lines) + "\n")
    return path


def detectors(trial: Path, framework: str) -> list[str]:
    """Name the checkpoints of a trial's runs as tools/compare_detectors.py takes them."""
    plan = json.loads((trial / "plan.json").read_text(encoding="utf-8"))
    file = LAST[framework].format(steps=plan["steps"])
    suffix = Path(plan["request"]["config"]).suffix
    words = []
    for label in plan["labels"]:
        folders = [trial / run["folder"] for run in plan["runs"] if run["label"] == label]
        weights = ",".join(str(folder / file) for folder in folders)
        words += ["--detector", f"{label}={trial / 'configs' / label}{suffix}:{weights}"]
    return words


def run(words: Sequence[str]) -> None:
    print("$", shlex.join(words), flush=True)
    if subprocess.run([sys.executable, *words], cwd=ROOT, check=False).returncode:
        sys.exit(f"failed: {words[0]}")


def without_pictures(report: str) -> str:
    """Leave out each picture of a Markdown report, with its title and its note."""
    kept: list[str] = []
    after_picture = False
    for part in report.split("\n\n"):
        if part.startswith("!["):
            kept.pop()
            after_picture = True
        elif not after_picture or part.startswith(("#", "|")):
            kept.append(part)
            after_picture = False
    return "\n\n".join(kept).rstrip() + "\n"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="ImageNet ResNet-18")
    parser.add_argument("--framework", choices=sorted(LAST), default="detectron2")
    parser.add_argument("--with", dest="plugins", action="append", metavar="PLUGIN")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--steps", type=int, help="of each training (default: the config's)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the runs")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "real_data", metavar="DIR"
    )
    args = parser.parse_args(argv)
    for name in ("data", "weights", "out", "results"):
        setattr(args, name, getattr(args, name).absolute())
    return args


if __name__ == "__main__":
    main()
