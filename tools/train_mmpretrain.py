#!/usr/bin/env python
"""Run MMPretrain's own tools/train.py, with the plugins registered and the config checked first.

tools/train_mmpretrain.py configs/mmpretrain/triplet_attention/resnet50-triplet_8xb32_in1k.py
"""

from mm_plugins.command_line import run

if __name__ == "__main__":
    run("train", "mmpretrain")
