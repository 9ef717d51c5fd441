#!/usr/bin/env python
"""Make the pictures of the documentation, from photographs and by the project's own tools.

    docs/pictures/make_pictures.py chess/ mobilenet_v2.pth --out work_dirs/pictures

DATA is Roboflow's "Chess Pieces" (Public Domain) as train.json, val.json and test.json in COCO's
format and images/. WEIGHTS are an ImageNet MobileNetV2 in torchvision's names. tools/try_plugins.py
trains a small Faster R-CNN of MMDetection plain and with triplet attention;
tools/visualize_attention.py and the comparison draw. The pictures go beside this script, small. The
same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BASE = ROOT / "benchmarks" / "real_data" / "faster-rcnn_r18_fpn.py"
STEPS = 250
PHOTOGRAPH = "test_0029"
# At stride 8, where a piece is a few positions wide
MAP, ATTENTION = "backbone.layer3", "backbone.layer3.2.triplet_attention"
# Title → file of tools/visualize_attention.py
PANELS = {
    "plain": "baseline_gradcam",
    "with triplet attention": "gradcam",
    "its gate over height and width": "triplet-hw",
}
# Picture → figure of the comparison's report
FIGURES = {
    "errors.png": "ap50-that-mending-each-kind-would-bring",
    "precision_recall.png": "precision-over-recall-mean-over-classes",
    "differing_image.png": "val-0025-jpg",
}
LARGEST = 150_000  # bytes of a picture
CONFIG = """\
_base_ = {base!r}
custom_imports = dict(imports=["mm_plugins"])
classes = {classes!r}
model = dict(
    backbone=dict(
        _delete_=True,
        type="PluginMobileNetV2",
        out_indices=(1, 2, 4, 7),
        frozen_stages=0,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint={weights!r}),
    ),
    neck=dict(in_channels=[24, 32, 96, 1280]),
    roi_head=dict(bbox_head=dict(num_classes={count})),
)
scale = (320, 192)
load = dict(type="LoadImageFromFile")
boxes = dict(type="LoadAnnotations", with_bbox=True)
resize = dict(type="Resize", scale=scale, keep_ratio=True)
flip = dict(type="RandomFlip", prob=0.5)
meta_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
evaluated = [load, resize, boxes, dict(type="PackDetInputs", meta_keys=meta_keys)]
data = dict(data_root={root!r}, metainfo=dict(classes=classes))
trained = [load, boxes, resize, flip, dict(type="PackDetInputs")]
train_dataloader = dict(dataset=dict(ann_file="train.json", pipeline=trained, **data))
val_dataloader = dict(dataset=dict(ann_file="val.json", pipeline=evaluated, **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={root!r} + "val.json")
test_evaluator = val_evaluator
"""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    config, trial = write_config(args), args.out / "trial"
    words = ["--with", "triplet_attention", "--seeds", 1, "--steps", STEPS, "--jobs", 2]
    run("try_plugins", config, *words, "--out", trial)
    plan = json.loads((trial / "plan.json").read_text(encoding="utf-8"))
    plain, triplet = (
        (trial / "configs" / f"{r['label']}.py", trial / r["folder"] / f"iter_{STEPS}.pth")
        for r in plan["runs"]
    )
    photograph = args.data / "images" / f"{PHOTOGRAPH}.jpg"
    drawn = args.out / "attention"
    words = [*("--methods", "gradcam", "triplet"), *("--layer", MAP), *("--layer", ATTENTION)]
    words += [triplet[0], "--weights", triplet[1], photograph, "--baseline", *plain]
    run("visualize_attention", *words, "--out", drawn)
    panels = {title: drawn / f"{PHOTOGRAPH}_{name}.png" for title, name in PANELS.items()}
    save(side_by_side(panels), "attention.jpg")
    for name, figure in FIGURES.items():
        (path,) = (trial / "comparison" / "figures").glob(f"*-{figure}.png")
        save(Image.open(path), name)


def side_by_side(panels: Mapping[str, Path], width: int = 400, title: int = 26) -> Image.Image:
    pictures = [Image.open(path).convert("RGB") for path in panels.values()]
    height = round(width * pictures[0].height / pictures[0].width)
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height + title), "white")
    font = ImageFont.load_default(15)
    for number, (text, picture) in enumerate(zip(panels, pictures, strict=True)):
        x = number * (width + 8)
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, title))
        ImageDraw.Draw(sheet).text((x + width / 2, 4), text, "black", font, anchor="ma")
    return sheet


def save(picture: Image.Image, name: str) -> None:
    """Write a picture beside this script, at most 900 pixels wide for PNG."""
    if name.endswith(".png"):
        picture = picture.convert("RGB")
        picture.thumbnail((900, 900), Image.Resampling.LANCZOS)
        picture = picture.quantize(128)
    picture.save(HERE / name, quality=80, optimize=True)
    size = (HERE / name).stat().st_size
    if size > LARGEST:
        sys.exit(f"error: {name} has {size} bytes, more than {LARGEST}")
    print(f"wrote {HERE / name}, {size // 1000} kB")


def write_config(args: argparse.Namespace) -> Path:
    """Write the plain detector's config, and its weights as MMDetection names them."""
    args.out.mkdir(parents=True, exist_ok=True)
    weights = args.out / "mobilenet_v2.pth"
    categories = json.loads((args.data / "train.json").read_text(encoding="utf-8"))["categories"]
    classes = [category["name"] for category in categories]
    settings = {"base": str(BASE), "classes": classes, "count": len(classes)}
    text = CONFIG.format(weights=str(weights), root=f"{args.data}/", **settings)
    config = args.out / "plain.py"
    config.write_text(text, encoding="utf-8")
    if not weights.is_file():
        run("convert_checkpoint", args.weights, weights, "--to", "mm", "--config", config)
    return config


def run(tool: str, *words: object) -> None:
    command = [f"tools/{tool}.py", *map(str, words)]
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the trainings")
    args = parser.parse_args(argv)
    for name in ("data", "weights", "out"):
        setattr(args, name, getattr(args, name).absolute())
    return args


if __name__ == "__main__":
    main()
