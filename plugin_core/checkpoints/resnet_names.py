"""Checks of the ResNets in a checkpoint file, by its parameters' names."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from plugin_core.checkpoints.reading import read_checkpoint
from plugin_core.files import file_state

_BLOCK_PARAMETER = re.compile(
    r"(?<![^\W_])(?:res([2-5])|layer([1-4])|resnet_layer\.([4-7]))"
    r"[._](\d{1,2})[._](?:conv|branch2)([1-3abc])[._]"
)
# The kinds of names, in the order of the groups above
_OWNERS = {
    **{"res": "Detectron2's", "layer": "torchvision's or MMDetection's"},
    "sequential": "an nn.Sequential's",
}
_STAGES = (1, 2, 3, 4)
# (blocks of the four stages, whether a block has a third convolution) → depth
_RESNET_DEPTHS: dict[tuple[tuple[int, ...], bool], int] = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}
RESNET_DEPTHS = tuple(_RESNET_DEPTHS.values())


def check_resnet_checkpoint(path: str, depth: int, setting: str, depth_setting: str) -> None:
    """Check that the ResNet in a checkpoint, if there is one, has the depth of the model.

    The frameworks load the tensors that fit and only log the rest. A model would silently start
    from a part of another one's weights.

    Args:
        path: of the checkpoint.
        depth: of the model's ResNet.
        setting: setting that names the checkpoint, for the message.
        depth_setting: setting of the depth, for the message.

    Raises:
        ValueError: if the file is missing, empty, or holds a ResNet of another depth.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{setting}: checkpoint {path!r} is empty")
    found = find_resnet_depths(path)
    if found and depth not in found:
        names = " and a ".join(f"ResNet-{d}" for d in sorted(found))
        raise ValueError(
            f"{setting}: {path!r} holds a {names}, but {depth_setting} is {depth}; "
            f"use a checkpoint of a ResNet-{depth} or set {depth_setting} to {min(found)}"
        )


def check_resnet_names(path: str, spelling: str, setting: str, command: str) -> set[str]:
    """Check that a framework knows the names of the ResNets in a checkpoint, if there are any.

    With names of another kind, a framework finds no tensor and goes on with random weights.

    Args:
        path: of a non-empty checkpoint.
        spelling: "res" for Detectron2's and Caffe2's names, "layer" for torchvision's and
            MMDetection's.
        setting: setting that names the checkpoint, for the message.
        command: command that converts the checkpoint, for the message.

    Returns:
        The prefixes of the ResNets' names, such as "backbone."; empty if there is no ResNet.

    Raises:
        ValueError: if all ResNets have names of another kind.
    """
    found = {
        (kind, network)
        for network, match in _block_parameters(path)
        for kind, stage in zip(_OWNERS, match.groups(), strict=False)
        if stage
    }
    if found and all(kind != spelling for kind, _ in found):
        theirs = " and ".join(sorted({_OWNERS[kind] for kind, _ in found}))
        raise ValueError(
            f"{setting}: {path!r} has {theirs} names, of which none would be loaded; convert it: "
            f"{command}"
        )
    return {network for kind, network in found if kind == spelling}


def find_resnet_depths(path: str) -> set[int]:
    """Find the depths of the ResNets in a checkpoint file; empty if they are unclear.

    Args:
        path: of a file with parameters named as in torchvision (``layer1.0.conv1``),
            Detectron2 (``res2.0.conv1``), Caffe2 (``res2_0_branch2a``) or IDA's reproduction
            (``resnet_layer.4.0.conv1``). Several networks, such as teacher and student, differ in
            their prefixes.
    """
    blocks: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    deep: set[str] = set()  # networks with a third convolution in their blocks
    for network, match in _block_parameters(path):
        res, layer, child, block, convolution = match.groups()
        stage = int(layer) if layer else int(res) - 1 if res else int(child) - 3
        blocks[network].add((stage, int(block)))
        if convolution in ("3", "c"):
            deep.add(network)
    depths = set()
    for network, found in blocks.items():
        counts = tuple(
            max((b for s, b in found if s == stage), default=-1) + 1 for stage in _STAGES
        )
        depth = resnet_depth(counts, network in deep)
        if depth is not None:
            depths.add(depth)
    return depths


def resnet_depth(blocks: tuple[int, ...], has_third_convolution: bool) -> int | None:
    """Find the depth of a ResNet by the number of blocks in its four stages; None if none fits.

    The last stage may have 0 blocks: a C4 detector has this stage in its RoI head.
    """
    for (known, has_third), depth in _RESNET_DEPTHS.items():
        if has_third == has_third_convolution and blocks in (known, (*known[:3], 0)):
            return depth
    return None


def names_in(path: str) -> list[str]:
    """List the keys of a checkpoint and of the state dicts in it; empty if it cannot be read."""
    try:
        return _names(path, *file_state(path))
    except (OSError, ValueError):
        return []  # whoever loads the file says what is wrong with it


@lru_cache(maxsize=1)
def _names(path: str, *state: int) -> list[str]:
    return list(_keys(read_checkpoint(path)))


def _keys(node: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(key, str):
            yield key
        if isinstance(value, Mapping):
            yield from _keys(value)


def _block_parameters(path: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Find each parameter of a ResNet's block in a file, as (network's name, match)."""
    for name in names_in(path):
        if match := _BLOCK_PARAMETER.search(name):
            yield name[: match.start()], match
