"""Checks of what a training reads besides its model: solver, images, loaders, evaluation.

What Detectron2's own builders refuse in time is left to them: they are tried on the model, which
may be without memory, and on a blank image. A table says what is right for settings of which they
would complain late, or without a name.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.data.transforms import AugInput, Transform
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import build_lr_scheduler
from PIL import Image
from torch import nn

from d2_plugins.model_checks import explain
from d2_plugins.optimizer import build_optimizer, check_solver
from plugin_core.errors import did_you_mean
from plugin_core.inspection.building import build_once

_Built = TypeVar("_Built")

_MOST_PIXELS = 2**22  # of a blank image; a larger one would take a while
# PyTorch takes no flipped image of one pixel.
_SIZES = "pixels, 2 or more, or 0 to leave images as they are"
_CROPS = ("relative_range", "relative", "absolute", "absolute_range")


class Kind(NamedTuple):
    """What a setting must be.

    Args:
        right: what is right, for the message.
        holds: tells whether a value is right.
        names: that are right, for a hint where one has a typo.
    """

    right: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def whole(least: int) -> Kind:
    """Whole numbers from ``least`` on."""
    return Kind(f"a whole number, {least} or more", lambda value: _is_whole(value, least))


def number(least: float = 0.0) -> Kind:
    """Finite numbers from ``least`` on."""
    return Kind(f"a finite number, {least:g} or more", lambda value: _is_number(value, least))


def one_of(*names: str) -> Kind:
    """A text that is one of ``names``."""
    return Kind(f"one of {', '.join(names)}", lambda value: value in names, names)


DEVICE = Kind(
    "cpu, cuda or another device that PyTorch finds here", lambda value: _is_device(value)
)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
SEED = Kind(
    "a whole number below 2**32; a negative one draws a seed",
    lambda value: _is_whole(value, -math.inf) and value < 2**32,
)
_POSITIVE = Kind(
    "a finite number above 0", lambda value: _is_number(value, -math.inf) and value > 0
)
_SHARE = Kind("a number above 0, 1 at most", lambda value: _POSITIVE.holds(value) and value <= 1)

_TRAINING = {
    "SEED": SEED,
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.IMS_PER_BATCH": whole(1),
    "SOLVER.CHECKPOINT_PERIOD": whole(1),
    "SOLVER.BASE_LR": number(),
    "SOLVER.BIAS_LR_FACTOR": number(),
    "SOLVER.MOMENTUM": number(),
    "SOLVER.NESTEROV": FLAG,
    "SOLVER.WEIGHT_DECAY": number(),
    "SOLVER.WEIGHT_DECAY_NORM": number(),
    "SOLVER.WEIGHT_DECAY_BIAS": Kind(
        "None or a finite number, 0 or more", lambda value: value is None or _is_number(value)
    ),
    "SOLVER.GAMMA": number(),
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WARMUP_FACTOR": number(),
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.CLIP_GRADIENTS.ENABLED": FLAG,
    "SOLVER.AMP.ENABLED": FLAG,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    "INPUT.CROP.ENABLED": FLAG,
    "INPUT.SKIP_BAD_IMAGES": FLAG,
    "DATALOADER.ASPECT_RATIO_GROUPING": FLAG,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": FLAG,
    "TEST.EVAL_PERIOD": Kind("a whole number", lambda value: _is_whole(value, -math.inf)),
    "TEST.PRECISE_BN.ENABLED": FLAG,
}
_ALWAYS = {
    "MODEL.DEVICE": DEVICE,
    "INPUT.MIN_SIZE_TEST": whole(0),
    "DATALOADER.NUM_WORKERS": whole(0),
    "TEST.AUG.ENABLED": FLAG,
    "TEST.EXPECTED_RESULTS": Kind(
        "a list of results such as ['bbox', 'AP', 38.5, 0.2]",
        lambda value: _is_list(value, _is_result),
    ),
}


def check_settings(cfg: CfgNode, *, eval_only: bool) -> None:
    """Check each setting that ``PluginTrainer`` reads, before anything is built.

    Args:
        cfg: the whole config.
        eval_only: whether only the settings of an evaluation are read.

    Raises:
        ValueError: names the setting, its value and what is right.
    """
    kinds = dict(_ALWAYS) if eval_only else _TRAINING | _ALWAYS
    check_kinds(kinds, lambda setting: _value(cfg, setting))
    # These depend on others, which are right by now.
    check_kinds(_dependent(cfg, eval_only=eval_only), lambda setting: _value(cfg, setting))
    if not eval_only:
        check_solver(cfg)


def check_kinds(kinds: Mapping[str, Kind], value_of: Callable[[str], Any]) -> None:
    """Check settings by a table.

    Raises:
        ValueError: names the first setting that is wrong, its value and what is right.
    """
    for setting, kind in kinds.items():
        value = value_of(setting)
        if not kind.holds(value):
            hint = did_you_mean(value, kind.names) if kind.names else ""
            raise ValueError(f"{setting}: must be {kind.right}, got {value!r}{hint}")


def try_builders(cfg: CfgNode, model: nn.Module, *, eval_only: bool) -> None:
    """Try what Detectron2 builds around a model: its images, its optimizer and the schedule.

    Random numbers afterwards are as if nothing had been tried.

    Args:
        cfg: the whole config, as :func:`check_settings` leaves it to pass.
        model: of the config; its parameters may be without memory.
        eval_only: whether nothing is trained.

    Raises:
        ValueError: names the setting, or the node that has it.
    """
    own = type(model).__module__.startswith(("detectron2.", "d2_plugins."))
    pixel_mean = getattr(model, "pixel_mean", None)
    channels = len(pixel_mean) if own and isinstance(pixel_mean, torch.Tensor) else None
    with keeping_random_numbers():
        for is_train in (False,) if eval_only else (True, False):
            _try_images(cfg, is_train, channels)
        # A model of the user's own may get its parameters later.
        if not eval_only and (own or any(p.requires_grad for p in model.parameters())):
            try_to(lambda: build_lr_scheduler(cfg, build_optimizer(cfg, model)), "SOLVER")
        if cfg.TEST.AUG.ENABLED:
            try_to(lambda: GeneralizedRCNNWithTTA(cfg, model), "TEST.AUG.ENABLED")


def _try_images(cfg: CfgNode, is_train: bool, channels: int | None) -> None:
    mapper: Any = try_to(lambda: DatasetMapper(cfg, is_train=is_train), "INPUT")
    image = blank_image(mapper.image_format, "INPUT.FORMAT", channels)
    try_to(lambda: mapper.augmentations(image), "INPUT")


def try_to(build: Callable[[], _Built], setting: str) -> _Built:
    """Build a part of a training, and raise its errors in one line; raises ValueError."""
    return build_once(lambda _: build(), lambda error: explain(error, setting))


def blank_image(image_format: str | None, setting: str, channels: int | None = None) -> AugInput:
    """Make a blank image to try augmentations on.

    Args:
        image_format: as Detectron2's mapper takes it.
        setting: that has the format, for the message.
        channels: that the model takes; None if it does not tell.

    Raises:
        ValueError: if there is no such format, or the model does not take it.
    """
    try:
        pixels = convert_PIL_to_numpy(Image.new("RGB", (640, 480)), image_format)
        given = pixels.transpose(2, 0, 1).shape[0]  # as the mapper does for the model
    except Exception as error:
        raise ValueError(
            f"{setting}: must be BGR, RGB or another format of images in channels, "
            f"got {image_format!r} ({error})"
        ) from error
    if channels not in (None, given):
        raise ValueError(
            f"{setting}: {image_format!r} has {given} channel(s), and the model takes {channels}, "
            "as its pixel means say"
        )
    return _BlankInput(pixels, sem_seg=np.zeros(pixels.shape[:2], np.uint8))


class _BlankInput(AugInput):
    """A blank image that does not grow beyond what is quick."""

    def transform(self, tfm: Transform) -> None:
        if getattr(tfm, "new_h", 0) * getattr(tfm, "new_w", 0) <= _MOST_PIXELS:
            super().transform(tfm)


@contextmanager
def keeping_random_numbers() -> Iterator[None]:
    """Leave the random numbers of Python, NumPy and PyTorch's CPU as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _dependent(cfg: CfgNode, *, eval_only: bool) -> dict[str, Kind]:
    """List what is right for settings whose right values, or whose use, others decide."""
    images, test, kinds = cfg.INPUT, cfg.TEST, {}
    if images.MIN_SIZE_TEST:  # 0 leaves images as they are
        kinds["INPUT.MAX_SIZE_TEST"] = whole(1)
    if test.AUG.ENABLED:
        kinds["TEST.AUG.MIN_SIZES"] = _filled_list(
            _SIZES, lambda value: _is_whole(value) and _is_size(value)
        )
        kinds["TEST.AUG.MAX_SIZE"] = whole(2)
        kinds["TEST.AUG.FLIP"] = FLAG
    if cfg.MODEL.LOAD_PROPOSALS:
        for split in ("TEST",) if eval_only else ("TRAIN", "TEST"):
            kinds[f"DATASETS.PROPOSAL_FILES_{split}"] = _proposals(cfg, split)
    if cfg.MODEL.KEYPOINT_ON:
        kinds["TEST.KEYPOINT_OKS_SIGMAS"] = Kind(
            "a list of numbers above 0", lambda value: _is_list(value, _POSITIVE.holds)
        )
    if not eval_only:
        kinds |= _of_solver(cfg.SOLVER) | _of_images(cfg) | _of_loader(cfg.DATALOADER)
        if test.PRECISE_BN.ENABLED:
            kinds["TEST.PRECISE_BN.NUM_ITER"] = whole(1)
    return kinds


