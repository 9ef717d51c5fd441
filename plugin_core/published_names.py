"""Block plugins in files that name them differently, and those that a file leaves as they start."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from plugin_core.block_plugins import BlockPlugin, is_known_child, our_name


def rename_all_published(state_dict: dict[str, Any], module: nn.Module, prefix: str = "") -> None:
    """Give a module's block plugins the tensors that published files call something else, in place.

    Args:
        state_dict: whose names end as the module's do, from the block and its stage on.
        module: with block plugins below it. What has none of the published spellings, such as a
            plugin of the user's own, keeps its names.
        prefix: of the module's names.
    """
    right = {f"{prefix}{name}" for name in module.state_dict()}
    for path, plugin in module.named_modules():
        spellings = getattr(getattr(plugin, "module", None), "published_names", None)
        if not isinstance(plugin, BlockPlugin) or not spellings or not path:
            continue
        *outer, own = f"{prefix}{path}".split(".")
        siblings = dict(module.get_submodule(path.rpartition(".")[0]).named_children())
        children = (plugin.plugin_name, *getattr(plugin.module, "published_children", ()))
        names = "|".join([own, *(re.escape(c) for c in children if c not in siblings)])
        rest = "|".join([*map(re.escape, (*spellings, *spellings.values())), "alpha$"])
        block = "".join(f"{re.escape(name)}\\." for name in outer[-2:])
        before = r"(?:.*\.)?" if outer else ""
        known = re.compile(rf"({before}{block})(?:{names})\.((?:{rest}).*)")
        found = [match for key in state_dict.keys() - right if (match := known.fullmatch(key))]
        for match in found:
            parameter = our_name(match[2], spellings)
            state_dict[f"{match[1]}{own}.{parameter}"] = state_dict.pop(match[0])


def find_unread(
    model: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    given: Mapping[str, Any],
) -> str:
    """Say which block plugin a checkpoint has otherwise than the model, or leaves at its start.

    It has it with other arguments, so that its alpha would meet fresh weights, or in more blocks of
    a stage, or under another name with tensors of the same number and shapes.

    Args:
        model: that was given a checkpoint.
        missing: names of the model that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        given: all tensors of the checkpoint, by name.

    Returns:
        A sentence, or an empty text.
    """
    missing = set(missing)
    # PyTorch calls a tensor what it is called inside.
    unread = {name: given.get(name, given.get(_outside(name))) for name in unexpected}
    for path, plugin in model.named_modules():
        if not isinstance(plugin, BlockPlugin):
            continue
        *outer, child = path.split(".")
        if told := _with_other_arguments(plugin, path, given) or _in_other_blocks(path, unread):
            return told
        own = {
            name: tuple(tensor.shape)
            for name, tensor in plugin.state_dict().items()
            if name != "alpha" and not name.endswith("num_batches_tracked")
        }
        if not own or not all({f"{path}.{n}", f"{path}.module.{n}"} & missing for n in own):
            continue
        # A file of a backbone alone has shorter names, but the same for a block in its stage.
        beside = re.compile(rf"(?:.*\.)?{re.escape('.'.join(outer[-2:]))}\.([^.]+)(?=\.)")
        others: dict[str, list[tuple[int, ...]]] = {}
        for name, tensor in unread.items():
            match = beside.match(name)
            if match is None or tensor is None or name.endswith(("num_batches_tracked", "alpha")):
                continue
            if match[1] == child or not is_known_child(match[1]):  # which would be another plugin
                others.setdefault(match[0], []).append(tuple(tensor.shape))
        for other, shapes in others.items():
            if sorted(shapes) == sorted(own.values()):
                return (
                    f"{path} would stay at its start, and {other} of the checkpoint, which has "
                    "tensors of the same number and shapes, would not be read; convert it with "
                    f"tools/convert_checkpoint.py, or rename its tensors as those of {child}"
                )
    return ""


def _with_other_arguments(plugin: BlockPlugin, path: str, given: Mapping[str, Any]) -> str:
    reads = getattr(plugin.module, "arguments_in", None)
    if plugin.alpha is None:  # then fresh weights are a start like any other
        return ""
    # A file of a backbone alone has shorter names, but the same for a block in its stage.
    place = re.escape(".".join(path.split(".")[-3:]))
    known = re.compile(rf"(?:.*\.)?{place}\.(?:module\.)?(.+)")
    tensors = {match[1]: t for name, t in given.items() if (match := known.fullmatch(name))}
    own = plugin.module.state_dict()
    if reads is None or not own or not tensors:
        return ""
    try:
        theirs, ours = reads(tensors), reads(own)
    except (KeyError, ValueError):  # which would be another module's tensors
        return ""
    other = [key for key, value in theirs.items() if ours.get(key) != value]
    if not other:
        return ""
    with_, has = (", ".join(f"{k}={d.get(k)!r}" for k in other) for d in (theirs, ours))
    return (
        f"{path} was trained with {with_}, and the model has {has}; state what it was trained with"
    )


def _in_other_blocks(path: str, unread: Collection[str]) -> str:
    *_, stage, index, child = ["", "", *path.split(".")]
    known = re.compile(rf"(?:.*\.)?{re.escape(stage)}\.(\d+)\.{re.escape(child)}\..+")
    others = {match[1] for name in unread if (match := known.fullmatch(name))} - {index}
    if not others or not index.isdigit():
        return ""
    return (
        f"the checkpoint has {child} in more blocks of {stage} than the model, which has it in "
        f'block {index}: {", ".join(sorted(others))} too; state blocks "all" beside its stages'
    )


def find_cold(model: nn.Module, missing: Collection[str]) -> list[str]:
    """List the missing tensors of block plugins that are not the identity without weights."""
    cold = tuple(
        f"{path}."
        for path, plugin in model.named_modules()
        if isinstance(plugin, BlockPlugin) and plugin.alpha is None
    )
    return [n for n in missing if n.startswith(cold) and not n.endswith("num_batches_tracked")]


def _outside(name: str) -> str:
    return name.replace(".module.", ".", 1)


def read_published_children(parent: nn.Module) -> None:
    """Let a module that has block plugins below it load files that name these differently.

    A block plugin cannot do so itself: of a state dict it is shown what is below its own name.
    """
    parent._register_load_state_dict_pre_hook(_rename_children, with_module=True)


def _rename_children(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    rename_all_published(state_dict, parent, prefix)
