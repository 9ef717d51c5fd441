"""Leaving out steps whose loss is not finite, and stopping when there are too many."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
_NAMED_STEPS = 3  # further ones are counted only


class NonFiniteLoss(RuntimeError):
    """The loss was not finite for too many steps in a row."""


class NonFiniteGuard:
    """Decide, alike in all processes, whether a step's losses are finite, and count.

    Args:
        limit: number of steps in a row without a finite loss that ends the training.
        setting: that holds the limit, for the message.
        last_checkpoint: gives the path of the last checkpoint, or None. It is asked at the first
            of several steps in a row, as later checkpoints are no better.

    Attributes:
        steps: checked so far.
        skipped: steps that were not finite.
        in_a_row: the last steps that were not finite, without a finite one between them.

    Raises:
        ValueError: if the limit is no whole number from 1.
    """

    def __init__(
        self,
        limit: int = 20,
        setting: str = "",
        last_checkpoint: Callable[[], str | None] = lambda: None,
    ) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"{setting or 'limit'}: must be a whole number from 1, got {limit!r}")
        self.limit, self.setting, self.last_checkpoint = limit, setting, last_checkpoint
        self.steps = self.skipped = self.in_a_row = 0
        self._good: str | None = None

    def check(self, losses: Mapping[str, Tensor], batch: Callable[[], str]) -> bool:
        """Tell whether a step's losses are all finite; otherwise the step is to be left out.

        Args:
            losses: by name, of this process.
            batch: names the images of this process.

        Raises:
            NonFiniteLoss: if it is one step too many.
        """
        self.steps += 1
        values = torch.stack([loss.detach().float().sum() for loss in losses.values()])
        wrong = (~torch.isfinite(values)).any().float()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX)
        if not wrong.item():
            self.in_a_row = 0
            return True
        if not self.in_a_row:
            self._good = self.last_checkpoint()
        self.skipped += 1
        self.in_a_row += 1
        told = [
            f"{name} is {value}"
            for name, value in zip(losses, values.tolist(), strict=True)
            if not math.isfinite(value)
        ]
        what = f"{', '.join(told) or 'the loss of another process'}; images: {batch()}"
        if self.in_a_row >= self.limit:
            where = f" ({self.setting})" if self.setting else ""
            raise NonFiniteLoss(
                f"the loss was not finite in {self.in_a_row} steps in a row{where}; in the last, "
                f"{what}; last checkpoint before: {self._good or 'none'}; lower the learning rate, "
                "clip gradients, or look at these images and their boxes"
            )
        if self.skipped <= _NAMED_STEPS:
            more = "; further ones are only counted" if self.skipped == _NAMED_STEPS else ""
            logger.warning(f"Step skipped, as its loss is not finite: {what}{more}")
        return False

    def summary(self) -> str | None:
        """Say how many steps were skipped; None if none was."""
        if not self.skipped:
            return None
        return f"{self.skipped} of {self.steps} steps were skipped, as their loss was not finite"