def _proposals(cfg: CfgNode, split: str) -> Kind:
    number_of_sets = len(cfg.DATASETS[split])
    return Kind(
        f"a list of files of proposals, one for each of DATASETS.{split}",
        lambda value: (
            _is_list(value, lambda path: isinstance(path, str)) and len(value) == number_of_sets
        ),
    )


def _of_solver(solver: Any) -> dict[str, Kind]:
    batch, last = solver.IMS_PER_BATCH, solver.MAX_ITER
    kinds = {
        "SOLVER.REFERENCE_WORLD_SIZE": Kind(
            f"0, or a number of processes that divides SOLVER.IMS_PER_BATCH ({batch})",
            lambda value: _is_whole(value) and (value == 0 or batch % value == 0),
        )
    }
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        kinds["SOLVER.STEPS"] = Kind(
            f"increasing numbers above 0, none of them SOLVER.MAX_ITER ({last}) itself",
            lambda value: (
                _is_list(value, _POSITIVE.holds)
                and list(value) == sorted(set(value))
                and last not in value
            ),
        )
    if solver.NESTEROV and solver.OPTIMIZER == "SGD":
        kinds["SOLVER.MOMENTUM"] = _POSITIVE._replace(right="above 0 with SOLVER.NESTEROV")
    if solver.CLIP_GRADIENTS.ENABLED:
        kinds["SOLVER.CLIP_GRADIENTS.CLIP_VALUE"] = _POSITIVE
        kinds["SOLVER.CLIP_GRADIENTS.NORM_TYPE"] = Kind(
            "a number above 0, or .inf", lambda value: value == math.inf or _POSITIVE.holds(value)
        )
    return kinds


