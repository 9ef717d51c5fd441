"""Detectron2's ``DefaultTrainer`` with the dataset's evaluator and exact resuming."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn
from torch.utils.data import DataLoader

from d2_plugins.data import PluginDatasetMapper, ResumableTrainLoader
from d2_plugins.evaluation import build_evaluator
from d2_plugins.optimizer import build_optimizer

logger = logging.getLogger(__name__)


class PluginCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that also reads MMDetection's checkpoints."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = super()._load_file(filename)
        state_dict = loaded["model"].get("state_dict")
        return {"model": dict(state_dict)} if isinstance(state_dict, Mapping) else loaded


class PluginTrainer(DefaultTrainer):
    """``DefaultTrainer`` that evaluates every dataset that Detectron2 has an evaluator for.

    With a ``SEED``, a stopped and resumed training ends with the same weights as an uninterrupted
    one. ``TEST.PRECISE_BN`` is an exception: its own stream of data begins anew. Where ``TEST.AUG``
    asks for it, evaluation with test-time augmentation follows the training.
    """

    def train(self) -> Any:
        self._trainer.data_loader.start_iter = self.start_iter
        return super().train()

    def resume_or_load(self, resume: bool = True) -> None:
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load()
        else:
            PluginCheckpointer(self.model).load(self.cfg.MODEL.WEIGHTS)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # Detectron2 v0.6 leaves out the optimizer, and so momentum and learning rate.
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

    def build_hooks(self) -> list[HookBase | None]:
        all_hooks = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            # At the same place in every process: only the main one has a writer after it.
            place = [isinstance(hook, hooks.EvalHook) for hook in all_hooks].index(True) + 1
            tta = hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
            all_hooks.insert(place, tta)
        return all_hooks

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ResumableTrainLoader:
        return ResumableTrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_detection_test_loader(
            cfg, dataset_name, mapper=PluginDatasetMapper(cfg, is_train=False)
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
