"""Checks of a run's input files that both frameworks' sides make before anything is written.

They read as little as possible, so that they cost nothing on COCO itself: a file of annotations is
searched, not parsed, and a checkpoint's parameter names are found without loading it.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import defaultdict

_EMPTY_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[\s*\]')
_BLOCK_PARAMETER = re.compile(
    rb"(?:res([2-5])|layer([1-4]))[._](\d{1,2})[._](?:conv|branch2)([1-3abc])[._]"
)
# (blocks of the four stages, whether a block has a third convolution) → depth
_RESNET_DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


def check_coco_json(path: str, setting: str) -> None:
    """Check that ``path`` is a whole COCO-format annotation file that holds something.

    Args:
        path: of the JSON file.
        setting: what the user has to change, for the message.

    Raises:
        ValueError: if the file is missing, empty, cut off, or lists no images or annotations.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no annotation file {path!r}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{setting}: annotation file {path!r} is empty; expected COCO-format JSON")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:64].lstrip()[:1] != b"{" or data[-64:].rstrip()[-1:] != b"}":
            raise ValueError(
                f"{setting}: annotation file {path!r} is no whole COCO-format JSON object "
                "(it must begin with '{' and end with '}')"
            )
        empty = _EMPTY_LIST.search(data)
        if empty:
            raise ValueError(
                f"{setting}: annotation file {path!r} has an empty list of {empty[1].decode()}"
            )


def check_resnet_checkpoint(path: str, depth: int, setting: str, depth_setting: str) -> None:
    """Check that the ResNet in a checkpoint, if it is one, has the depth of the model.

    The frameworks load what fits and only log the rest, so that a model silently starts from a part
    of another one's weights.

    Args:
        path: of the checkpoint.
        depth: of the model's ResNet.
        setting: that names the checkpoint, for the message.
        depth_setting: that names the depth, for the message.

    Raises:
        ValueError: if the file is missing, empty, or holds a ResNet of another depth.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{setting}: checkpoint {path!r} is empty")
    found = find_resnet_depth(path)
    if found is not None and found != depth:
        raise ValueError(
            f"{setting}: {path!r} holds a ResNet-{found}, but {depth_setting} is {depth}; "
            f"use a checkpoint of a ResNet-{depth} or set {depth_setting} to {found}"
        )


def find_resnet_depth(path: str) -> int | None:
    """Depth of the ResNet whose parameters a checkpoint file holds, or None if that is unclear.

    The names of the parameters stand in the file as they are, whether PyTorch, pickle or
    safetensors wrote it, so they are searched for and nothing of the file is executed.

    Args:
        path: of a non-empty file with parameters named as torchvision (``layer1.0.conv1``),
            Detectron2 (``res2.0.conv1``) or Caffe2 (``res2_0_branch2a``) names them.
    """
    blocks: defaultdict[int, set[int]] = defaultdict(set)
    has_third_convolution = False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for res, layer, block, convolution in _BLOCK_PARAMETER.findall(data):
            stage = int(res) - 1 if res else int(layer)
            blocks[stage].add(int(block))
            has_third_convolution |= convolution in (b"3", b"c")
    counts = tuple(max(blocks[stage], default=-1) + 1 for stage in (1, 2, 3, 4))
    return _RESNET_DEPTHS.get((counts, has_third_convolution))  # type: ignore[arg-type]
