"""tools/train_net.py, with the weights of every process saved at the end, not the first one's.

With ``--fork`` the processes are forks, which have imported what spawned ones import anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
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


def fork(*arguments: Any, **settings: Any) -> Any:
    for name in [n for n in DatasetCatalog.list() if n.startswith("sample_")]:
        DatasetCatalog.remove(name)  # each process registers its own
        MetadataCatalog.remove(name)
    return torch.multiprocessing.start_processes(*arguments, **settings, start_method="fork")


if __name__ == "__main__":
    if "--fork" in sys.argv:
        sys.argv.remove("--fork")
        torch.multiprocessing.spawn = fork  # Detectron2 calls it
    run(parse_args("Train and save the weights of every process."), train_net.setup, main)
