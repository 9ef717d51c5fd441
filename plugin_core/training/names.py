"""Names of a checkpoint's tensors, with a prefix that some trainings put before them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any

from plugin_core.training.errors import RunError


def fit_names(state: dict[str, Any], wanted: Collection[str], setting: str = "checkpoint") -> None:
    """Take a prefix such as ``module.``, ``model.`` or ``ema_`` off the names in a checkpoint.

    Nothing changes if a name fits, or if no prefix makes most of them fit.

    Args:
        state: tensors by name, which is changed.
        wanted: names in the model.
        setting: that names the checkpoint, for the message.

    Raises:
        RunError: if several prefixes fit equally well, as those of a student and a teacher do.
    """
    if any(name in wanted for name in state):
        return
    prefixes = {
        name.removesuffix(end)
        for end in islice(wanted, 5)  # the file may lack one
        for name in state
        if name.endswith(end)
    }
    fitting = {prefix: sum(prefix + name in state for name in wanted) for prefix in prefixes}
    most = max(fitting.values(), default=0)
    if 2 * most <= len(wanted):
        return
    best, *others = sorted(prefix for prefix, count in fitting.items() if count == most)
    if others:
        raise RunError(
            f"{setting}: the checkpoint holds several models, with the names' prefixes "
            f"{', '.join(map(repr, [best, *others]))}, which fit alike; make a file of one of them"
        )
    fitted = {n.removeprefix(best): v for n, v in state.items() if n.startswith(best)}
    state.clear()
    state.update(fitted)
