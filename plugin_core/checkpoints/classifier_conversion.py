"""Whole image classifiers, converted for MMPretrain's ``ImageClassifier``.

One kind is a backbone with a linear classifier in torchvision's or timm's names, as triplet
attention's authors have them.

The other is of IDA's public reproduction, https://github.com/yu-gi-oh-leilei/IDA_2023ICLR. Names in
its files tell its version: the first one (``lib_new_attention``) has its backbone below
``backbone.0.body.``, the later one (``lib_org_backbone``) below ``backbone.resnet_layer.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plugin_core.checkpoints.conversion import Backbone, Conversion, find_backbone

_IDA = "clf."
_FIRST_VERSION = "backbone.0.body."
_PREFIXES = (_FIRST_VERSION, "backbone.resnet_layer.")


@dataclass(frozen=True)
class ClassifierConversion:
    """A classifier for MMPretrain.

    Attributes:
        tensors: by their names there.
        head: the head's arguments that the weights need.
        unused: names of the source without a place.
    """

    tensors: dict[str, Tensor]
    head: dict[str, Any]
    unused: list[str]


def linear_classifier(
    source: Mapping[str, Tensor], backbone: Backbone, conversion: Conversion
) -> ClassifierConversion:
    """Join a converted backbone and the source's linear classifier.

    Args:
        source: state dict of the classifier.
        backbone: found in it.
        conversion: of it, for MMDetection's backbone.

    Raises:
        ValueError: if it has no linear classifier, or lacks a tensor of the backbone.
    """
    names = {part: backbone.names.get(f"fc.{part}") for part in ("weight", "bias")}
    if None in names.values():
        raise ValueError(
            "it has no linear classifier (fc); a backbone alone is converted with --to mm, for "
            "MMPretrain too"
        )
    if conversion.fresh:
        raise ValueError(f"it lacks tensors, of which {conversion.fresh[0]} is one")
    tensors = {f"backbone.{name}": tensor for name, tensor in conversion.tensors.items()}
    tensors |= {f"head.fc.{part}": source[str(name)] for part, name in names.items()}
    num_classes, channels = tensors["head.fc.weight"].shape
    head = {"num_classes": num_classes, "in_channels": channels}
    unused = [name for name in conversion.unused if name not in names.values()]
    return ClassifierConversion(_copies(tensors), head, unused)


def is_ida_reproduction(names: Collection[str]) -> bool:
    """Tell whether a state dict is a whole classifier of the reproduction with IDA."""
    has_classifier = f"{_IDA}head.0.weight" in names
    return has_classifier and any(name.startswith(_PREFIXES) for name in names)


def convert_ida(source: Mapping[str, Tensor]) -> ClassifierConversion:
    """Convert a whole classifier of the reproduction, for a head of type ``IDAClsHead``.

    Args:
        source: for which :func:`is_ida_reproduction` holds.

    Raises:
        ValueError: if its backbone is no ResNet.
    """
    backbone = find_backbone(source)
    if backbone.depth is None:
        raise ValueError(f"it has a {backbone.architecture}; expected a ResNet")
    tensors = {
        f"backbone.{common}": source[name]
        for common, name in backbone.names.items()
        if not common.startswith("fc.")
    }
    used = set(backbone.names.values())
    of_head = [name for name in source if name.startswith(_IDA)]
    tensors |= {f"head.classifier.{name.removeprefix(_IDA)}": source[name] for name in of_head}
    num_heads = sum(name.startswith(f"{_IDA}head.") for name in of_head)
    num_classes, channels = source[f"{_IDA}head.0.weight"].shape[:2]
    head = {
        "type": "IDAClsHead",
        "num_classes": num_classes,
        "in_channels": channels * num_heads,
        "num_heads": num_heads,
        "heavy": f"{_IDA}out_proj.weight" in source,
        "sample_order": "interleaved",
        "last_head_norm": any(name.startswith(_FIRST_VERSION) for name in source),
    }
    unused = [name for name in source if name not in used and not name.startswith(_IDA)]
    return ClassifierConversion(_copies(tensors), head, unused)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors, as saving a view writes all that it is a view of."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
