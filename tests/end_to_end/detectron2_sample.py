"""Command lines that train Detectron2's configs on the sample, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = "configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml"
# Small images and random weights, as nothing can be downloaded; twenty steps with a checkpoint
# after ten.
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "300",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "200",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "100",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "64",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
    "INPUT.MIN_SIZE_TRAIN": "(160,)",
    "INPUT.MIN_SIZE_TEST": "160",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.001",
    "SOLVER.WARMUP_ITERS": "20",
    "SOLVER.MAX_ITER": "20",
    "SOLVER.STEPS": "()",
    "SOLVER.CHECKPOINT_PERIOD": "10",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    "DATALOADER.NUM_WORKERS": "1",
    "DATASETS.TRAIN": "('sample_train',)",
    "DATASETS.TEST": "('sample_val',)",
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


def results(output: Path) -> list[dict]:
    return json.loads((output / "inference" / "coco_instances_results.json").read_text())


def metrics(printed: str) -> list[str]:
    return [
        line.partition("copypaste: ")[2] for line in printed.splitlines() if "copypaste" in line
    ]
