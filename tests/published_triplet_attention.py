"""A ResNet with triplet attention as its authors compute it, from the names that a file has.

Written from the paper (arXiv:2010.03045, section 3.2): each gate turns the map, pools its first
axis and turns the result back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# The axes of the turned map, and what the gate has been called
GATES = {
    (0, 2, 1, 3): ("cw.conv.", "ChannelGateH.spatial."),
    (0, 3, 2, 1): ("hc.conv.", "ChannelGateW.spatial."),
    (0, 1, 2, 3): ("hw.conv.", "SpatialGate.spatial."),
}
CHILDREN = ("triplet_attention", "triplet", "pcam")


def published(
    state: Mapping[str, Tensor], child: str = "triplet_attention", old_gates: bool = True
) -> dict[str, Tensor]:
    """Give a state dict of ours one of the authors' six spellings."""
    renamed = {}
    for name, value in state.items():
        if name.endswith("triplet_attention.alpha"):
            continue
        for ours, theirs in GATES.values():
            gate = theirs if old_gates else ours
            name = name.replace(f"triplet_attention.{ours}", f"{child}.{gate}")
        renamed[name] = value
    return renamed


def normalize(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def attend(state: Mapping[str, Tensor], block: str, x: Tensor) -> Tensor:
    """x (B, C, H, W) times the mean of the three gates of a block."""
    gated = []
    for axes, names in GATES.items():
        known = [f"{block}.{child}.{name}" for child in CHILDREN for name in names]
        (gate,) = (name for name in known if f"{name}conv.weight" in state)
        turned, kernel = x.permute(axes), state[f"{gate}conv.weight"]
        pooled = torch.stack([turned.amax(dim=1), turned.mean(dim=1)], dim=1)
        scores = F.conv2d(pooled, kernel, padding=kernel.shape[-1] // 2)
        scores = normalize(state, f"{gate}bn", scores)
        gated.append((turned * scores.sigmoid()).permute(axes))  # each turn is its own inverse
    return sum(gated[1:], gated[0]) / 3


def of_torchvision(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take what is below a prefix, and give Detectron2's names to torchvision's tensors."""
    renamed = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix).replace("stem.conv1.norm.", "bn1.").replace("stem.", "")
        for i in (1, 2, 3, 4):
            name = name.replace(f"res{i + 1}.", f"layer{i}.").replace(f".conv{i}.norm.", f".bn{i}.")
        name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        renamed[name] = value
    return renamed


@torch.no_grad()
def resnet_features(state: Mapping[str, Tensor], x: Tensor, prefix: str = "") -> list[Tensor]:
    """The outputs of all residual blocks."""
    state = of_torchvision(state, prefix)
    x = F.relu(normalize(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=2, padding=3)))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    outputs = []
    for block in sorted({name.rpartition(".conv1.weight")[0] for name in state} - {""}):
        convolutions = [i for i in (1, 2, 3) if f"{block}.conv{i}.weight" in state]
        y, shortcut = x, x
        downsample = f"{block}.downsample"
        stride = 2 if block.endswith(".0") and not block.startswith("layer1") else 1
        for i in convolutions:
            kernel = state[f"{block}.conv{i}.weight"]
            # The stride is the 3×3 convolution's, of two the first one's.
            strides = stride if i == len(convolutions) - 1 else 1
            y = F.conv2d(y, kernel, stride=strides, padding=kernel.shape[-1] // 2)
            y = normalize(state, f"{block}.bn{i}", y)
            y = y if i == convolutions[-1] else F.relu(y)
        if f"{downsample}.0.weight" in state:
            shortcut = F.conv2d(x, state[f"{downsample}.0.weight"], stride=stride)
            shortcut = normalize(state, f"{downsample}.1", shortcut)
        x = F.relu(attend(state, block, y) + shortcut)
        outputs.append(x)
    return outputs
