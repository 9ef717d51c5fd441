"""A classifier with triplet attention, trained on real pictures, becomes a detector's backbone."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2_sample import SMALL as SMALL_DETECTRON2
from mmdet_sample import SMALL as SMALL_MMDETECTION
from mmdet_sample import TWO_STAGES
from PIL import Image
from tool_server import ROOT

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

REAL = Path(os.environ.get("REAL_DATA_DIR", ROOT.parent / "shared" / "real"))
CONFIGS = ROOT / "configs"
PIECES = ("black-pawn", "black-queen", "white-pawn")
CLASSIFIER = """
_base_ = "{base}"
model = dict(
    backbone=dict(init_cfg=dict(type="Pretrained", checkpoint="{weights}")),
    head=dict(num_classes=3, topk=(1,)),
)
load_from = None
crop = dict(type="Resize", scale=(64, 64))
pipeline = [dict(type="LoadImageFromFile"), crop, dict(type="PackInputs")]
dataset = dict(type="CustomDataset", with_label=True, pipeline=pipeline, _delete_=True)
loader = dict(batch_size=8, num_workers=1)
train_dataloader = dict(dataset=dict(data_root="{data}/train", **dataset), **loader)
val_dataloader = dict(dataset=dict(data_root="{data}/val", **dataset), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=7)
"""


@pytest.fixture(scope="module")
def chess() -> Path:
    if not (REAL / "chess" / "train.json").is_file():
        pytest.skip(f"no real data in {REAL}; set REAL_DATA_DIR to a folder that has it")
    return REAL / "chess"


@pytest.fixture(scope="module")
def config(chess, tmp_path_factory) -> Path:
    """A classifier's config, ImageNet's weights and cuttings of single pieces as its data."""
    folder = tmp_path_factory.mktemp("pieces")
    for split, most in (("train", 8), ("val", 4)):
        data = json.loads((chess / f"{split}.json").read_text())
        files = {image["id"]: image["file_name"] for image in data["images"]}
        names = {category["id"]: category["name"] for category in data["categories"]}
        for name in PIECES:
            boxes = [a for a in data["annotations"] if names[a["category_id"]] == name]
            (folder / split / name).mkdir(parents=True)
            for i, box in enumerate(boxes[:most]):
                x, y, w, h = box["bbox"]
                with Image.open(chess / "images" / files[box["image_id"]]) as image:
                    image.crop((x, y, x + w, y + h)).save(folder / split / name / f"{i}.png")
    arrays = np.load(REAL / "weights" / "resnet18.npz")
    weights = folder / "resnet18.pth"
    torch.save({name: torch.from_numpy(arrays[name]) for name in arrays}, weights)
    base = CONFIGS / "mmpretrain/triplet_attention/resnet18-triplet_warm-start_8xb32-10e_in1k.py"
    path = folder / "pieces.py"
    path.write_text(CLASSIFIER.format(base=base, weights=weights, data=folder))
    return path


@pytest.fixture(scope="module")
def trained(config, run_tool):
    """Checkpoint of the classifier, and what its training printed."""
    out = config.parent / "whole"
    printed = run_tool("train_mmpretrain.py", config, "--work-dir", out).stdout
    return out / "epoch_2.pth", printed


@pytest.fixture(scope="module")
def pieces(chess, tmp_path_factory) -> Path:
    """Annotations of four photographs."""
    data = json.loads((chess / "train.json").read_text())
    data["images"] = data["images"][:4]
    known = {image["id"] for image in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in known]
    path = tmp_path_factory.mktemp("annotations") / "four.json"
    path.write_text(json.dumps(data))
    return path


def state(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=False)
    return content.get("state_dict", content.get("model"))


def test_training_lets_the_attention_in(trained):
    weights = state(trained[0])
    alphas = [n for n in weights if n.endswith("triplet_attention.alpha")]
    assert len(alphas) == 8 and all(weights[n] != 0 for n in alphas)


def test_resumed_training_is_the_uninterrupted_one(trained, config, run_tool):
    out = config.parent / "resumed"
    first = trained[0].with_name("epoch_1.pth")
    run_tool("train_mmpretrain.py", config, "--work-dir", out, "--resume", first)
    whole, resumed = state(trained[0]), state(out / "epoch_2.pth")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluating_the_checkpoint_gives_the_same_accuracy(trained, config, run_tool, tmp_path):
    path, printed = trained
    again = run_tool("test_mmpretrain.py", config, path, "--work-dir", tmp_path).stdout
    top1 = re.compile(r"accuracy/top1: ([\d.]+)")
    assert top1.findall(again) == top1.findall(printed)[-1:] != []


def test_its_backbone_trains_in_mmdetection(trained, pieces, chess, run_tool, tmp_path):
    classes = [c["name"] for c in json.loads(pieces.read_text())["categories"]]
    settings = {**SMALL_MMDETECTION, **TWO_STAGES, "model.roi_head.bbox_head.num_classes": 12}
    settings |= {
        "model.backbone.base_channels": 64,
        "model.backbone.frozen_stages": 0,
        "model.backbone.init_cfg.checkpoint": trained[0],
        "model.backbone.init_cfg.prefix": "backbone.",
        "model.neck.in_channels": "[64,128,256,512]",
        "train_cfg.max_iters": 2,
        "default_hooks.checkpoint.interval": 2,
        "val_cfg": None,
        "val_dataloader": None,
        "val_evaluator": None,
        "train_dataloader.dataset.data_root": "",
        "train_dataloader.dataset.ann_file": pieces,
        "train_dataloader.dataset.data_prefix.img": f"{chess}/images/",
        "train_dataloader.dataset.metainfo.classes": json.dumps(classes).replace(" ", ""),
    }
    del settings["model.backbone.init_cfg"]
    options = [
        f"{key}={value}"
        for key, value in settings.items()
        if not key.startswith(("val_dataloader.", "test_"))
    ]
    name = "mm/triplet_attention/faster-rcnn_r18-triplet_fpn_1x_coco.py"
    line = (CONFIGS / name, "--work-dir", tmp_path, "--cfg-options", *options)
    run_tool("train_mmdet.py", *line)
    detector = state(tmp_path / "iter_2.pth")
    assert_backbone_is(detector, state(trained[0]), "backbone.conv1.weight")


def test_its_backbone_trains_in_detectron2(trained, pieces, chess, run_tool, tmp_path):
    converted = tmp_path / "backbone.pth"
    printed = run_tool("convert_checkpoint.py", trained[0], converted, "--to", "d2").stdout
    assert "ResNet-18 with triplet attention in 8 blocks" in printed
    layer = (
        "[{'NAME':'triplet_attention','STAGES':['res2','res3','res4','res5'],'WARM_START':True}]"
    )
    settings = {**SMALL_DETECTRON2, "MODEL.RESNETS.PLUGINS": layer}
    settings |= {
        "MODEL.WEIGHTS": converted,
        "MODEL.RESNETS.DEPTH": "18",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "64",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
        "MODEL.BACKBONE.FREEZE_AT": "1",
        "MODEL.ROI_HEADS.NUM_CLASSES": "12",
        "SOLVER.MAX_ITER": "2",
        "DATASETS.TRAIN": "('pieces',)",
        "DATASETS.TEST": "()",
        "OUTPUT_DIR": tmp_path / "out",
    }
    run_tool(
        "train_net.py",
        *("--config-file", CONFIGS / "d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml"),
        *("--register-coco", "pieces", pieces, chess / "images"),
        *(part for pair in settings.items() for part in pair),
    )
    detector = state(tmp_path / "out" / "model_final.pth")
    assert_backbone_is(detector, state(trained[0]), "backbone.bottom_up.stem.conv1.weight")


def assert_backbone_is(detector, classifier, stem: str) -> None:
    """Check that the frozen stem is the classifier's, and that the attention goes on from it."""
    assert torch.equal(detector[stem], classifier["backbone.conv1.weight"])
    ours = [n for n in detector if n.endswith("alpha")]
    theirs = [n for n in classifier if n.endswith("alpha")]
    assert len(ours) == len(theirs) == 8
    for a, b in zip(sorted(ours), sorted(theirs), strict=True):
        assert detector[a] == pytest.approx(float(classifier[b]), abs=0.02) and detector[a] != 0
