#!/usr/bin/env python
"""Train and evaluate a LazyConfig, Detectron2's configs in Python, with the plugins.

    tools/lazyconfig_train_net.py \\
        --config-file configs/d2/COCO-InstanceSegmentation/mask_rcnn_R_50_triplet_FPN_1x.py
    tools/lazyconfig_train_net.py --config-file … --eval-only train.init_checkpoint=model.pth

It takes the arguments of Detectron2's own tools/lazyconfig_train_net.py, and --register-coco.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import AMPTrainer, SimpleTrainer, default_setup, default_writers, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from d2_plugins.command_line import apply_arguments, check_batch_size, parse_args, run, warn
from d2_plugins.config import load_lazy_config
from d2_plugins.pixels import find_lazy_mismatches
from d2_plugins.preflight import check_lazy_config
from d2_plugins.trainer import PluginCheckpointer


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
        PluginCheckpointer(model).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model)
    return train(args, cfg, model)


def train(args: argparse.Namespace, cfg: DictConfig, model: nn.Module) -> None:
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = create_ddp_model(model, **cfg.train.ddp)
    make_trainer = AMPTrainer if cfg.train.amp.enabled else SimpleTrainer
    trainer = make_trainer(model, loader, optimizer)
    # The trainer's state includes the optimizer's. So --resume goes on with both.
    checkpointer = PluginCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    all_hooks = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
    ]
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        all_hooks.insert(2, hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
        all_hooks.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    trainer.register_hooks(all_hooks)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    resumed = args.resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    if "evaluator" not in cfg.dataloader:
        return None
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


if __name__ == "__main__":
    run(parse_args("Train and evaluate a LazyConfig with Detectron2 and the plugins."), setup, main)
