"""Leaving out steps whose loss is not finite, and stopping when there are too many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from plugin_core.training.errors import RunError

MAX_NON_FINITE_STEPS = 20


class NonFiniteLoss(RunError):
    """The loss was not finite for too many steps in a row."""


class NonFiniteGuard:
    """Decide, alike in all processes, whether a step's losses are finite, and count.

    Args:
        limit: number of steps in a row without a finite loss that ends the training.
        setting: that holds the limit, for messages.

    Attributes:
        in_a_row: number of steps since the last one whose loss was finite.
        total: number of steps without a finite loss.

    Raises:
        ValueError: if the limit is no whole number from 1.
    """

    def __init__(self, limit: int, setting: str) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"{setting}: must be a whole number from 1, got {limit!r}")
        self.limit, self.setting = limit, setting
        self.in_a_row = self.total = 0

    def check(self, losses: Mapping[str, Tensor], images: Sequence[str]) -> str | None:
        """Say what is wrong with a step that is to be left out; None if nothing is.

        Args:
            losses: of this process by name, with "loss", their sum.
            images: of this process's part of the batch.

        Raises:
            NonFiniteLoss: if it is one step too many.
        """
        bad = (~torch.isfinite(losses["loss"].detach())).any().float().reshape(1)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        if not bad.item():
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        self.total += 1
        values = {name: value.detach().mean().item() for name, value in losses.items()}
        wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
        told = f"{', '.join(wrong) or 'the loss of another process'} with the images " + (
            ", ".join(images) or "of this batch"
        )
        if self.in_a_row >= self.limit:
            raise NonFiniteLoss(
                f"the loss was not finite in {self.in_a_row} steps in a row ({self.setting}); "
                f"in the last {told}"
            )
        return told


def copy_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copy the statistics that batch norms change in a forward, each beside the one in use."""
    return [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
    ]


@torch.no_grad()
def restore_statistics(statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Undo what a forward has done since :func:`copy_statistics`."""
    for buffer, before in statistics:
        buffer.copy_(before)
