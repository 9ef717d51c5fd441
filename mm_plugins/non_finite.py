"""Leaving out steps whose loss is not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from plugin_core.training.non_finite import (
    MAX_NON_FINITE_STEPS,
    NonFiniteGuard,
    NonFiniteLoss,
    copy_statistics,
    restore_statistics,
)


class GuardedMixin(OptimWrapper):
    """An optimizer's wrapper that leaves out steps whose loss is not finite.

    Neither parameters nor batch norms' statistics change in such a step. Where gradients of several
    steps are accumulated, the whole update is left out.

    Args:
        max_non_finite_steps: number of such steps in a row that ends the training.
        **arguments: of mmengine's wrapper.
    """

    def __init__(
        self, *, max_non_finite_steps: int = MAX_NON_FINITE_STEPS, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.guard = NonFiniteGuard(max_non_finite_steps, "optim_wrapper.max_non_finite_steps")
        self.losses: dict[str, Any] = {}
        self.batch: Any = None
        self._left_out = False
        self._statistics: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        self._statistics = copy_statistics(model)
        with super().optim_context(model):
            yield

    def update_params(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        losses = {**dict(_mean_losses(self.losses)), "loss": loss}
        try:
            wrong = self.guard.check(losses, find_images(self.batch))
        except NonFiniteLoss as error:
            last = self.message_hub.get_info("last_ckpt") or "none"
            raise NonFiniteLoss(f"{error}; last checkpoint: {last}") from None
        if wrong:
            print_log(f"Step left out: {wrong}", "current", logging.WARNING)
            self._left_out = True
            restore_statistics(self._statistics)
        if not self._left_out:
            super().update_params(loss, *arguments, **keywords)
            return
        self.zero_grad()
        self._inner_count += 1
        if self.should_update():
            self._left_out = False


@OPTIM_WRAPPERS.register_module()
class GuardedOptimWrapper(GuardedMixin):
    """:class:`OptimWrapper` that leaves out steps whose loss is not finite."""


@OPTIM_WRAPPERS.register_module()
class GuardedAmpOptimWrapper(GuardedMixin, AmpOptimWrapper):
    """:class:`AmpOptimWrapper` that leaves out steps whose loss is not finite."""


def _mean_losses(losses: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Give the losses of a model's forward as mmengine adds them up."""
    for name, values in losses.items():
        if "loss" in name:
            parts = [values] if isinstance(values, Tensor) else values
            yield name, sum((part.detach().mean() for part in parts), torch.zeros(()))


def find_images(batch: Any) -> Sequence[str]:
    """List the images of a batch, as far as their paths are known."""
    if isinstance(batch, dict):
        batch = [*batch.values()]
    if isinstance(batch, (list, tuple)):
        return [path for part in batch for path in find_images(part)]
    path = getattr(batch, "metainfo", {}).get("img_path")
    return [path] if isinstance(path, str) else []
