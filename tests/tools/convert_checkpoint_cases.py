"""Networks with random weights, and their features, for the tests of convert_checkpoint.py."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core import TripletAttention

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def needs(framework: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"{framework} is not installed")


BOTH = pytest.mark.parametrize(
    "to", [pytest.param("d2", marks=needs("detectron2")), pytest.param("mm", marks=needs("mmdet"))]
)


# ------------------------------------------------------------------------------- the authors' side


@functools.cache
def authors_resnet(depth: int, *, attention: bool = True, kernel_size: int = 7) -> nn.Module:
    """torchvision's classifier with attention in its blocks and values of its own; to be read."""
    net = getattr(torchvision.models, f"resnet{depth}")()
    for block in residual_blocks(net) if attention else ():
        block.triplet_attention = TripletAttention(kernel_size=kernel_size)
    return randomized(net)


def caffe2_weights(net: nn.Module) -> dict[str, np.ndarray]:
    """A ResNet in Caffe2's names, its norms without statistics."""
    weights: dict[str, np.ndarray] = {}

    def add(conv: nn.Module, norm: nn.Module, conv_name: str, norm_name: str) -> None:
        weights[f"{conv_name}_w"] = conv.weight.detach().numpy()
        weights[f"{norm_name}_bn_s"] = norm.weight.detach().numpy()
        weights[f"{norm_name}_bn_b"] = norm.bias.detach().numpy()

    add(net.conv1, net.bn1, "conv1", "res_conv1")
    weights["conv1_b"] = np.zeros(64, dtype=np.float32)
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(getattr(net, f"layer{stage}")):
            at = f"res{stage + 1}_{i}_branch"
            for letter, number in (("a", 1), ("b", 2), ("c", 3)):
                name = f"{at}2{letter}"
                add(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"), name, name)
            if block.downsample is not None:
                add(*block.downsample, f"{at}1", f"{at}1")
    weights["fc1000_w"] = net.fc.weight.detach().numpy()
    return weights


def authors_mobilenet(kernel_size: int = 7) -> nn.Module:
    net = torchvision.models.mobilenet_v2()
    for feature in net.features[1:18]:
        feature.conv.append(TripletAttention(kernel_size=kernel_size))
    return randomized(net)


def randomized(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(std=(2 / module.weight[:, 0].numel()) ** 0.5)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.3, 0.9)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    return net.eval()


def residual_blocks(net: nn.Module) -> Iterator[nn.Module]:
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        yield from stage


@torch.no_grad()
def resnet_features(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of all blocks, computed without either framework."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, stride=2, padding=1)
    outputs = []
    for block in residual_blocks(net):
        y = F.relu(block.bn1(block.conv1(x)))
        y = block.bn2(block.conv2(y))
        if hasattr(block, "conv3"):
            y = block.bn3(block.conv3(F.relu(y)))
        if hasattr(block, "triplet_attention"):
            y = block.triplet_attention(y)
        x = F.relu(y + (x if block.downsample is None else block.downsample(x)))
        outputs.append(x)
    return outputs


@torch.no_grad()
def mobilenet_features(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of all inverted residuals."""
    outputs = []
    for index, feature in enumerate(net.features[:18]):
        x = feature(x)
        if index > 0:
            outputs.append(x)
    return outputs


# ----------------------------------------------------------------------------- the frameworks' side


@torch.no_grad()
def outputs_of_blocks(net: nn.Module, x: Tensor, stages: Iterable[str]) -> list[Tensor]:
    outputs: list[Tensor] = []
    for stage in stages:
        for block in getattr(net, stage):
            block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    net.eval()
    net(x)
    return outputs


D2_CONFIG = """
VERSION: 2
INPUT: {{FORMAT: RGB}}
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  PIXEL_MEAN: {mean}
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {{NAME: build_resnet_plugin_backbone}}
  RPN: {{IN_FEATURES: [res4]}}
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {channels}
    OUT_FEATURES: [res2, res3, res4, res5]
    STRIDE_IN_1X1: {stride_in_1x1}
    PLUGINS: {plugins}
"""


TRIPLET = "[{NAME: triplet_attention, STAGES: [res2, res3, res4, res5]}]"


def detectron2_config(
    tmp_path: Path,
    depth: int,
    *,
    attention: bool = True,
    mean: str = "[123.675, 116.28, 103.53]",
    stride_in_1x1: bool = False,
    kernel_size: int = 7,
) -> str:
    path = tmp_path / f"r{depth}.yaml"
    stages = "STAGES: [res2, res3, res4, res5]"
    plugin = f"{{NAME: triplet_attention, {stages}, KERNEL_SIZE: {kernel_size}}}"
    text = D2_CONFIG.format(
        depth=depth,
        channels=256 if depth >= 50 else 64,
        plugins=f"[{plugin}]" if attention else "[]",
        mean=mean,
        stride_in_1x1=stride_in_1x1,
    )
    path.write_text(text)
    return str(path)


@torch.no_grad()
def detectron2_features(config: str, weights: str, x: Tensor) -> list[Tensor]:
    """The outputs of all blocks, with weights as Detectron2's trainer loads ``MODEL.WEIGHTS``."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, config)
    backbone = nn.ModuleDict({"backbone": build_backbone(cfg)})
    left_over = DetectionCheckpointer(backbone).load(weights)
    assert set(left_over) <= {"matching_heuristics", "__author__", "pixel_format"}
    return outputs_of_blocks(backbone["backbone"], x, ("res2", "res3", "res4", "res5"))


@torch.no_grad()
def mmdetection_features(
    backbone: dict[str, Any], weights: str, x: Tensor, prefix: str | None = None
) -> list[Tensor]:
    """The outputs of all blocks, with weights as MMDetection loads ``init_cfg``."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    import mm_plugins  # noqa: F401  # registers the plugins

    register_all_modules(init_default_scope=False)
    init = {"type": "Pretrained", "checkpoint": weights, "prefix": prefix}
    with DefaultScope.overwrite_default_scope("mmdet"):
        built = MODELS.build({**backbone, "init_cfg": init})
        built.init_weights()
    stages = getattr(built, "res_layers", None) or [f"layer{i}" for i in range(1, 8)]
    return outputs_of_blocks(built, x, stages)


def mmdetection_backbone(
    depth: int, *, attention: bool = True, kernel_size: int = 7
) -> dict[str, Any]:
    position = "after_conv3" if depth >= 50 else "after_conv2"
    module = {"type": "TripletAttention", "kernel_size": kernel_size}
    plugins = [{"cfg": module, "position": position}]
    resnet = {"type": "PluginResNet", "depth": depth}
    return resnet | {"plugins": plugins} if attention else resnet


def features(
    to: str, depth: int, tmp_path: Path, weights: Path, x: Tensor, kernel_size: int = 7
) -> list[Tensor]:
    if to == "d2":
        config = detectron2_config(tmp_path, depth, kernel_size=kernel_size)
        return detectron2_features(config, str(weights), x)
    backbone = mmdetection_backbone(depth, kernel_size=kernel_size)
    return mmdetection_features(backbone, str(weights), x)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3  # there is something to compare
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def run(source: Path, out: Path, to: str, *options: str) -> int:
    return convert_checkpoint.main([str(source), str(out), "--to", to, *options])
