"""Going on with another learning rate, schedule or length than a training began with."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

_SCHEDULE = re.compile(
    r"optim_wrapper\.(optimizer|paramwise_cfg|constructor)\b|param_scheduler\b|auto_scale_lr\b"
)
_LENGTH = re.compile(r"train_cfg\.max_(epochs|iters)$")


class ResumeError(ValueError):
    """A training cannot go on from a checkpoint with the settings that it is given."""


class Changes:
    """What differs between the settings of a checkpoint and those of now.

    Args:
        old: the config's text in the checkpoint. It is read, but not run.
        new: the config's text now.
    """

    def __init__(self, old: str, new: str) -> None:
        before, now = (dict(_flatten(text)) for text in (old, new))
        self.settings = {
            key: (before.get(key, "nothing"), now.get(key, "nothing"))
            for key in [*now, *(key for key in before if key not in now)]
            if before.get(key) != now.get(key) and (_SCHEDULE.match(key) or _LENGTH.match(key))
        }

    @property
    def of_schedule(self) -> bool:
        """Whether the optimizer and its schedulers are concerned, not the length alone."""
        return any(map(_SCHEDULE.match, self.settings))

    def __str__(self) -> str:
        return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in self.settings.items())


def _flatten(text: str) -> Iterator[tuple[str, str]]:
    """List the settings of a config's text, each with its value's source."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield from _leaves(statement.targets[0].id, statement.value)


def _leaves(name: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        for keyword in node.keywords:
            yield from _leaves(f"{name}.{keyword.arg}", keyword.value)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            shown = ast.unparse(key).strip("'") if key else "**"
            yield from _leaves(f"{name}.{shown}", value)
    elif isinstance(node, (ast.List, ast.Tuple)) and any(
        isinstance(part, (ast.Call, ast.Dict)) for part in node.elts
    ):
        for i, part in enumerate(node.elts):
            yield from _leaves(f"{name}[{i}]", part)
    else:
        yield name, ast.unparse(node)


def take_new_settings(checkpoint: dict[str, Any], wrapper: OptimWrapper, changes: Changes) -> None:
    """Replace the schedule in a checkpoint by that of a newly built optimizer.

    Momentum and other state of the parameters stay.

    Args:
        checkpoint: content of the file, which is changed.
        wrapper: around the optimizer at its first step.
        changes: for the message.

    Raises:
        ResumeError: if the state is not that of such an optimizer.
    """
    kind = changes.settings.get("optim_wrapper.optimizer.type")
    state = checkpoint["optimizer"]
    new_groups = wrapper.optimizer.param_groups
    sizes = [
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], new_groups)
    ]
    if kind or sizes[0] != sizes[1]:
        raise ResumeError(
            f"--resume: the optimizer's state does not fit the settings ({changes}); keep the "
            "optimizer's type and its groups of parameters, or begin a new training with "
            "load_from=CHECKPOINT"
        )
    state["param_groups"] = [
        {**new, "params": old["params"]}
        for old, new in zip(state["param_groups"], new_groups, strict=True)
    ]
    if wrapper.base_param_settings is not None:
        state["base_param_settings"] = dict(wrapper.base_param_settings)
    checkpoint.pop("param_schedulers", None)


def replay(
    schedulers: Sequence[_ParamScheduler], iterations: int, epochs: int, epoch_length: int
) -> None:
    """Bring newly built schedulers to the step at which a training goes on.

    Args:
        schedulers: of one optimizer, which they set as they go.
        iterations: that the training has done.
        epochs: that it has ended.
        epoch_length: iterations of an epoch.
    """
    by_epoch = [one for one in schedulers if one.by_epoch]
    by_iteration = [one for one in schedulers if not one.by_epoch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's habit of a step of the optimizer in between
        ended = 0
        for done in range(1, iterations + 1):
            for one in by_iteration:
                one.step()
            if done % epoch_length == 0 and ended < epochs:
                ended += 1
                for one in by_epoch:
                    one.step()
        for _ in range(ended, epochs):
            for one in by_epoch:
                one.step()
