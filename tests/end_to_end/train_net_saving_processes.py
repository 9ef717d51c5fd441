"""tools/train_net.py, with the weights of every process saved at the end, not the first one's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from d2_plugins.command_line import parse_args, run

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import train_net


class SavingTrainer(train_net.PluginTrainer):
    def after_train(self) -> None:
        super().after_train()
        model = self._trainer.model.module
        torch.save(model.state_dict(), f"{self.cfg.OUTPUT_DIR}/process{comm.get_rank()}.pth")


def main(args: argparse.Namespace, cfg: CfgNode) -> Any:
    train_net.PluginTrainer = SavingTrainer
    return train_net.main(args, cfg)


if __name__ == "__main__":
    run(parse_args("Train and save the weights of every process."), train_net.setup, main)
