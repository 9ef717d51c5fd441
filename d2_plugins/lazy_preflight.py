"""Checks of a LazyConfig and of the files that it names, before a run writes anything."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.modeling import ResNet
from detectron2.solver import LRMultiplier
from detectron2.utils.registry import locate
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from d2_plugins.checkpointer import check_weights, find_resumable
from d2_plugins.datasets import prepare
from d2_plugins.model_checks import (
    check_plugins_are_read,
    check_spelling,
    explain,
    known_classes,
    number_of_classes,
)
from d2_plugins.registered_datasets import check_datasets
from d2_plugins.training_settings import (
    DEVICE,
    FLAG,
    SEED,
    Kind,
    blank_image,
    check_kinds,
    keeping_random_numbers,
    number,
    try_to,
    whole,
)
from plugin_core.checkpoints.resnet_names import check_resnet_checkpoint
from plugin_core.datasets.check import Reads, Use
from plugin_core.inspection.building import build_once
from plugin_core.training.checkpoint_files import check_readable

# Modules whose classes may be tried: they read nothing but their arguments.
_KNOWN = ("detectron2.", "d2_plugins.", "fvcore.", "torch.")
_MISSING = object()
_ALWAYS = {"train.device": DEVICE, "dataloader.test.num_workers": whole(0)}
_TRAINING = {
    "train.seed": SEED,
    "train.max_iter": whole(1),
    "train.checkpointer.period": whole(1),
    "train.checkpointer.max_to_keep": Kind(
        "None or a whole number, 1 or more", lambda value: value is None or whole(1).holds(value)
    ),
    "train.eval_period": whole(0),
    "train.log_period": whole(1),
    "train.amp.enabled": FLAG,
    "dataloader.train.total_batch_size": whole(1),
    "dataloader.train.num_workers": whole(0),
    "dataloader.train.aspect_ratio_grouping": FLAG,
}
_OPTIMIZER = {f"optimizer.{name}": number() for name in ("lr", "momentum", "weight_decay")}


def check_lazy_config(cfg: DictConfig, *, eval_only: bool, resume: bool) -> None:
    """Check the datasets and the weights of a LazyConfig, before anything is built.

    Args:
        cfg: the whole config, laid out as Detectron2's own.
        eval_only: whether only the test set and the weights will be used.
        resume: whether weights come from ``cfg.train.output_dir`` where it has a checkpoint.

    Raises:
        ValueError: names the key, its value and the right ones.
    """
    _check_lazy_settings(cfg, eval_only=eval_only)
    for split in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{split}.dataset.names"
        names = OmegaConf.select(cfg, key)
        if names is not None:  # another kind of loader has no names
            check_datasets(key, _lazy_names(cfg, split), train=split == "train")
    _check_lazy_plugins(cfg)
    weights = cfg.train.init_checkpoint.partition("?")[0]
    resumed = (find_resumable(cfg.train.output_dir) if resume else None) or ""
    if eval_only and not weights:
        raise ValueError("train.init_checkpoint: --eval-only needs the checkpoint to evaluate")
    model = build_lazily(cfg)
    key = "model.backbone.bottom_up.plugins"
    check_plugins_are_read(model, OmegaConf.select(cfg, key) or (), key, "name")
    reads_weights = bool(weights) and not resumed and "://" not in weights
    if reads_weights:
        check_readable(weights, "train.init_checkpoint")
    _check_lazy_data(cfg, model, eval_only=eval_only, resumed=resumed)
    _try_lazy_builders(cfg, model, eval_only=eval_only)
    if not reads_weights:
        return
    depth_key = "model.backbone.bottom_up.stages.depth"
    depth = _lazy_depth(cfg)
    if depth is not None:
        check_resnet_checkpoint(weights, depth, "train.init_checkpoint", depth_key)
        check_spelling(weights, "train.init_checkpoint", model)
    check_weights(model, weights, "train.init_checkpoint", whole=eval_only)


def build_lazily(cfg: DictConfig) -> nn.Module:
    """Build the model without memory, and raise its parts' errors in one line."""
    return build_once(lambda device: instantiate(cfg.model), lambda error: explain(error, "model"))


def lazy_reads(cfg: DictConfig, model: Any) -> Reads:
    """Tell what a LazyConfig and its model read of the training data."""
    heads = getattr(model, "roi_heads", None)
    masks = getattr(heads, "mask_head", None) is not None
    mask_format = OmegaConf.select(cfg, "dataloader.train.mapper.instance_mask_format")
    keeps_empty = OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty") is False
    use = Use(
        "train",
        (mask_format or "polygon") if masks else "",
        getattr(getattr(heads, "keypoint_head", None), "num_keypoints", 0),
        keeps_empty=len(_lazy_names(cfg, "train")) > 1 or keeps_empty,
        skips_unreadable=bool(OmegaConf.select(cfg, "dataloader.train.mapper.skip_bad_images")),
    )
    number = number_of_classes(model)
    node = "model" if heads is None else "model.roi_heads"
    return Reads(use, heads=[] if number is None else [(f"{node}.num_classes", number)])


