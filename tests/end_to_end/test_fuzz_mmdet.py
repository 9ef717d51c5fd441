"""MMDetection's trainer on inputs that are damaged at random."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzzing import KINDS, Judge, check, draw

pytest.importorskip("mmdet", reason="MMDetection is not installed")

CONFIG = "configs/mm/synthetic/faster-rcnn_r18-triplet_fpn_synthetic.py"
SMALL = {
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "train_dataloader.dataset.pipeline.2.scale": "(64,64)",
    "val_dataloader.dataset.pipeline.1.scale": "(64,64)",
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": "[8,16,32,64]",
    "model.neck.out_channels": 16,
    "model.rpn_head.in_channels": 16,
    "model.rpn_head.feat_channels": 16,
    "model.roi_head.bbox_roi_extractor.out_channels": 16,
    "model.roi_head.bbox_head.in_channels": 16,
    "model.roi_head.bbox_head.fc_out_channels": 16,
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "train_cfg.max_iters": 1,
    "train_cfg.val_interval": 1,
}


def settings(rng: random.Random) -> list[str]:
    """Choose an odd setting: a key with a typo, a value of another type, a wrong plugin."""
    return [
        rng.choice(
            (
                "model.type=FasterRCN",
                "model.backbone.type=ResNett",
                "model.backbone.depth=42",
                "model.backbone.plugins=x",
                "model.backbone.plugins.0.cfg.type=TripletAtention",
                "model.backbone.plugins.0.cfg.kernel_size=4",
                "model.backbone.plugins.0.cfg.kernel=4",
                "model.backbone.plugins.0.position=after_conv9",
                "model.backbone.plugins.0.stages=(True,)",
                "model.roi_head.bbox_head.num_classes=3",
                "model.roi_head.bbox_head.num_classes=80",
                "model.roi_head.bbox_head.num_klasses=4",
                "model.neck.type=FPNN",
                "model.rpn_head.anchor_generator.tipe=x",
                "train_dataloader.dataset.metainfo.classes=person",
                "train_dataloader.dataset.metainfo.classes=(person,disc,square,triangle)",
                "train_dataloader.dataset.ann_file=none.json",
                "train_dataloader.dataset.data_prefix.img=none/",
                "val_evaluator.ann_file=none.json",
                "load_from=none.pth",
                "train_cfg.max_epochs=1",
                "train_cfg.type=Loop",
                "optim_wrapper.optimizer.type=SDG",
                "optim_wrapper.optimizer.lr=x",
                "optim_wraper.optimizer.lr=0.1",
                "param_scheduler.0.type=Linear",
                "param_scheduler.0.start=1",
                "default_hooks.checkpoint.type=Checkpoint",
                "default_hooks.logger.interval=x",
                "train_dataloader.batch_size=0",
                "train_dataloader.batchsize=2",
                "train_dataloader.sampler.type=Sampler",
                "train_dataloader.dataset.pipeline.0.type=LoadImage",
                "train_dataloader.dataset.pipeline.2.scal=3",
                "val_evaluator.metric=boxes",
                "visualizer.type=Visualizr",
                "randomness.seed=x",
                "log_level=LOUD",
            )
        )
    ]


@pytest.fixture(scope="module")
def judge(run_tool, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    def run(folder: Path, weights: Path | None, words: list[str], ok: bool = False):
        data = folder / "data"
        changed = {
            **SMALL,
            "train_dataloader.dataset.data_root": f"{data}/",
            "val_dataloader.dataset.data_root": f"{data}/",
            "val_evaluator.ann_file": data / "annotations" / "instances_val2017.json",
            **({"load_from": weights} if weights else {}),
        }
        options = [f"{key}={value}" for key, value in changed.items()]
        arguments = (CONFIG, "--work-dir", folder / "out", "--cfg-options", *options, *words)
        return run_tool("train_mmdet.py", *arguments, check=ok)

    folder = tmp_path_factory.mktemp("whole")
    data = draw(folder / "data")
    run(folder, None, [], ok=True)
    return Judge(run, data, settings, folder / "out" / "iter_1.pth")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_told_or_trains_on_what_is_right(judge, kind, tmp_path):
    check(judge, kind, tmp_path)
