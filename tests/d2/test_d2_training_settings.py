"""Settings of solver, images, loaders and evaluation that are known to be wrong before a run."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import CfgNode, LazyCall, LazyConfig
from detectron2.data.transforms import Augmentation
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from torch import nn

from d2_plugins import lazy_preflight, merge_config
from d2_plugins.config import load_lazy_config
from d2_plugins.lazy_preflight import check_lazy_config
from d2_plugins.mmdet_bridge import is_bridge
from d2_plugins.training_settings import check_settings, try_builders

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "d2"


class OneLayer(nn.Module):
    """Stands for a model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, device="meta")


def check(cfg: CfgNode, *, eval_only: bool = False, model: nn.Module | None = None) -> None:
    check_settings(cfg, eval_only=eval_only)
    try_builders(cfg, model or OneLayer(), eval_only=eval_only)


def put(cfg: CfgNode, settings: dict[str, object]) -> None:
    """Set settings as code does: nothing checks their types."""
    for setting, value in settings.items():
        *nodes, name = setting.split(".")
        node = cfg
        for part in nodes:
            node = node[part]
        node[name] = value


def error_of(cfg: CfgNode, **arguments) -> str:
    with pytest.raises(ValueError) as error:
        check(cfg, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = [  # setting, value, what the error says of it, settings that go along
    ("MODEL.DEVICE", "foo", "must be cpu, cuda or another device that PyTorch finds here", {}),
    ("MODEL.DEVICE", "meta", "must be cpu, cuda or another", {}),
    ("MODEL.DEVICE", None, "must be cpu, cuda or another", {}),
    ("SEED", 2**40, "must be a whole number below 2**32", {}),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR", "did you mean 'WarmupCosineLR'", {}),
    ("SOLVER.LR_SCHEDULER_NAME", None, "must be one of WarmupMultiStepLR, WarmupCosineLR", {}),
    ("SOLVER.WARMUP_METHOD", "linera", "got 'linera'; did you mean 'linear'?", {}),
    ("SOLVER.WARMUP_ITERS", -1, "must be a whole number, 0 or more, got -1", {}),
    ("SOLVER.WARMUP_FACTOR", -0.1, "must be a finite number, 0 or more, got -0.1", {}),
    ("SOLVER.IMS_PER_BATCH", 0, "must be a whole number, 1 or more, got 0", {}),
    ("SOLVER.IMS_PER_BATCH", -2, "must be a whole number, 1 or more, got -2", {}),
    ("SOLVER.IMS_PER_BATCH", 2.0, "must be a whole number, 1 or more, got 2.0", {}),
    ("SOLVER.REFERENCE_WORLD_SIZE", 3, "that divides SOLVER.IMS_PER_BATCH (16), got 3", {}),
    ("SOLVER.REFERENCE_WORLD_SIZE", -1, "0, or a number of processes", {}),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "must be a whole number, 1 or more, got 0", {}),
    ("SOLVER.MAX_ITER", 0, "must be a whole number, 1 or more, got 0", {}),
    ("SOLVER.MAX_ITER", -5, "must be a whole number, 1 or more, got -5", {}),
    ("SOLVER.MAX_ITER", True, "must be a whole number, 1 or more, got True", {}),
    ("SOLVER.BASE_LR", -0.1, "must be a finite number, 0 or more, got -0.1", {}),
    ("SOLVER.BASE_LR", float("nan"), "must be a finite number, 0 or more, got nan", {}),
    ("SOLVER.BIAS_LR_FACTOR", -1.0, "must be a finite number, 0 or more", {}),
    ("SOLVER.MOMENTUM", float("inf"), "must be a finite number, 0 or more, got inf", {}),
    ("SOLVER.MOMENTUM", 0.0, "must be above 0 with SOLVER.NESTEROV", {"SOLVER.NESTEROV": True}),
    ("SOLVER.NESTEROV", "no", "must be True or False, got 'no'", {}),
    ("SOLVER.WEIGHT_DECAY", -1.0, "must be a finite number, 0 or more, got -1.0", {}),
    ("SOLVER.WEIGHT_DECAY_NORM", -1.0, "must be a finite number, 0 or more, got -1.0", {}),
    ("SOLVER.WEIGHT_DECAY_BIAS", "x", "must be None or a finite number, 0 or more, got 'x'", {}),
    ("SOLVER.GAMMA", -0.1, "must be a finite number, 0 or more, got -0.1", {}),
    ("SOLVER.STEPS", (30, 20), "must be increasing numbers above 0", {}),
    ("SOLVER.STEPS", (30, 30), "must be increasing numbers above 0", {}),
    ("SOLVER.STEPS", (0,), "must be increasing numbers above 0", {}),
    ("SOLVER.STEPS", ("a",), "must be increasing numbers above 0", {}),
    ("SOLVER.STEPS", (9,), "none of them SOLVER.MAX_ITER (9) itself", {"SOLVER.MAX_ITER": 9}),
    ("SOLVER.OPTIMIZER", "ADAM", "got 'ADAM'; did you mean 'ADAMW'?", {}),
    ("SOLVER.LR_FACTORS", [["a", float("inf")]], "pairs", {"SOLVER.OPTIMIZER": "ADAMW"}),
    ("SOLVER.LR_FACTORS", [["a.b", 0.1]], "no parameter", {"SOLVER.OPTIMIZER": "ADAMW"}),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0, "above 0", {"SOLVER.CLIP_GRADIENTS.ENABLED": True}),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 0.0, "or .inf", {"SOLVER.CLIP_GRADIENTS.ENABLED": True}),
    ("SOLVER.AMP.ENABLED", None, "must be True or False, got None", {}),
    ("INPUT.FORMAT", "XYZ", "must be BGR, RGB or another format of images in channels, got", {}),
    ("INPUT.FORMAT", "P", "must be BGR, RGB or another format of images in channels, got", {}),
    ("INPUT.MIN_SIZE_TRAIN", (-1,), "must be a list of pixels, 2 or more, or 0", {}),
    ("INPUT.MIN_SIZE_TRAIN", (), "must be a list of pixels, 2 or more, or 0", {}),
    ("INPUT.MIN_SIZE_TRAIN", ("a",), "must be a list of pixels, 2 or more, or 0", {}),
    ("INPUT.MIN_SIZE_TRAIN", (1,), "must be a list of pixels, 2 or more, or 0", {}),
    ("INPUT.MIN_SIZE_TRAIN", -1, "must be a whole number, 0 or more", {}),
    ("INPUT.MIN_SIZE_TRAIN", (9, 2), "least", {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}),
    ("INPUT.MIN_SIZE_TRAIN", (9,), "two", {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "chose", "did you mean 'choice'?", {}),
    ("INPUT.MAX_SIZE_TRAIN", 0, "must be a whole number, 2 or more, got 0", {}),
    ("INPUT.MIN_SIZE_TEST", -3, "must be a whole number, 0 or more, got -3", {}),
    ("INPUT.MAX_SIZE_TEST", 0, "must be a whole number, 1 or more, got 0", {}),
    ("INPUT.RANDOM_FLIP", "horizontl", "did you mean 'horizontal'?", {}),
    ("INPUT.CROP.TYPE", "relativ", "did you mean 'relative'", {"INPUT.CROP.ENABLED": True}),
    ("INPUT.CROP.SIZE", [0.9], "must be two numbers", {"INPUT.CROP.ENABLED": True}),
    ("INPUT.CROP.SIZE", [1.5, 1.0], "1 at most", {"INPUT.CROP.ENABLED": True}),
    (
        *("INPUT.CROP.SIZE", [0.9, 0.9], "the pixels of height and width"),
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute"},
    ),
    (
        *("INPUT.CROP.SIZE", [20, 10], "the least and the most pixels"),
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute_range"},
    ),
    ("INPUT.MASK_FORMAT", "bitmap", "did you mean 'bitmask'?", {"MODEL.MASK_ON": True}),
    ("DATALOADER.NUM_WORKERS", -1, "must be a whole number, 0 or more, got -1", {}),
    ("DATALOADER.ASPECT_RATIO_GROUPING", "x", "must be True or False, got 'x'", {}),
    ("DATALOADER.SAMPLER_TRAIN", "TrainSampler", "did you mean 'TrainingSampler'", {}),
    ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler", "must be one of", {}),
    (
        *("DATALOADER.RANDOM_SUBSET_RATIO", 2.0, "must be a number above 0, 1 at most"),
        {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler"},
    ),
    (
        *("DATALOADER.REPEAT_THRESHOLD", -1.0, "must be a finite number, 0 or more"),
        {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"},
    ),
    ("DATASETS.PROPOSAL_FILES_TRAIN", ("a",), "one for each", {"MODEL.LOAD_PROPOSALS": True}),
    ("TEST.EXPECTED_RESULTS", [["bbox", "AP"]], "such as ['bbox', 'AP', 38.5, 0.2]", {}),
    ("TEST.EXPECTED_RESULTS", [["bbox", "AP", "a", 1]], "such as ['bbox', 'AP', 38.5", {}),
    ("TEST.KEYPOINT_OKS_SIGMAS", [0.0], "numbers above 0", {"MODEL.KEYPOINT_ON": True}),
    ("TEST.AUG.MIN_SIZES", (), "must be a list of pixels", {"TEST.AUG.ENABLED": True}),
    ("TEST.AUG.MAX_SIZE", 1, "must be a whole number, 2 or more", {"TEST.AUG.ENABLED": True}),
    ("TEST.AUG.ENABLED", True, "TTA is only supported on GeneralizedRCNN", {}),
    ("TEST.PRECISE_BN.NUM_ITER", 0, "1 or more", {"TEST.PRECISE_BN.ENABLED": True}),
]


@pytest.mark.parametrize(
    ("setting", "value", "said", "along"), WRONG, ids=[f"{s} {v}" for s, v, *_ in WRONG]
)
def test_wrong_setting_is_a_line_that_names_it(cfg, setting, value, said, along):
    put(cfg, {**along, setting: value})
    message = error_of(cfg)
    assert message.startswith(f"{setting}: ") and said in message


@pytest.mark.parametrize(
    "settings",
    [
        {"SOLVER.MAX_ITER": 1, "SOLVER.STEPS": (30, 40)},
        {"SOLVER.STEPS": (2.5, 3e4)},
        {"SOLVER.STEPS": (3, 2), "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR"},
        {"SOLVER.WARMUP_ITERS": 0, "SOLVER.WARMUP_FACTOR": 0.0, "SOLVER.BASE_LR": 0.0},
        {"SOLVER.WEIGHT_DECAY_BIAS": 0, "SOLVER.BIAS_LR_FACTOR": 2},
        {"SOLVER.REFERENCE_WORLD_SIZE": 8},
        {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.NORM_TYPE": float("inf")},
        {"INPUT.FORMAT": "L"},
        {"INPUT.FORMAT": "YUV-BT.601", "INPUT.MIN_SIZE_TRAIN": (20,)},
        {"INPUT.FORMAT": None},
        {"INPUT.MASK_FORMAT": "unread"},
        {"INPUT.MIN_SIZE_TRAIN": 64},
        {"INPUT.MIN_SIZE_TRAIN": (0,), "INPUT.MAX_SIZE_TRAIN": 0},
        {"INPUT.MIN_SIZE_TEST": 0, "INPUT.MAX_SIZE_TEST": 0},
        {"INPUT.MIN_SIZE_TRAIN": (64, 64), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"},
        {"INPUT.MIN_SIZE_TRAIN": (10**5,), "INPUT.MAX_SIZE_TRAIN": 10**9},
        {"INPUT.RANDOM_FLIP": "none", "INPUT.CROP.TYPE": "unread"},
        {"INPUT.CROP.ENABLED": True},
        {
            "INPUT.CROP.ENABLED": True,
            "INPUT.CROP.TYPE": "absolute_range",
            "INPUT.CROP.SIZE": [384, 600],
        },
        {
            "DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler",
            "DATALOADER.RANDOM_SUBSET_RATIO": 0.5,
        },
        {"TEST.EXPECTED_RESULTS": [["bbox", "AP", 38.5, 0.2], ("segm", "AP", -1, 1)]},
        {"TEST.DETECTIONS_PER_IMAGE": -1, "TEST.AUG.MIN_SIZES": ()},
        {"SEED": 2**32 - 1},
    ],
    ids=str,
)
def test_right_or_unread_settings_pass(cfg, settings):
    put(cfg, settings)
    check(cfg)


def test_evaluation_does_not_ask_for_settings_of_a_training(cfg):
    put(cfg, {"SOLVER.MAX_ITER": 0, "INPUT.MIN_SIZE_TRAIN": (), "DATALOADER.SAMPLER_TRAIN": "x"})
    check(cfg, eval_only=True)
    put(cfg, {"INPUT.MIN_SIZE_TEST": -3})
    assert error_of(cfg, eval_only=True).startswith("INPUT.MIN_SIZE_TEST: ")


def test_gpu_that_is_not_there_is_found(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg.MODEL.DEVICE = "cuda:1"
    check(cfg)
    cfg.MODEL.DEVICE = "cuda:2"
    assert error_of(cfg).startswith("MODEL.DEVICE: ")


def test_images_have_the_channels_of_detectron2s_models_only(cfg):
    model = RetinaNet.__new__(RetinaNet)
    nn.Module.__init__(model)
    model.register_buffer("pixel_mean", torch.zeros(3, 1, 1), False)
    cfg.INPUT.FORMAT = "L"
    check(cfg)  # of the user's own
    assert error_of(cfg, model=model, eval_only=True) == (
        "INPUT.FORMAT: 'L' has 1 channel(s), and the model takes 3, as its pixel means say"
    )


def test_augmentation_at_test_time_is_for_an_r_cnn(cfg):
    cfg.TEST.AUG.ENABLED = True
    model = GeneralizedRCNN.__new__(GeneralizedRCNN)
    nn.Module.__init__(model)
    check(cfg, model=model, eval_only=True)


def test_trying_uses_up_no_random_numbers_and_is_quick(cfg):
    cfg.INPUT.CROP.ENABLED = True
    before = random.getstate(), np.random.get_state()[1:], torch.get_rng_state()
    start = time.perf_counter()
    check(cfg)
    assert time.perf_counter() - start < 2  # 0.1 s on a machine of its own
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state()[1:], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_config_passes(cfg, path):
    merge_config(cfg, str(path), ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.KEYPOINT_ON = False  # the names of keypoints come with the annotations
    if is_bridge(cfg):
        cfg.SOLVER.LR_FACTORS = []  # of the detector, which is not built here
    check(cfg)


# ------------------------------------------------------------------------------------- LazyConfigs


@pytest.fixture(params=sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def lazy_cfg(request, monkeypatch):
    """A shipped LazyConfig, whose datasets are not there, with a small model."""
    for name in ("check_datasets", "_check_lazy_data"):
        monkeypatch.setattr(lazy_preflight, name, lambda *_, **__: None)
    monkeypatch.setattr(lazy_preflight, "build_lazily", lambda _: OneLayer())
    monkeypatch.setattr(lazy_preflight, "check_plugins_are_read", lambda *_: None)
    return load_lazy_config(str(request.param), ["train.init_checkpoint=''", "train.device=cpu"])


AUGMENTATIONS = "dataloader.train.mapper.augmentations"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.device=foo", "train.device: must be cpu, cuda or another device"),
        ("train.max_iter=0", "train.max_iter: must be a whole number, 1 or more, got 0"),
        ("train.max_iter=x", "train.max_iter: must be a whole number, 1 or more, got 'x'"),
        ("train.checkpointer.period=0", "train.checkpointer.period: must be a whole number"),
        ("train.checkpointer.max_to_keep=0", "train.checkpointer.max_to_keep: must be None or"),
        ("train.eval_period=-1", "train.eval_period: must be a whole number, 0 or more, got -1"),
        ("train.log_period=0", "train.log_period: must be a whole number, 1 or more"),
        ("train.seed=x", "train.seed: must be a whole number below 2**32"),
        ("optimizer=x", "optimizer: must be a LazyCall, got 'x'"),
        ("optimizer.lr=-1", "optimizer.lr: must be a finite number, 0 or more, got -1"),
        ("optimizer.foo=1", "optimizer: it cannot be built: TypeError: SGD.__init__() got an"),
        ("optimizer.params=null", "optimizer: it cannot be built: "),
        ("lr_multiplier.warmup_method=foo", "lr_multiplier: it cannot be built: ValueError: Unk"),
        ("lr_multiplier.scheduler.milestones=[6,4,9]", "lr_multiplier: it cannot be built: "),
        ("~lr_multiplier", "lr_multiplier: is missing; a training needs a schedule"),
        ("dataloader.train.total_batch_size=0", "dataloader.train.total_batch_size: must be a"),
        ("dataloader.train.num_workers=-1", "dataloader.train.num_workers: must be a whole"),
        ("dataloader.test.num_workers=x", "dataloader.test.num_workers: must be a whole number"),
        ("dataloader.train.mapper.image_format=X", "dataloader.train.mapper.image_format: must"),
        ("dataloader.train.mapper.foo=1", "dataloader.train.mapper: it cannot be built: "),
        (f"{AUGMENTATIONS}=x", f"{AUGMENTATIONS}: must be a list, got 'x'"),
        (f"{AUGMENTATIONS}.0.short_edge_length=[]", f"{AUGMENTATIONS}[0]: it cannot be built"),
        (f"{AUGMENTATIONS}.0.short_edge_length=[-1]", f"{AUGMENTATIONS}[0]: it cannot be built"),
        (f"{AUGMENTATIONS}.1.horizontal=False", f"{AUGMENTATIONS}[1]: it cannot be built"),
    ],
)
def test_wrong_key_of_a_lazy_config_is_a_line_that_names_it(lazy_cfg, override, said):
    if override.startswith("~"):
        del lazy_cfg[override[1:]]
    else:
        LazyConfig.apply_overrides(lazy_cfg, [override])
    with pytest.raises(ValueError) as error:
        check_lazy_config(lazy_cfg, eval_only=False, resume=False)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


class Unlike(Augmentation):
    """Stands for a user's own augmentation, which a blank image does not suit."""

    def get_transform(self, image, histogram):
        raise AssertionError("tried")


def test_good_lazy_config_passes_and_stays_as_it_was(lazy_cfg):
    before = copy.deepcopy(lazy_cfg), np.random.get_state()[1:], torch.get_rng_state()
    check_lazy_config(lazy_cfg, eval_only=False, resume=False)
    assert lazy_cfg == before[0]
    np.testing.assert_equal(np.random.get_state()[1:], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_parts_of_the_users_own_are_not_tried(lazy_cfg):
    lazy_cfg.dataloader.train.mapper.augmentations.append(LazyCall(Unlike)())
    lazy_cfg.optimizer = LazyCall(Unlike)(params={}, lr="my own")
    lazy_cfg.lr_multiplier = LazyCall(Unlike)(a=1)
    check_lazy_config(lazy_cfg, eval_only=False, resume=False)


def test_evaluation_asks_for_no_optimizer(lazy_cfg):
    lazy_cfg.train.init_checkpoint = "https://example.com/model.pkl"
    del lazy_cfg.optimizer, lazy_cfg.lr_multiplier
    lazy_cfg.train.max_iter = 0
    check_lazy_config(lazy_cfg, eval_only=True, resume=False)
    lazy_cfg.dataloader.test.mapper.augmentations[0].short_edge_length = -1
    with pytest.raises(ValueError, match=r"^dataloader.test.mapper.augmentations\[0\]: "):
        check_lazy_config(lazy_cfg, eval_only=True, resume=False)
