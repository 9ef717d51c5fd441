"""Checks of a LazyConfig and of the files that it names, before a run writes anything."""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import instantiate
from detectron2.modeling import ResNet
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
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
from plugin_core.checkpoints.resnet_names import check_resnet_checkpoint
from plugin_core.datasets.check import Reads, Use
from plugin_core.inspection.building import build_once


def check_lazy_config(cfg: DictConfig, *, eval_only: bool, resume: bool) -> None:
    """Check the datasets and the weights of a LazyConfig, before anything is built.

    Args:
        cfg: the whole config, laid out as Detectron2's own.
        eval_only: whether only the test set and the weights will be used.
        resume: whether weights come from ``cfg.train.output_dir`` where it has a checkpoint.

    Raises:
        ValueError: names the key, its value and the right ones.
    """
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
    _check_lazy_data(cfg, model, eval_only=eval_only, resumed=resumed)
    if not weights or resumed or "://" in weights:
        return
    depth_key = "model.backbone.bottom_up.stages.depth"
    depth = _lazy_depth(cfg)
    if depth is not None:
        check_resnet_checkpoint(weights, depth, "train.init_checkpoint", depth_key)
        check_spelling(weights, "train.init_checkpoint", model)
    elif not os.path.isfile(weights):
        raise ValueError(f"train.init_checkpoint: there is no checkpoint {weights!r}")
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
