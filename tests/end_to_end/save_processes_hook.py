"""A hook that saves the weights of every process at the end, not the first one's only."""

from __future__ import annotations

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class SaveProcessesHook(Hook):
    def after_train(self, runner: Runner) -> None:
        torch.save(runner.model.module.state_dict(), f"{runner.work_dir}/process{get_rank()}.pth")