def _lazy_names(cfg: DictConfig, split: str) -> tuple[str, ...]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _check_lazy_data(cfg: DictConfig, model: Any, *, eval_only: bool, resumed: str) -> None:
    """Check the files of a LazyConfig's datasets, and what the model reads of them."""
    train, test = (
        [(f"dataloader.{split}.dataset.names", name) for name in _lazy_names(cfg, split)]
        for split in ("train", "test")
    )
    weights = cfg.train.init_checkpoint if eval_only else ""
    classes = known_classes(resumed, weights, _lazy_names(cfg, "train"))
    prepare([] if eval_only else train, test, lazy_reads(cfg, model), classes)


def _check_lazy_settings(cfg: DictConfig, *, eval_only: bool) -> None:
    """Check the settings that tools/lazyconfig_train_net.py and Detectron2's loaders read."""
    kinds = dict(_ALWAYS) if eval_only else _TRAINING | _ALWAYS
    if not eval_only:
        if "lr_multiplier" not in cfg:
            raise ValueError("lr_multiplier: is missing; a training needs a schedule")
        for key in ("optimizer", "lr_multiplier"):
            if not isinstance(cfg[key], DictConfig):
                raise ValueError(f"{key}: must be a LazyCall, got {cfg[key]!r}")
        kinds |= _OPTIMIZER if _is_known(cfg.optimizer) else {}
    values = {key: OmegaConf.select(cfg, key, default=_MISSING) for key in kinds}
    present = {key: kind for key, kind in kinds.items() if values[key] is not _MISSING}
    check_kinds(present, values.__getitem__)


def _try_lazy_builders(cfg: DictConfig, model: nn.Module, *, eval_only: bool) -> None:
    """Try a LazyConfig's augmentations on a blank image, its optimizer and its schedule."""
    cfg = copy.deepcopy(cfg)

    def build_optimizer() -> Any:
        cfg.optimizer.params.model = model  # as tools/lazyconfig_train_net.py does
        return instantiate(cfg.optimizer)

    with keeping_random_numbers():
        for split in ("test",) if eval_only else ("train", "test"):
            _try_mapper(cfg, f"dataloader.{split}.mapper")
        if eval_only or not _is_known(cfg.optimizer):
            return
        optimizer = try_to(build_optimizer, "optimizer")
        if _is_known(cfg.lr_multiplier):
            multiplier: Any = try_to(lambda: instantiate(cfg.lr_multiplier), "lr_multiplier")
            if isinstance(multiplier, ParamScheduler):
                schedule = partial(LRMultiplier, optimizer, multiplier, cfg.train.max_iter)
                try_to(schedule, "lr_multiplier")


def _try_mapper(cfg: DictConfig, key: str) -> None:
    node: Any = OmegaConf.select(cfg, key)
    if not _is_known(node):
        return
    listed: Any = node.get("augmentations", ())
    if not isinstance(listed, (Sequence, ListConfig)) or isinstance(listed, str):
        raise ValueError(f"{key}.augmentations: must be a list, got {listed!r}")
    known = all(_is_known(part) for part in listed)
    for i, part in enumerate(listed if known else ()):
        try_to(partial(instantiate, part), f"{key}.augmentations[{i}]")

    def build_mapper() -> Any:
        arguments = {name: value for name, value in node.items() if name != "skip_bad_images"}
        # A user's own augmentation may do more than is quick, or read what a blank image lacks.
        return instantiate(arguments if known else {**arguments, "augmentations": []})

    mapper = try_to(build_mapper, key)
    if isinstance(mapper, DatasetMapper):
        image = blank_image(mapper.image_format, f"{key}.image_format")
        for i, augment in enumerate(mapper.augmentations.augs):
            try_to(partial(augment, image), f"{key}.augmentations[{i}]")


def _is_known(node: Any) -> bool:
    """Tell whether a node of a LazyConfig calls a part of Detectron2 or PyTorch."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    name = target if isinstance(target, str) else f"{getattr(target, '__module__', '')}."
    return name.startswith(_KNOWN)


def _lazy_depth(cfg: DictConfig) -> int | None:
    """Read the depth of a ResNet with the usual stages; None if the config lists the stages."""
    stages = OmegaConf.select(cfg, "model.backbone.bottom_up.stages")
    return stages.get("depth") if isinstance(stages, DictConfig) else None


def _check_lazy_plugins(cfg: DictConfig) -> None:
    bottom_up: Any = OmegaConf.select(cfg, "model.backbone.bottom_up")
    if not (bottom_up and bottom_up.get("plugins")):
        return
    target = bottom_up._target_
    if (locate(target) if isinstance(target, str) else target) is ResNet:
        raise ValueError(
            "model.backbone.bottom_up._target_: Detectron2's ResNet takes no plugins; "
            "use d2_plugins.backbones.build_resnet_with_plugins"
        )
