#!/usr/bin/env python
"""Run MMDetection's own tools/train.py, with the plugins registered and the config checked first.

tools/train_mmdet.py configs/mm/triplet_attention/faster-rcnn_r50-triplet_fpn_1x_coco.py
"""

from mm_plugins.command_line import run

if __name__ == "__main__":
    run("train")
