"""Two processes on the CPU end with the same weights, by each framework's own means."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from detectron2_sample import CONFIG, arguments
from mmdet_sample import options

STEPS = 3
MM_CONFIG = Path(__file__).parent / "two-processes_coco-sample.py"


def saved(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first, second = (torch.load(folder / f"process{rank}.pth") for rank in (0, 1))
    return first, second


def assert_trained_together(folder: Path, own_statistics: str) -> None:
    """Assert that the weights are the same but for statistics of gates in some stages."""
    first, second = saved(folder)
    assert first.keys() == second.keys()
    different = {name for name in first if not torch.equal(first[name], second[name])}
    # The processes see different images, so that only joined statistics are the same in both.
    statistics = r"\.triplet_attention\d*\..*\.bn\.running_"
    assert different
    assert all(re.search(rf"{own_statistics}.*{statistics}", name) for name in different)
    assert any(re.search(statistics, name) for name in first.keys() - different)
    assert all(torch.isfinite(value).all() for value in first.values())
    batches = [value for name, value in first.items() if name.endswith("bn.num_batches_tracked")]
    assert any(value == STEPS for value in batches)


def test_detectron2s_processes_end_with_the_same_weights(photographs, run_tool, tmp_path):
    gates = [
        {"NAME": "triplet_attention", "STAGES": ["res2", "res3"], "NORM": "BN"},
        {"NAME": "triplet_attention", "STAGES": ["res4", "res5"], "NORM": "SyncBN"},
    ]
    small = {
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.PLUGINS": str(gates),
        "INPUT.MIN_SIZE_TRAIN": "(96,)",
        "SOLVER.MAX_ITER": str(STEPS),
        "SOLVER.BASE_LR": "0.0001",
        "DATALOADER.NUM_WORKERS": "0",
        "DATASETS.TEST": "()",
    }
    flags = ("--num-gpus", "2", "--dist-url", "auto")
    line = arguments(photographs, tmp_path, *flags, config=CONFIG, **small)
    run_tool("../tests/end_to_end/train_net_saving_processes.py", *line)
    assert_trained_together(tmp_path, r"\.res[23]\.")


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
    flags = ("--fork", "--num-gpus", "2", "--dist-url", "auto")
    line = arguments(drawn_coco, tmp_path, *flags, config=config, **small)
    run_tool("../tests/end_to_end/train_net_saving_processes.py", *line)
    first, second = saved(tmp_path)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(first["bbox_head.atss_cls.bias"].unique()) > 1  # it starts with one value


def test_mmdetections_processes_end_with_the_same_weights(photographs, run_tool, tmp_path):
    small = {
        "model.backbone.norm_eval": True,
        "train_dataloader.batch_size": 1,
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
        "train_cfg.max_iters": STEPS,
        "train_cfg.val_begin": 100,
        "optim_wrapper.optimizer.lr": 0.0001,
    }
    settings = options(photographs, tmp_path, *(f"{k}={v}" for k, v in small.items()))
    run_tool("train_mmdet.py", MM_CONFIG, "--launcher", "pytorch", *settings, processes=2)
    assert_trained_together(tmp_path, r"\.layer[12]\.")
