"""Command lines that train Detectron2's configs on photographs, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

# Triplet attention and IDA in stages; with IDA_HEAD, IDA as classifier too.
CONFIG = "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_IDA_FPN_1x.yaml"
IDA_HEAD = {
    "MODEL.ROI_HEADS.NAME": "StandardPluginROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "IDABoxHead",
}
# A narrow ResNet-50, narrow heads, small images and random weights, as nothing can be downloaded;
# ten steps with a checkpoint after five. Without weight decay, which moves what has no gradient.
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": "50",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.FPN.OUT_CHANNELS": "64",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "200",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "100",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "50",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "32",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "64",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "32",
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(32,)",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "0.0",
    "INPUT.MIN_SIZE_TRAIN": "(128,)",
    "INPUT.MIN_SIZE_TEST": "128",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.002",
    "SOLVER.WEIGHT_DECAY": "0.0",
    "SOLVER.WARMUP_ITERS": "5",
    "SOLVER.MAX_ITER": "10",
    "SOLVER.STEPS": "()",
    "SOLVER.CHECKPOINT_PERIOD": "5",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    "DATALOADER.NUM_WORKERS": "1",
    "DATASETS.TRAIN": "('sample_train',)",
    "DATASETS.TEST": "('sample_val',)",
    "TEST.DETECTIONS_PER_IMAGE": "10",
    "SEED": "7",
}


def arguments(
    sample: Path,
    output: Path,
    *flags: str,
    config: str = CONFIG,
    labels: str = "instances",
    **options: str,
) -> list[str]:
    """Arguments of tools/train_net.py; ``labels`` are in the names of COCO's annotation files."""
    settings = {**SMALL, "OUTPUT_DIR": str(output), **options}
    pairs = [part for pair in settings.items() for part in pair]
    return [*("--config-file", config), *register(sample, labels), *flags, *pairs]


def register(sample: Path, labels: str = "instances") -> list[str]:
    """Arguments that register sample_train and sample_val."""
    words = []
    for split in ("train", "val"):
        json_file = sample / "annotations" / f"{labels}_{split}2017.json"
        words += ["--register-coco", f"sample_{split}", json_file, sample / f"{split}2017"]
    return [str(word) for word in words]


def weights(output: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return torch.load(output / name)["model"]


def losses(output: Path) -> list[float]:
    records = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return [record["total_loss"] for record in records if "total_loss" in record]


def results(output: Path) -> list[dict]:
    return json.loads((output / "inference" / "coco_instances_results.json").read_text())


def metrics(printed: str) -> list[str]:
    return [
        line.partition("copypaste: ")[2] for line in printed.splitlines() if "copypaste" in line
    ]
