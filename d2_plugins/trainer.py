"""Detectron2's ``DefaultTrainer`` with the dataset's evaluator, for trainings that survive."""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import LRMultiplier
from torch import nn
from torch.utils.data import DataLoader

from d2_plugins.checkpointer import PluginCheckpointer
from d2_plugins.data import NamingMapper, ResumableTrainLoader
from d2_plugins.evaluation import build_evaluator
from d2_plugins.optimizer import build_optimizer
from d2_plugins.training_loop import (
    GuardedAMPTrainer,
    GuardedTrainer,
    TellLeftOut,
    without_base_lrs,
)
from plugin_core.training.non_finite import NonFiniteGuard

logger = logging.getLogger(__name__)

# Settings of the optimizer and its schedule. A resumed training says which of them are new.
_SCHEDULE = (
    *("OPTIMIZER", "BASE_LR", "LR_FACTORS", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV"),
    *("WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS", "LR_SCHEDULER_NAME", "STEPS"),
    *("GAMMA", "MAX_ITER", "WARMUP_METHOD", "WARMUP_ITERS", "WARMUP_FACTOR"),
)


class PluginTrainer(DefaultTrainer):
    """``DefaultTrainer`` that evaluates every dataset that Detectron2 has an evaluator for.

    With a ``SEED``, a stopped and resumed training ends with the same weights as an uninterrupted
    one. ``TEST.PRECISE_BN`` is an exception: its own stream of data begins anew. Where ``TEST.AUG``
    asks for it, evaluation with test-time augmentation follows the training.

    Steps whose loss is not finite are left out, at most ``SOLVER.MAX_NON_FINITE_STEPS`` in a row.
    A resumed training takes the optimizer's settings and the schedule of its config.
    """

    _trainer: GuardedTrainer
    checkpointer: PluginCheckpointer

    def train(self) -> Any:
        self._trainer.data_loader.start_iter = self.start_iter
        return super().train()

    def resume_or_load(self, resume: bool = True) -> None:
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # Detectron2 v0.6 leaves out the optimizer, and so momentum and learning rate.
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(without_base_lrs(state_dict))
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        if isinstance(self.scheduler, LRMultiplier):
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = lr

    def build_hooks(self) -> list[HookBase | None]:
        self._guard()
        teller = TellLeftOut(self._trainer.guard, self.data_loader, self.checkpointer)
        all_hooks = [*super().build_hooks(), teller]
        if self.cfg.TEST.AUG.ENABLED:
            # At the same place in every process: only the main one has a writer after it.
            place = [isinstance(hook, hooks.EvalHook) for hook in all_hooks].index(True) + 1
            tta = hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
            all_hooks.insert(place, tta)
        return all_hooks

    def _guard(self) -> None:
        """Put a guarded loop and checkpointer in the place of those that Detectron2 has made."""
        cfg: Any = self.cfg
        parts = self.model, self.data_loader, self.optimizer
        del self._trainer  # and the workers that it may have started
        make_trainer = GuardedAMPTrainer if cfg.SOLVER.AMP.ENABLED else GuardedTrainer
        setting = "SOLVER.MAX_NON_FINITE_STEPS"
        self._trainer = make_trainer(
            *parts,
            guard=NonFiniteGuard(cfg.SOLVER.MAX_NON_FINITE_STEPS, setting),
            settings={f"SOLVER.{key}": _plain(cfg.SOLVER[key]) for key in _SCHEDULE},
            remedy="Lower SOLVER.BASE_LR, set SOLVER.CLIP_GRADIENTS.ENABLED True, or look at the "
            "annotations of these images; then go on with --resume",
        )
        self.checkpointer = self._trainer.checkpointer = PluginCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            thing_classes=MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes"),
            trainer=weakref.proxy(self),
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableTrainLoader:
        return ResumableTrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=NamingMapper(DatasetMapper(cfg, is_train=False))
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation; the results' names end in ``_TTA``."""
        logger.info("Evaluating with test-time augmentation")
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [build_evaluator(cfg, name, output_dir) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", result) for task, result in results.items())


def _plain(value: Any) -> Any:
    """Give the same value for lists and tuples, which a checkpoint and a config mix up."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
