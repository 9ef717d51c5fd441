"""Detectron2's trainer on inputs that are damaged at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import KINDS, Judge, check, draw

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, get_cfg

from d2_plugins import add_plugin_config

CONFIG = "configs/d2/Synthetic-Detection/faster_rcnn_R_18_triplet_FPN.yaml"
# Detectron2's ResNet-18 cannot be narrow.
SMALL = (
    *("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    *("SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "MODEL.ROI_HEADS.NUM_CLASSES", 4),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "SEED", 1),
    *("TEST.AUG.MIN_SIZES", "(64,)", "TEST.PRECISE_BN.NUM_ITER", 1),
)
NODES = ("SOLVER", "INPUT", "DATALOADER", "TEST")
ODD: dict[type, tuple[str, ...]] = {
    bool: ("True", "False"),
    int: ("-1", "0", "1", "3"),
    float: ("-0.5", "0.0", "0.5", "2.5", "1e400"),
    str: ("'foo'", "''", "'Range'", "'horizonal'", "'absolute'", "'RGB'", "None"),
    list: ("[]", "(-1,)", "(0,)", "(40, 32)", "(32, 40)", "(0.5, 0.25)", "('a', 1)", "[[1]]"),
}
# Switches without which nothing reads a setting
SWITCHES = ("SOLVER.CLIP_GRADIENTS", "INPUT.CROP", "TEST.AUG", "TEST.PRECISE_BN")


def leaves(node: CfgNode, path: str) -> Iterator[tuple[str, type]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", list if isinstance(value, tuple) else type(value)


def training_settings(rng: random.Random) -> list[str]:
    """Choose a setting of the training, and an odd value that is mostly of its type."""
    cfg = get_cfg()
    add_plugin_config(cfg)
    key, kind = rng.choice([leaf for node in NODES for leaf in leaves(cfg[node], node)])
    fitting = ODD.get(kind, ODD[float])
    value = rng.choice(fitting if rng.random() < 0.8 else sum(ODD.values(), ()))
    switch, _, _ = key.rpartition(".")
    on = [f"{switch}.ENABLED", "True"] if switch in SWITCHES else []
    if key.endswith("MASK_FORMAT"):
        on = ["MODEL.MASK_ON", "True"]
    return [*on, key, value]


def settings(rng: random.Random) -> list[str]:
    """Choose an odd setting: a key with a typo, a value of another type, a wrong plugin."""
    if rng.random() < 0.5:
        return training_settings(rng)
    key = rng.choice(
        (
            *("MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.RESNETS.DEPTH"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.NAME", "MODEL.MASK_ON"),
            *("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"),
            *("INPUT.MIN_SIZE_TRAIN", "MODEL.RESNETS.PLUGINS", "MODEL.KEYPOINT_ON"),
        )
    )
    value = rng.choice(("'x'", "None", "[]", "{}", "('a',)", "-1", "7", "True", "2.5", "{'A': 1}"))
    if key.endswith("PLUGINS"):
        part = rng.choice(
            (
                "'NAME': 'triplet_atention'",
                "'NAME': 'timm:ecca'",
                "'NAME': 'no.such:Thing'",
                "'NAME': 'triplet_attention', 'KERNEL_SIZE': 4",
                "'NAME': 'triplet_attention', 'SIZE': 4",
                "'NAME': 3",
            )
        )
        value = f"[{{{part}, 'STAGES': ['res4']}}]"
    elif rng.random() < 0.3:
        at = rng.randrange(len(key))
        key = key[:at] + rng.choice("XQ_.") + key[at + 1 :]
    elif key in (
        "SOLVER.BASE_LR",
        "SOLVER.MAX_ITER",
        "INPUT.MIN_SIZE_TRAIN",
        "MODEL.RESNETS.DEPTH",
    ):
        value = rng.choice(("'x'", "None", "{}", "True"))  # of another type; numbers are her own
    return [key, value]


@pytest.fixture(scope="module")
def judge(run_tool, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    def run(folder: Path, weights: Path | None, words: list[str], ok: bool = False):
        sets = [
            word
            for split in ("train", "val")
            for word in (
                "--register-coco",
                f"fuzz_{split}",
                folder / "data" / "annotations" / f"instances_{split}2017.json",
                folder / "data" / f"{split}2017",
            )
        ]
        names = ("DATASETS.TRAIN", "('fuzz_train',)", "DATASETS.TEST", "('fuzz_val',)")
        output = ("OUTPUT_DIR", folder / "out", "MODEL.WEIGHTS", weights or "")
        arguments = ("--config-file", CONFIG, *sets, *SMALL, *names, *output, *words)
        return run_tool("train_net.py", *arguments, check=ok)

    folder = tmp_path_factory.mktemp("whole")
    data = draw(folder / "data")
    run(folder, None, [], ok=True)
    return Judge(run, data, settings, folder / "out" / "model_final.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_told_or_trains_on_what_is_right(judge, kind, tmp_path):
    check(judge, kind, tmp_path)
