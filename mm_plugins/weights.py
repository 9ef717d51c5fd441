"""Checks of the weights that a run begins with, before it writes anything."""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mm_plugins.block_plugins import BlockPlugin
from mm_plugins.init_cfgs import pretrained
from plugin_core.checkpoints.reading import read_checkpoint
from plugin_core.errors import StateDictError, few
from plugin_core.published_names import find_unread, rename_all_published
from plugin_core.training.checkpoint_files import check_readable
from plugin_core.training.names import fit_names as fit

_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def check_init_checkpoints(model: nn.Module, config: Any) -> list[str]:
    """Check the checkpoints that parts of a model begin with, as their ``init_cfg`` says.

    Args:
        model: built from the config.
        config: of the model.

    Returns:
        What to warn of.

    Raises:
        ValueError: if a file cannot be read, or none of its tensors fits.
    """
    found = []
    for setting, init in _init_cfgs(config, "model"):
        path, prefix = init.get("checkpoint"), init.get("prefix") or ""
        if isinstance(path, str) and "://" not in path:
            where = setting.removeprefix("model").lstrip(".")
            part: Any = model
            for name in where.split(".") if where else []:
                part = getattr(part, name, None)
            if isinstance(part, nn.Module):
                found += check_weights(
                    part, path, f"{setting}.init_cfg.checkpoint", whole=False, prefix=prefix
                )
    return found


def _init_cfgs(node: Any, setting: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, dict):
        for init in pretrained(node.get("init_cfg")):
            yield setting, init
        for key, value in node.items():
            if key != "init_cfg":
                yield from _init_cfgs(value, f"{setting}.{key}")


def check_weights(
    model: nn.Module, path: str, setting: str, *, whole: bool, prefix: str = ""
) -> list[str]:
    """Check that a checkpoint can be read and fits a model.

    Args:
        model: without memory for its parameters, or one that is not needed any more.
        path: of the file.
        setting: that names it, for the message.
        whole: whether the model runs with these weights alone, so that each has to be there.
        prefix: of the names in the file that the model is given without it.

    Returns:
        What to warn of, where the weights are only a beginning.

    Raises:
        ValueError: names the setting, the file and what is wrong.
    """
    path = os.path.expanduser(path)
    check_readable(path, setting)
    content = dict(read_checkpoint(path))
    if not setting.endswith("init_cfg.checkpoint"):  # mmengine takes such a file as it is
        fit_names(content, model, setting)
    state = content.get("state_dict", content)
    tensors = {
        name.removeprefix("module.").removeprefix(prefix): value
        for name, value in state.items()
        if isinstance(value, Tensor) and name.removeprefix("module.").startswith(prefix)
    }
    try:
        missing, unexpected, mismatched = _load(model, tensors)
    except StateDictError as error:
        raise ValueError(f"{setting}: {path!r}: {error}") from error
    except Exception:  # of a module that computes with its weights while they are loaded
        return []
    own, inner = model.state_dict().keys(), {n.removeprefix("backbone.") for n in unexpected}
    if not prefix and not own & tensors.keys() and own & inner:
        raise ValueError(
            f"{setting}: {path!r} is of a whole model, whose backbone is below 'backbone.'; add "
            "prefix='backbone.' beside the checkpoint"
        )
    if told := find_unread(model, missing, unexpected, tensors):
        raise ValueError(f"{setting}: {path!r}: {told}")
    if len(unexpected) + len(mismatched) >= len(tensors):
        example = next(iter(mismatched.values()), f"{next(iter(state), 'nothing')!r}")
        raise ValueError(
            f"{setting}: no tensor of {path!r} fits the model (it holds {example}); name a "
            "checkpoint of this model"
        )
    shapes = few(mismatched.values())
    if whole and mismatched:
        raise ValueError(
            f"{setting}: {path!r} is of another model, as with another number of classes; "
            f"random weights would be evaluated in the place of {shapes}"
        )
    if getattr(model, "trains", None) == "masks":  # of a panoptic DETR: all else stays as it is
        lost = [n for n in (*missing, *mismatched) if not n.startswith("panoptic_head.")]
        if lost := [n for n in lost if not n.endswith("num_batches_tracked")]:
            raise ValueError(
                f"{setting}: {path!r} lacks weights that would stay random, as "
                f"model.trains='masks' trains the mask head alone: {few(lost)}"
            )
    starting = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if (isinstance(module, BlockPlugin) and module.alpha is not None)
        or getattr(module, "training_only", False)
    )  # they are the identity without weights, or absent from evaluation
    missing = [n for n in missing if not n.endswith("num_batches_tracked")]
    missing = [n for n in missing if not n.startswith(starting)]
    if whole and missing:
        raise ValueError(
            f"{setting}: {path!r} lacks weights of the model, which would be evaluated with random "
            f"ones: {few(missing)}"
        )
    return (
        [
            f"{setting}: {path!r} has other shapes, as with another number of classes; these "
            f"weights begin at random: {shapes}"
        ]
        if mismatched
        else []
    )


def _load(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], list[str], dict]:
    """Load tensors as the model's parts do, and say which are missing, left over or misshapen."""
    mismatched: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters without memory
        try:
            result = model.load_state_dict(OrderedDict(tensors), strict=False)
        except RuntimeError as error:
            for name, old, new in _MISMATCH.findall(str(error)):
                if name not in tensors:  # PyTorch calls a block plugin's tensor what it is inside
                    name = name.replace(".module.", ".", 1)
                mismatched[name] = f"{name} ({old} in the file, {new} in the model)"
            rest = {name: value for name, value in tensors.items() if name not in mismatched}
            result = model.load_state_dict(OrderedDict(rest), strict=False)
    missing = [name for name in result.missing_keys if name not in mismatched]
    return missing, list(result.unexpected_keys), mismatched


def fit_names(checkpoint: dict[str, Any], model: nn.Module, setting: str = "load_from") -> None:
    """Take a prefix such as ``module.`` or ``model.`` off the names in a checkpoint.

    Nothing changes if the names fit, or if no prefix makes them fit.

    Args:
        checkpoint: content of the file, which is changed.
        model: that will be given the tensors.
        setting: that names the file, for the message.

    Raises:
        RunError: if several prefixes fit equally well.
    """
    inner: Any = model.module if is_model_wrapper(model) else model
    state = checkpoint.get("state_dict", checkpoint)
    fit(state, inner.state_dict().keys(), setting)
    rename_all_published(state, inner)
