"""Names of a checkpoint's tensors, with a prefix that some trainings put before them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any


def fit_names(state: dict[str, Any], wanted: Collection[str]) -> None:
    """Take a prefix such as ``module.``, ``model.`` or ``ema_`` off the names in a checkpoint.

    Nothing changes if a name fits, or if no prefix makes most of them fit.

    Args:
        state: tensors by name, which is changed.
        wanted: names in the model.
    """
    if any(name in wanted for name in state):
        return
    prefixes = {
        name.removesuffix(end)
        for end in islice(wanted, 5)  # the file may lack one
        for name in state
        if name.endswith(end)
    }
    fitting = {
        prefix: {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        for prefix in prefixes
    }
    best = max(fitting.values(), key=lambda names: len(names.keys() & wanted), default={})
    if 2 * len(best.keys() & wanted) > len(wanted):
        state.clear()
        state.update(best)
