"""Names of networks' parameters in the spellings of checkpoints, and small files of them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugin_core import TripletAttention

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)
# MobileNetV2 in MMDetection's and torchvision's names.
MOBILENET = {
    "conv1.conv.weight": "features.0.0.weight",
    "conv1.bn.running_mean": "features.0.1.running_mean",
    "layer1.0.depthwise_conv.conv.weight": "features.1.conv.0.0.weight",
    "layer1.0.depthwise_conv.bn.bias": "features.1.conv.0.1.bias",
    "layer1.0.linear_conv.conv.weight": "features.1.conv.1.weight",
    "layer1.0.linear_conv.bn.weight": "features.1.conv.2.weight",
    "layer1.0.triplet_attention.cw.conv.conv.weight": "features.1.conv.3.cw.conv.conv.weight",
    "layer2.0.expand_conv.conv.weight": "features.2.conv.0.0.weight",
    "layer2.0.expand_conv.bn.weight": "features.2.conv.0.1.weight",
    "layer2.0.depthwise_conv.conv.weight": "features.2.conv.1.0.weight",
    "layer2.0.linear_conv.bn.bias": "features.2.conv.3.bias",
    "layer2.1.linear_conv.conv.weight": "features.3.conv.2.weight",
    "layer3.0.expand_conv.conv.weight": "features.4.conv.0.0.weight",
    "layer6.2.triplet_attention.hw.conv.bn.bias": "features.16.conv.4.hw.conv.bn.bias",
    "layer7.0.triplet_attention.alpha": "features.17.conv.4.alpha",
    "conv2.conv.weight": "features.18.0.weight",
    "conv2.bn.bias": "features.18.1.bias",
    "fc.weight": "classifier.1.weight",
}


def write_pickle(content: Any, path: Path, protocol: int = 4) -> None:
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol)


def resnet(depth: int, *, attention: bool = False) -> dict[str, Tensor]:
    """Some of a ResNet's state dict in torchvision's names, all of one shape."""
    names = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            names += [f"{at}.conv{i}.weight" for i in range(1, 3 if depth < 50 else 4)]
            names += [f"{at}.bn1.{end}" for end in ("weight", "bias", "num_batches_tracked")]
            if attention:
                names += [f"{at}.triplet_attention.{n}" for n in TripletAttention().state_dict()]
    return {name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}


def detectron2(state_dict: Iterable[str]) -> list[str]:
    """The names of :func:`resnet` in Detectron2's spelling."""
    renamed = []
    for name in state_dict:
        if name.startswith("layer"):
            name = f"res{int(name[5]) + 1}{name[6:]}".replace(".bn1.", ".conv1.norm.", 1)
        else:
            name = "stem." + name.replace("bn1.", "conv1.norm.")
        renamed.append(name)
    return renamed


def sequential(state_dict: Iterable[str]) -> list[str]:
    """The names of :func:`resnet` as IDA's public reproduction has them, in an nn.Sequential."""
    children = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}
    split = [name.partition(".") for name in state_dict]
    return [f"{children[child]}.{rest}" for child, _, rest in split]


def caffe2(depth: int) -> list[str]:
    """Names of a ResNet's convolutions in Caffe2's spelling."""
    branches = "ab" if depth < 50 else "abc"
    return ["conv1_w"] + [
        f"res{stage}_{block}_branch2{branch}_w"
        for stage, blocks in enumerate(BLOCKS[depth], start=2)
        for block in range(blocks)
        for branch in branches
    ]


def zeros(names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}
