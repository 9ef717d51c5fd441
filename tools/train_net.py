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
import logging
import sys
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from d2_plugins import add_plugin_config, merge_config
from d2_plugins.data import register_coco
from d2_plugins.preflight import check_config
from d2_plugins.trainer import PluginTrainer

logger = logging.getLogger("detectron2.plugins")


def parse_args() -> argparse.Namespace:
    parser = default_argument_parser()
    parser.description = "Train and evaluate with Detectron2's trainer and the plugins."
    parser.add_argument(
        "--register-coco",
        nargs=3,
        action="append",
        default=[],
        metavar=("NAME", "JSON", "IMAGES"),
        help="register a COCO-format dataset; may be given several times",
    )
    return parser.parse_args()


def setup(args: argparse.Namespace) -> CfgNode:
    """Register the datasets, make the config and check both; raises ValueError."""
    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise ValueError(
            f"--num-gpus {args.num_gpus}: PyTorch finds {torch.cuda.device_count()} GPUs here"
        )
    for name, json_file, image_root in args.register_coco:
        register_coco(name, json_file, image_root)
    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, args.config_file, args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_config(cfg, eval_only=args.eval_only, resume=args.resume)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace, cfg: CfgNode | None = None) -> Any:
    # A process that was spawned has registered nothing yet.
    cfg = cfg or setup(args)
    default_setup(cfg, args)
    if cfg.MODEL.DEVICE == "cpu":
        logger.warning("Running on the CPU: PyTorch finds no GPU here, or MODEL.DEVICE is 'cpu'.")
    if args.eval_only:
        model = PluginTrainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
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
    args = parse_args()
    try:
        cfg = setup(args)  # before any process or folder is made
    except ValueError as error:
        sys.exit(f"error: {error}")
    if args.num_gpus * args.num_machines > 1:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    else:
        main(args, cfg)
