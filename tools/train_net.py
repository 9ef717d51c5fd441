#!/usr/bin/env python
"""Train and evaluate with Detectron2's trainer, with the plugins registered.

    tools/train_net.py --config-file configs/d2/COCO-Detection/faster_rcnn_R_50_triplet_FPN_1x.yaml
    tools/train_net.py --config-file … --eval-only MODEL.WEIGHTS model.pth
    tools/train_net.py --config-file … --register-coco my_train train.json images/ \\
        DATASETS.TRAIN "('my_train',)"

It takes the arguments of Detectron2's own tools/train_net.py, and --register-coco.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_plugins import add_plugin_config, merge_config
from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.command_line import (
    apply_arguments,
    check_amp,
    check_batch_size,
    parse_args,
    run,
    warn,
)
from d2_plugins.pixels import find_mismatches
from d2_plugins.preflight import check_config
from d2_plugins.trainer import PluginTrainer
from plugin_core.training.non_finite import NonFiniteGuard


def setup(args: argparse.Namespace) -> CfgNode:
    """Register the datasets, make the config and check both; raises ValueError."""
    apply_arguments(args)
    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, args.config_file, args.opts)
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_batch_size(args, "SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH)
    check_amp(args, "SOLVER.AMP.ENABLED", cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE)
    NonFiniteGuard(cfg.SOLVER.MAX_NON_FINITE_STEPS, "SOLVER.MAX_NON_FINITE_STEPS")
    check_config(cfg, eval_only=args.eval_only, resume=args.resume)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace, cfg: CfgNode) -> Any:
    default_setup(cfg, args)
    warn(cfg.MODEL.DEVICE, find_mismatches(cfg))
    if args.eval_only:
        model = PluginTrainer.build_model(cfg)
        checkpointer = PluginCheckpointer(model, save_dir=cfg.OUTPUT_DIR, whole=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = PluginTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(PluginTrainer.test_with_tta(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = PluginTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    run(parse_args("Train and evaluate with Detectron2's trainer and the plugins."), setup, main)
