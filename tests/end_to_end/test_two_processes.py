"""Two processes on the CPU end with the same weights, started as each framework's users do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2_sample import arguments
from mmdet_sample import options

STEPS = 3
MM_CONFIG = Path(__file__).parent / "two-processes_coco-sample.py"


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = (torch.load(folder / f"process{rank}.pth") for rank in (0, 1))
    return first, second


def assert_trained_together(folder: Path, norm: str) -> None:
    first, second = saved(folder)
    assert first.keys() == second.keys()
    different = {name for name in first if not torch.equal(first[name], second[name])}
    # The processes see different images, so that only joined statistics are the same in both.
    if norm == "BN":
        assert different
        assert all(".triplet_attention." in n and ".bn.running_" in n for n in different)
    else:
        assert not different
    assert all(torch.isfinite(value).all() for value in first.values())
    batches = [value for name, value in first.items() if name.endswith("bn.num_batches_tracked")]
    assert any(value == STEPS for value in batches)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_detectron2s_processes_end_with_the_same_weights(norm, coco_sample, run_tool, tmp_path):
    small = {
        "MODEL.RESNETS.DEPTH": "18",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.TRIPLET_ATTENTION.NORM": norm,
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "SOLVER.MAX_ITER": str(STEPS),
        "SOLVER.BASE_LR": "0.0001",
        "DATALOADER.NUM_WORKERS": "0",
        "DATASETS.TEST": "()",
    }
    line = arguments(coco_sample, tmp_path, "--num-gpus", "2", "--dist-url", "auto", **small)
    run_tool("../tests/end_to_end/train_net_saving_processes.py", *line)
    assert_trained_together(tmp_path, norm)


def test_detectron2s_processes_train_a_detector_of_mmdetection(drawn_coco, run_tool, tmp_path):
    overrides = [
        "model.backbone.depth=18",
        "model.backbone.base_channels=8",
        "model.backbone.init_cfg=None",
        "model.neck.in_channels=[8,16,32,64]",
        "model.neck.out_channels=64",
        "model.bbox_head.in_channels=64",
        "model.bbox_head.feat_channels=64",
        "model.bbox_head.num_classes=7",
    ]
    small = {
        "MODEL.MMDET.OVERRIDES": str(overrides),
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "SOLVER.MAX_ITER": str(STEPS),
        "SOLVER.BASE_LR": "0.0001",
        "DATALOADER.NUM_WORKERS": "0",
        "DATASETS.TEST": "()",
    }
    config = "configs/d2/MMDet-Detection/atss_R_50_FPN_1x.yaml"
    flags = ("--num-gpus", "2", "--dist-url", "auto")
    line = arguments(drawn_coco, tmp_path, *flags, config=config, **small)
    run_tool("../tests/end_to_end/train_net_saving_processes.py", *line)
    first, second = saved(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(first["bbox_head.atss_cls.bias"].unique()) > 1  # it starts with one value


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_mmdetections_processes_end_with_the_same_weights(norm, coco_sample, run_tool, tmp_path):
    small = {
        "model.backbone.norm_eval": True,
        "model.backbone.plugins.0.cfg.norm_cfg.type": norm,
        "train_dataloader.batch_size": 1,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_begin": 100,
        "optim_wrapper.optimizer.lr": 0.0001,
    }
    settings = options(coco_sample, tmp_path, *(f"{k}={v}" for k, v in small.items()))
    run_tool("train_mmdet.py", MM_CONFIG, "--launcher", "pytorch", *settings, processes=2)
    assert_trained_together(tmp_path, norm)
