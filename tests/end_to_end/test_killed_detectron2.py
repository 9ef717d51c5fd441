"""A training of Detectron2 that is killed at random moments, and resumed each time."""

from __future__ import annotations

import json
from pathlib import Path

from detectron2_sample import arguments, weights
from killing import check_survival
from tool_server import script_and_arguments


def test_a_training_killed_at_random_moments_ends_with_the_same_weights(
    tool_server, drawn_coco, tmp_path
):
    labels = json.loads((drawn_coco / "annotations/instances_train2017.json").read_text())

    def command(output: Path, resume: bool) -> list[str]:
        options = {
            "INPUT.MIN_SIZE_TRAIN": "(64,)",
            "MODEL.ROI_HEADS.NUM_CLASSES": str(len(labels["categories"])),
            "SOLVER.MAX_ITER": "12",
            "SOLVER.CHECKPOINT_PERIOD": "2",
            "DATASETS.TEST": "()",
        }
        flags = ["--resume"] if resume else []
        words = arguments(drawn_coco, output, *flags, **options)
        return script_and_arguments("train_net.py", tuple(words))

    print(check_survival(tool_server, tmp_path, command, weights))
