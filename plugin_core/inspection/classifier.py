"""Looks at the attention of an image classifier, as the figures of triplet attention's paper do."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from plugin_core.block_plugins import BlockPlugin, build_block_plugin, child_name
from plugin_core.checkpoints.conversion import branch_of, convert, find_backbone, plugins_in
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.inspection.attention_maps import Detections, Detector, Picture
from plugin_core.inspection.recorder import Call

RESIZED, CROPPED = 256, 224  # sides of ImageNet's evaluation, in pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in 0 … 1


class Classifier(Detector):
    """A ResNet with ``fc``, plain or with block plugins, that "detects" every class in an image.

    A class's box is the whole image, its score the logit: Grad-CAM explains what is before softmax.
    The image is cropped as in ImageNet's evaluation. A classifier of 1000 classes is ImageNet's.

    Args:
        config: unused; a checkpoint tells all.
        weights: path of a checkpoint in torchvision's names, or the authors'.
        trust: whether what the checkpoint asks to run may be run.

    Raises:
        ValueError: if the file cannot be read, or holds no such classifier.
    """

    what = "classifier"

    def __init__(self, config: str, weights: str, *, trust: bool = False) -> None:
        models = importlib.import_module("torchvision.models")
        state = branch_of(find_state_dict(read_checkpoint(weights, trust=trust)))
        try:
            found = find_backbone(state)
            is_known = found.spelling == "torchvision" and "fc.weight" in found.names
            if found.depth is None or not is_known:
                raise ValueError(f"{found}; expected a ResNet in torchvision's names with an fc")
            classes = len(state[found.names["fc.weight"]])
            network = getattr(models, f"resnet{found.depth}")(num_classes=classes)
            for plugin in plugins_in(state):
                for stage in plugin.stages:
                    layer = getattr(network, f"layer{stage}")
                    for block in layer[-1:] if plugin.blocks == "last" else layer:
                        norm = getattr(block, "bn3", block.bn2)
                        made = build_block_plugin(
                            plugin.name, norm.num_features, plugin.warm_start, **plugin.arguments
                        )
                        _insert_after(norm, block, child_name(plugin.name), made)
            conversion = convert(state, network.state_dict())
            if conversion.fresh:
                raise ValueError(f"it lacks {', '.join(conversion.fresh[:3])}")
        except ValueError as error:  # a hint for another tool's option may follow
            raise ValueError(f"{weights!r}: {str(error).partition('; say by')[0]}") from error
        network.load_state_dict(conversion.tensors, strict=False)  # without the norms' counters
        self.model = nn.ModuleDict({"backbone": network}).eval().requires_grad_(False)
        names = models.ResNet50_Weights.DEFAULT.meta["categories"]
        self.class_names = tuple(names if classes == len(names) else map(str, range(classes)))

    def read(self, path: str) -> Picture:
        with Image.open(path) as file:
            image = file.convert("RGB")
        transforms = importlib.import_module("torchvision.transforms.functional")
        cropped = np.array(transforms.center_crop(transforms.resize(image, RESIZED), CROPPED))
        pixels = torch.from_numpy(cropped).permute(2, 0, 1)[None].float()
        return Picture(cropped, pixels, (CROPPED, CROPPED))

    def detect(self, picture: Picture, pixels: Tensor) -> Detections:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        (logits,) = self.model.get_submodule("backbone")((pixels / 255 - mean) / std)
        boxes = torch.tensor([[0.0, 0.0, CROPPED - 1, CROPPED - 1]]).expand(len(logits), 4)
        return Detections(boxes, logits, torch.arange(len(logits)))

    def last_stage(self) -> str:
        return "backbone.layer4"

    def region_extractors(self) -> list[nn.Module]:
        return []

    def regions(self, call: Call) -> Tensor:
        raise ValueError("a classifier has no regions")


def _insert_after(norm: nn.Module, block: nn.Module, name: str, plugin: BlockPlugin) -> None:
    """Make a plugin a block's child, and apply it to the output of the block's last norm."""
    block.add_module(name, plugin)

    def apply(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return plugin(output)

    norm.register_forward_hook(apply)
