"""Resuming a training exactly, and reading mmengine's checkpoints on PyTorch 2.6 and newer."""

from __future__ import annotations

import pickle
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.torch_version import TorchVersion

from plugin_core.checkpoints.reading import ALLOWED


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read mmengine's checkpoints, and no other objects.

    Since PyTorch 2.6, ``torch.load`` refuses all but tensors and plain containers by default.
    mmengine 0.10 also saves its history of scalars, a class of its own around numpy arrays, and of
    a OneCycleLR the function between its ends. The functions allowed here make numbers and run
    nothing else. A checkpoint with anything more is still refused.

    Importing ``mm_plugins`` calls this. OneDL's mmengine takes it back when it loads a file.
    """
    if TorchVersion(torch.__version__) < "2.6":
        return  # an older PyTorch refuses nothing
    torch.serialization.add_safe_globals(ALLOWED)


# A saved object holds references to these functions of its class.
_ATTRIBUTES: Mapping[type, tuple[str, ...]] = {
    HistoryBuffer: ("min", "max", "current", "mean"),
    OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
}


def _known_attribute(owner: Any, name: str) -> Any:
    """Replace ``getattr``, which could reach anything, while a checkpoint is read."""
    if name not in _ATTRIBUTES.get(owner, ()):
        raise pickle.UnpicklingError(f"refused: attribute {name!r} of {owner!r}")
    return getattr(owner, name)


ALLOWED.extend([*_ATTRIBUTES, (_known_attribute, "builtins.getattr")])
allow_mmengine_checkpoints()


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Makes a resumed training end with the same weights as an uninterrupted one.

    A checkpoint lacks the state of the random numbers that sample proposals and augment images. So
    they are seeded anew for each iteration. Where the main process loads the data, they are seeded
    for each epoch, too. The hook needs ``randomness = dict(seed=…)``.

    With an iteration-based loop the hook is exact, as mmengine loads again what was seen. OneDL's
    does not, and the hook warns. With an epoch-based loop it is exact unless ``persistent_workers``
    carry their random numbers from epoch to epoch.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        if runner._randomness_cfg.get("seed") is None:
            runner.logger.warning("ExactResumeHook has no effect without randomness = dict(seed=…)")
        epoch_based = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if epoch_based and runner.train_dataloader.persistent_workers:
            runner.logger.warning(
                "Images will be augmented with other random numbers after resuming; for an exact "
                "resume set train_dataloader.persistent_workers to False"
            )
        if not epoch_based and hasattr(runner.train_loop.dataloader_iterator, "skip_iter"):
            runner.logger.warning(
                "This mmengine does not load again what a resumed training has seen: images will "
                "be augmented with other random numbers; for an exact resume train by epochs"
            )

    def before_train_epoch(self, runner: Runner) -> None:
        # An iteration-based loop calls this once, before it skips data that was used already.
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            seed = _derive_seed(runner.seed, get_rank(), runner.epoch, 0)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        torch.manual_seed(_derive_seed(runner.seed, get_rank(), runner.iter, 1))


def _derive_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
