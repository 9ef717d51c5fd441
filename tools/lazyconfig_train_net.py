#!/usr/bin/env python
"""Train and evaluate a LazyConfig, Detectron2's configs in Python, with the plugins.

    tools/lazyconfig_train_net.py \\
        --config-file configs/d2/COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_1x.py
    tools/lazyconfig_train_net.py --config-file … --eval-only train.init_checkpoint=model.pth

It takes the arguments of Detectron2's own tools/lazyconfig_train_net.py, and --register-coco.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.command_line import (
    apply_arguments,
    check_amp,
    check_batch_size,
    parse_args,
    run,
    warn,
)
from d2_plugins.config import load_lazy_config
from d2_plugins.data import NamingMapper, ReadableDataset, TrainLoader
from d2_plugins.lazy_preflight import check_lazy_config
from d2_plugins.pixels import find_lazy_mismatches
from d2_plugins.training_loop import GuardedAMPTrainer, GuardedTrainer, TellLeftOut
from plugin_core.training.non_finite import MAX_NON_FINITE_STEPS, NonFiniteGuard


def setup(args: argparse.Namespace) -> DictConfig:
    """Register the datasets, load the config and check both; raises ValueError."""
    apply_arguments(args)
    cfg = load_lazy_config(args.config_file, args.opts)
    missing = {"model", "train", "dataloader", "optimizer"} - set(cfg)
    if missing:
        raise ValueError(
            f"config file {args.config_file!r}: a LazyConfig defines {', '.join(sorted(missing))}; "
            "tools/train_mmdet.py takes configs of MMDetection"
        )
    batch_size = cfg.dataloader.train.get("total_batch_size")
    check_batch_size(args, "dataloader.train.total_batch_size", batch_size)
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        cfg.train.device = "cpu"
    check_amp(args, "train.amp.enabled", cfg.train.amp.enabled, cfg.train.device)
    make_guard(cfg)
    check_lazy_config(cfg, eval_only=args.eval_only, resume=args.resume)
    return cfg


def main(args: argparse.Namespace, cfg: DictConfig) -> Any:
    default_setup(cfg, args)
    warn(cfg.train.device, find_lazy_mismatches(cfg))
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.device == "cpu":
        cfg.train.ddp.device_ids = None  # several processes on the CPU have no ids of GPUs
    if args.eval_only:
        model = create_ddp_model(model, **cfg.train.ddp)
        checkpointer = PluginCheckpointer(
            model, cfg.train.output_dir, setting="train.init_checkpoint", whole=True
        )
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        return evaluate(cfg, model)
    return train(args, cfg, model)


def train(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> None:
    settings = dict(_flat("", {key: cfg[key] for key in ("optimizer", "lr_multiplier")}))
    settings["train.max_iter"] = cfg.train.max_iter
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = build_train_loader(cfg)
    model = create_ddp_model(model, **cfg.train.ddp)
    make_trainer = GuardedAMPTrainer if cfg.train.amp.enabled else GuardedTrainer
    remedy = (
        "Lower optimizer.lr, clip the gradients, or look at the annotations of these images; then "
        "go on with --resume"
    )
    trainer = make_trainer(
        *(model, loader, optimizer), guard=make_guard(cfg), settings=settings, remedy=remedy
    )
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
    name = names if isinstance(names, str) else next(iter(names), "")
    # The trainer's state includes the optimizer's. So --resume goes on with both.
    trainer.checkpointer = checkpointer = PluginCheckpointer(
        model,
        cfg.train.output_dir,
        setting="train.init_checkpoint",
        thing_classes=MetadataCatalog.get(name).get("thing_classes") if name else None,
        trainer=trainer,
    )
    all_hooks = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
    ]
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        all_hooks.insert(2, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        all_hooks.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks([*all_hooks, TellLeftOut(trainer.guard, loader, checkpointer)])
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    trainer.train(trainer.iter + 1 if checkpointer.resumed else 0, cfg.train.max_iter)


def make_guard(cfg: DictConfig) -> NonFiniteGuard:
    limit = cfg.train.get("max_non_finite_steps", MAX_NON_FINITE_STEPS)
    return NonFiniteGuard(limit, "train.max_non_finite_steps")


def build_train_loader(cfg: DictConfig) -> TrainLoader:
    """Build the config's loader so that it names images that cannot be read, or leaves them out."""
    parts = dict(cfg.dataloader.train)
    if isinstance(parts.get("mapper"), DictConfig):
        mapper = dict(parts["mapper"])
        skips = mapper.pop("skip_bad_images", False)
        parts["mapper"] = NamingMapper(instantiate(mapper))
        if skips:
            samples = instantiate(parts["dataset"])
            parts |= {"dataset": ReadableDataset(samples, parts["mapper"]), "mapper": None}
    return TrainLoader(instantiate(parts))


def _flat(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """List the plain settings below a node of the config, by their full keys."""
    if isinstance(node, (dict, DictConfig)):
        for name, part in node.items():
            yield from _flat(f"{key}.{name}".lstrip("."), part)
    else:
        plain = node is None or isinstance(node, (bool, int, float, str))
        yield key, node if plain else str(node)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    if "evaluator" not in cfg.dataloader:
        return None
    parts = dict(cfg.dataloader.test)
    if isinstance(parts.get("mapper"), DictConfig):
        parts["mapper"] = NamingMapper(instantiate(parts["mapper"]))
    loader, evaluator = instantiate(parts), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


if __name__ == "__main__":
    run(parse_args("Train and evaluate a LazyConfig with Detectron2 and the plugins."), setup, main)
