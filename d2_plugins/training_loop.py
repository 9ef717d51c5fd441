"""Detectron2's training loops, leaving out bad steps and taking new settings when resumed."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from d2_plugins.checkpointer import PluginCheckpointer
from plugin_core.training import RunError
from plugin_core.training.non_finite import (
    NonFiniteGuard,
    NonFiniteLoss,
    copy_statistics,
    restore_statistics,
)
from plugin_core.training.unreadable_images import summarize_left_out

logger = logging.getLogger("detectron2.plugins")

# Where a change means that the optimizer's momenta are of another kind
_KINDS = ("SOLVER.OPTIMIZER", "optimizer._target_")


class _LeaveOut(Exception):
    """The step's loss is not finite."""


class GuardedTrainer(SimpleTrainer):
    """``SimpleTrainer`` that leaves out steps whose loss is not finite.

    Neither parameters nor batch norms' statistics change in such a step. The schedule goes on.

    Args:
        model: as for ``SimpleTrainer``.
        data_loader: likewise.
        optimizer: likewise.
        guard: says which steps are left out.
        settings: of the optimizer and its schedule, by name. They are saved, so that a resumed
            training can say what has changed.
        remedy: for too many such steps in a row.

    Attributes:
        checkpointer: of the run, for messages.
    """

    _batches: Iterator[Any] | None = None

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: Optimizer,
        *,
        guard: NonFiniteGuard,
        settings: Mapping[str, Any],
        remedy: str,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.guard, self.settings, self.remedy = guard, dict(settings), remedy
        self.checkpointer: PluginCheckpointer | None = None
        self._batch: Any = None

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = self._remember(iter(self.data_loader))
        return self._batches

    @_data_loader_iter.setter
    def _data_loader_iter(self, batches: Iterator[Any]) -> None:
        self._batches = self._remember(batches)  # v0.6 sets it; later versions only ask for it

    def _remember(self, batches: Iterator[Any]) -> Iterator[Any]:
        for self._batch in batches:
            yield self._batch

    def run_step(self) -> None:
        statistics = copy_statistics(self.model)
        try:
            super().run_step()
        except FloatingPointError as error:  # of a proposal generator, before there is a loss
            if comm.get_world_size() > 1:  # the others wait for this process's gradients
                last = self.checkpointer.last_good if self.checkpointer else ""
                raise NonFiniteLoss(
                    f"{error} Images: {', '.join(find_images(self._batch))}; last good checkpoint: "
                    f"{last or 'none'}. {self.remedy}"
                ) from None
            told = self._judge({"loss": torch.tensor(math.nan)})
            self.optimizer.zero_grad()
            restore_statistics(statistics)
            logger.warning("Step %d left out: %s (%s)", self.iter, told, error)
        except _LeaveOut as wrong:
            # Only now, as the processes of a distributed training go through the backward together
            self.optimizer.zero_grad()
            restore_statistics(statistics)
            logger.warning("Step %d left out: %s", self.iter, wrong)

    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, prefix: str = ""
    ) -> None:
        # Detectron2 calls this between the backward and the optimizer's step.
        total = torch.stack([value.detach().sum() for value in loss_dict.values()]).sum()
        if wrong := self._judge({**loss_dict, "loss": total}):
            raise _LeaveOut(wrong)
        super()._write_metrics(loss_dict, data_time, prefix)

    def _judge(self, losses: Mapping[str, Tensor]) -> str | None:
        """Say why a step is to be left out; None if it is not.

        Raises:
            NonFiniteLoss: if it is the last of too many in a row.
        """
        try:
            return self.guard.check(losses, find_images(self._batch))
        except NonFiniteLoss as error:
            last = self.checkpointer.last_good if self.checkpointer else ""
            raise NonFiniteLoss(
                f"{error}; last good checkpoint: {last or 'none'}. {self.remedy}"
            ) from None

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "parameter_names": self._names(),
            "settings": self.settings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = without_base_lrs(state_dict)
        old, new = state.get("settings", self.settings), self.settings
        changes = [
            f"{key} {old.get(key)!r} -> {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if changes:
            logger.warning(
                "Resumed at iteration %d with other settings, which hold from here on: %s",
                state["iteration"] + 1,
                ", ".join(changes),
            )
        same_kind = all(old.get(key) == new.get(key) for key in _KINDS)
        state["optimizer"] = self._fit(state["optimizer"], state.get("parameter_names"), same_kind)
        super().load_state_dict(state)

    def _names(self) -> list[str]:
        """Name the parameters in the optimizer's order."""
        names = {p: name.removeprefix("module.") for name, p in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return [names.get(p, "") for group in groups for p in group["params"]]

    def _fit(self, saved: Any, names: list[str] | None, same_kind: bool) -> dict[str, Any]:
        """Give each parameter its momenta, and its group the settings of now."""
        fresh = self.optimizer.state_dict()
        groups = fresh["param_groups"]
        same_groups = [len(g["params"]) for g in groups] == [
            len(g["params"]) for g in saved["param_groups"]
        ]
        if names is None and not same_groups:
            raise RunError(
                "--resume: the checkpoint's optimizer has other groups of parameters, and does not "
                "name them; set the weight decays and learning rate factors as they were"
            )
        numbers = {name: i for i, name in enumerate(names or ())}
        state = saved["state"]
        if names is not None:
            places = {i: numbers.get(name) for i, name in enumerate(self._names())}
            state = {i: state[place] for i, place in places.items() if place in state}
        for i, group in enumerate(groups):
            # A schedule that is made later begins with this.
            group.setdefault("initial_lr", group["lr"])
            if same_groups:
                group["lr"] = saved["param_groups"][i]["lr"]
        return {"state": state if same_kind else {}, "param_groups": groups}


class GuardedAMPTrainer(GuardedTrainer, AMPTrainer):
    """``AMPTrainer`` that leaves out steps whose loss is not finite.

    Overflows of gradients are its scaler's own affair.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A training without mixed precision has saved none.
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict(), **state_dict})


class TellLeftOut(HookBase):
    """Says at the end of a training what was left out; ends one that has no step left to do.

    Args:
        guard: of the training's steps.
        loader: of its data.
        checkpointer: of the run.
    """

    def __init__(
        self, guard: NonFiniteGuard, loader: Any, checkpointer: PluginCheckpointer
    ) -> None:
        self.guard, self.loader, self.checkpointer = guard, loader, checkpointer

    def before_train(self) -> None:
        if self.checkpointer.resumed and self.trainer.start_iter >= self.trainer.max_iter:
            self.checkpointer.finish()

    def after_train(self) -> None:
        if self.guard.total:
            logger.warning("%d steps were left out, as their loss was not finite", self.guard.total)
        names: Any = getattr(self.loader, "left_out", Counter())
        if told := summarize_left_out(names):
            logger.warning(told)


def without_base_lrs(state: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a trainer's state without the learning rates that its schedule began with."""
    hooks = dict(state.get("hooks", {}))
    if "LRScheduler" in hooks:
        hooks["LRScheduler"] = {k: v for k, v in hooks["LRScheduler"].items() if k != "base_lrs"}
    return {**state, "hooks": hooks}


def find_images(batch: Any) -> list[str]:
    """List the images of a batch, as far as their paths are known."""
    samples = batch if isinstance(batch, (list, tuple)) else []
    return [str(s["file_name"]) for s in samples if isinstance(s, dict) and "file_name" in s]
