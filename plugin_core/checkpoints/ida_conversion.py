"""Whole image classifiers of IDA's public reproduction, converted for MMPretrain.

The reproduction is https://github.com/yu-gi-oh-leilei/IDA_2023ICLR. Names in its files tell its
version: the first one (``lib_new_attention``) has its backbone below ``backbone.0.body.``, the
later one (``lib_org_backbone``) below ``backbone.resnet_layer.``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plugin_core.checkpoints.conversion import find_backbone

_CLASSIFIER = "clf."
_FIRST_VERSION = "backbone.0.body."
_PREFIXES = (_FIRST_VERSION, "backbone.resnet_layer.")


@dataclass(frozen=True)
class IDAConversion:
    """A classifier for MMPretrain's ``ImageClassifier`` with ``IDAClsHead``.

    Attributes:
        tensors: by their names there.
        depth: of the ResNet.
        head: the head's arguments that the weights need.
        unused: names of the source without a place.
    """

    tensors: dict[str, Tensor]
    depth: int
    head: dict[str, Any]
    unused: list[str]


def is_ida_reproduction(names: Collection[str]) -> bool:
    """Tell whether a state dict is a whole classifier of the reproduction with IDA."""
    has_classifier = f"{_CLASSIFIER}head.0.weight" in names
    return has_classifier and any(name.startswith(_PREFIXES) for name in names)


def convert_ida(source: Mapping[str, Tensor]) -> IDAConversion:
    """Convert a whole classifier.

    Args:
        source: for which :func:`is_ida_reproduction` holds.

    Raises:
        ValueError: if its backbone is no ResNet, or parts of the classifier are missing.
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
    of_classifier = [name for name in source if name.startswith(_CLASSIFIER)]
    tensors |= {f"head.classifier.{n.removeprefix(_CLASSIFIER)}": source[n] for n in of_classifier}
    num_heads = sum(name.startswith(f"{_CLASSIFIER}head.") for name in of_classifier)
    num_classes, channels = source[f"{_CLASSIFIER}head.0.weight"].shape[:2]
    head = {
        "type": "IDAClsHead",
        "num_classes": num_classes,
        "in_channels": channels * num_heads,
        "num_heads": num_heads,
        "heavy": f"{_CLASSIFIER}out_proj.weight" in source,
        "sample_order": "interleaved",
        "last_head_norm": any(name.startswith(_FIRST_VERSION) for name in source),
    }
    unused = [name for name in source if name not in used and not name.startswith(_CLASSIFIER)]
    copies = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    return IDAConversion(copies, backbone.depth, head, unused)
