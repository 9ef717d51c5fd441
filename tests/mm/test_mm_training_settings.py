"""Settings beside the model: what is wrong is told by name before the run writes anything."""

from __future__ import annotations

from typing import Any

import pytest
from mmengine.config import Config

from mm_plugins.training_settings import check_options, check_training_settings

LOADER = {
    "batch_size": 2,
    "num_workers": 0,
    "sampler": {"type": "DefaultSampler", "shuffle": True},
    "batch_sampler": {"type": "AspectRatioBatchSampler"},
    "dataset": {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {
            "type": "CocoDataset",
            "ann_file": "train.json",
            "data_prefix": {"img": "train/"},
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "RandomChoice", "transforms": [[{"type": "Resize", "scale": (64, 64)}]]},
                {"type": "PackDetInputs"},
            ],
        },
    },
}
CONFIG: dict[str, Any] = {
    "train_dataloader": LOADER,
    "val_dataloader": LOADER,
    "val_evaluator": [{"type": "CocoMetric", "ann_file": "val.json", "metric": ["bbox"]}],
    "train_cfg": {"type": "IterBasedTrainLoop", "max_iters": 3, "val_interval": 3},
    "val_cfg": {"type": "ValLoop"},
    "optim_wrapper": {
        "type": "OptimWrapper",
        "optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9},
        "clip_grad": {"max_norm": 1},
        "max_non_finite_steps": 3,
    },
    "param_scheduler": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 3},
        {"type": "MultiStepLR", "milestones": [8], "convert_to_iter_based": True},
    ],
    "default_hooks": {
        "checkpoint": {"type": "CheckpointHook", "interval": 1, "save_optimizer": False},
        "logger": {"type": "LoggerHook", "interval": 5},
        "timer": None,
    },
    "custom_hooks": [{"type": "EMAHook", "priority": 40}],
    "visualizer": {
        "type": "DetLocalVisualizer",
        "vis_backends": [{"type": "LocalVisBackend"}],
    },
    "log_processor": {"type": "LogProcessor", "window_size": 5},
    "randomness": {"seed": 1},
    "env_cfg": {"cudnn_benchmark": False},
}


def error_of(change: dict[str, Any]) -> str:
    cfg = Config(CONFIG)
    cfg.merge_from_dict(change, allow_list_keys=True)
    with pytest.raises(ValueError) as error:
        check_training_settings(cfg, train=True)
    return str(error.value)


def test_right_settings_pass():
    check_training_settings(Config(CONFIG), train=True)
    check_training_settings(Config(CONFIG), train=False)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("train_cfg.max_epochs", 1, "train_cfg.max_epochs: is no argument; there are max_iters"),
        ("train_cfg.max_iters", 0, "train_cfg.max_iters: must be a whole number from 1 on, got 0"),
        ("train_cfg.type", "IterLoop", "train_cfg.type: there is no loop 'IterLoop'"),
        ("val_cfg.fp17", True, "val_cfg.fp17: is no argument; there are fp16"),
        ("optim_wrapper.type", "AmpWrapper", "optim_wrapper.type: there is no optim_wrapper"),
        ("optim_wrapper.optimizer.type", "SDG", "there is no optimizer 'SDG'; did you mean 'SGD'"),
        ("optim_wrapper.optimizer.lrr", 1, "optim_wrapper.optimizer.lrr: is no argument"),
        ("optim_wrapper.optimizer.lr", -1, "optim_wrapper.optimizer: Invalid learning rate: -1"),
        ("param_scheduler.0.type", "LinearL", "param_scheduler[0].type: there is no parameter"),
        ("param_scheduler.1.milestone", 1, "param_scheduler[1].milestone: is no argument"),
        ("param_scheduler.0.start_factor", 7, "param_scheduler[0]: Starting multiplicative"),
        ("train_dataloader.batch_size", 0, "train_dataloader: batch_size should be a positive"),
        ("train_dataloader.batch_size", 2.5, "batch_size: must be a whole number, got 2.5"),
        ("train_dataloader.batchsize", 1, "train_dataloader.batchsize: is no argument"),
        ("train_dataloader.persistent_workers", True, "needs num_workers > 0"),
        ("train_dataloader.sampler.type", "Default", "sampler.type: there is no data sampler"),
        ("train_dataloader.collate_fn", {"type": "x"}, "collate_fn.type: there is no function"),
        ("val_dataloader.dataset.type", "Repeat", "val_dataloader.dataset.type: there is no"),
        ("val_dataloader.dataset.dataset.annfile", "", "dataset.dataset.annfile: is no argument"),
        (
            "train_dataloader.dataset.dataset.pipeline.0.type",
            "LoadImage",
            "train_dataloader.dataset.dataset.pipeline[0].type: there is no transform 'LoadImage'",
        ),
        ("train_dataloader.dataset.dataset.pipeline.2.keys", 1, "pipeline[2].keys: is no argument"),
        (
            "train_dataloader.dataset.dataset.pipeline.1.transforms.0.0.scal",
            1,
            "pipeline[1]: Resize.__init__() got an unexpected keyword argument 'scal'",
        ),
        ("val_evaluator.0.metric", "boxes", "val_evaluator[0]: metric should be one of"),
        ("val_evaluator.0.type", "Coco", "val_evaluator[0].type: there is no metric"),
        (
            "val_evaluator",
            {"_delete_": True, "type": "Multi", "metrics": []},
            "val_evaluator.type: there is no evaluator 'Multi'",
        ),
        (
            "val_evaluator",
            {"_delete_": True, "metrics": [{"type": "Coco"}]},
            "val_evaluator.metrics[0].type: there is no metric",
        ),
        ("default_hooks.checkpoint.intervall", 1, "checkpoint.intervall: is no argument"),
        ("default_hooks.checkpoint.interval", "x", "checkpoint.interval: must be a whole number"),
        ("default_hooks.logger", "x", "default_hooks.logger: must be dict(type=…), got 'x'"),
        ("custom_hooks.0.type", "EMA", "custom_hooks[0].type: there is no hook 'EMA'"),
        ("visualizer.type", "Local", "visualizer.type: there is no visualizer"),
        ("visualizer.vis_backends.0.type", "Local", "visualizer.vis_backends[0].type: there is no"),
        ("log_processor.window", 1, "log_processor.window: is no argument"),
        ("log_level", "LOUD", "log_level: must be one of DEBUG, INFO"),
        ("randomness.seed", "x", "randomness.seed: must be a whole number from 0 on"),
        ("env_cfg.cudnn", True, "env_cfg.cudnn: is read by nothing"),
    ],
)
def test_wrong_setting_is_told_by_name(option, value, said):
    assert said in error_of({option: value})


def test_all_mistakes_are_told_at_once():
    found = error_of({"log_level": "LOUD", "train_cfg.max_iters": 0}).splitlines()
    assert len(found) == 2


def test_options_of_settings_that_nothing_reads_are_an_error():
    check_options(["train_cfg.max_iters", "load_from", "unreadable_images", "resume"], CONFIG)
    with pytest.raises(ValueError, match="no setting 'train_confg'; did you mean 'train_cfg'"):
        check_options(["train_confg.max_iters"], CONFIG)