def _of_images(cfg: CfgNode) -> dict[str, Kind]:
    images, kinds = cfg.INPUT, {}
    if images.MIN_SIZE_TRAIN_SAMPLING == "range":
        kinds["INPUT.MIN_SIZE_TRAIN"] = _pair("the least and the most pixels", _is_whole)
    else:
        kinds["INPUT.MIN_SIZE_TRAIN"] = _filled_list(_SIZES, _is_size)
    if isinstance(images.MIN_SIZE_TRAIN, int):  # as code may set it
        kinds["INPUT.MIN_SIZE_TRAIN"] = whole(0)
    if images.MIN_SIZE_TRAIN not in (0, (0,), [0]):
        kinds["INPUT.MAX_SIZE_TRAIN"] = whole(2)
    if cfg.MODEL.MASK_ON:
        kinds["INPUT.MASK_FORMAT"] = one_of("polygon", "bitmask")
    if images.CROP.ENABLED:
        kinds["INPUT.CROP.TYPE"] = one_of(*_CROPS)
        if images.CROP.TYPE == "absolute_range":
            size = _pair("the least and the most pixels", lambda value: _is_whole(value, 1))
        elif images.CROP.TYPE == "absolute":
            size = _two("the pixels of height and width", lambda value: _is_whole(value, 1))
        else:
            size = _two("the shares of height and width, above 0 and 1 at most", _SHARE.holds)
        kinds["INPUT.CROP.SIZE"] = size
    return kinds


def _of_loader(loader: Any) -> dict[str, Kind]:
    samplers = ["TrainingSampler", "RepeatFactorTrainingSampler"]
    if "RANDOM_SUBSET_RATIO" in loader:  # Detectron2's defaults lack it
        samplers.append("RandomSubsetTrainingSampler")
    kinds = {"DATALOADER.SAMPLER_TRAIN": one_of(*samplers)}
    if loader.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        kinds["DATALOADER.REPEAT_THRESHOLD"] = number()
    elif loader.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        kinds["DATALOADER.RANDOM_SUBSET_RATIO"] = _SHARE
    return kinds


def _filled_list(what: str, holds: Callable[[Any], bool]) -> Kind:
    return Kind(f"a list of {what}", lambda value: _is_list(value, holds) and len(value) > 0)


def _two(what: str, holds: Callable[[Any], bool]) -> Kind:
    return Kind(f"two numbers, {what}", lambda value: _is_list(value, holds) and len(value) == 2)


def _pair(what: str, holds: Callable[[Any], bool]) -> Kind:
    two = _two(what, holds)
    return two._replace(holds=lambda value: two.holds(value) and value[0] <= value[1])


def _value(cfg: CfgNode, setting: str) -> Any:
    value: Any = cfg
    for name in setting.split("."):
        value = value[name]
    return value


def _is_whole(value: Any, least: float = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any, least: float = 0.0) -> bool:
    is_float = isinstance(value, float) and math.isfinite(value) and value >= least
    return is_float or _is_whole(value, least)


def _is_size(value: Any) -> bool:
    return _is_number(value) and (value == 0 or value >= 2)


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(holds(part) for part in value)


def _is_result(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    return all(isinstance(part, str) for part in value[:2]) and all(
        _is_number(part, -math.inf) for part in value[2:]
    )


def _is_device(value: Any) -> bool:
    try:
        there = torch.device(value)
        if there.type == "cuda":
            # Without any GPU the tools take the CPU.
            return (there.index or 0) < (torch.cuda.device_count() or 1)
        return there.type == "cpu" or torch.empty(0, device=there).device.type != "meta"
    except (RuntimeError, TypeError, NotImplementedError):
        return False
