"""Checks of a built model: its plugins, its classes, and the names in its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import nn

from plugin_core import BlockPlugin
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.checkpoints.resnet_names import check_resnet_names, names_in
from plugin_core.errors import ArgumentError, did_you_mean, origin
from plugin_core.inspection.building import in_a_line

_REGISTRIES = {
    "PROPOSAL_GENERATOR": PROPOSAL_GENERATOR_REGISTRY,
    "RPN_HEAD": RPN_HEAD_REGISTRY,
    "ANCHOR_GENERATOR": ANCHOR_GENERATOR_REGISTRY,
    "ROI_HEADS": ROI_HEADS_REGISTRY,
    "ROI_BOX_HEAD": ROI_BOX_HEAD_REGISTRY,
    "ROI_MASK_HEAD": ROI_MASK_HEAD_REGISTRY,
    "ROI_KEYPOINT_HEAD": ROI_KEYPOINT_HEAD_REGISTRY,
    "SEM_SEG_HEADS": SEM_SEG_HEADS_REGISTRY,
}


def explain(error: Exception, setting: str) -> ValueError:
    """Say in a line what building the model raised; errors of d2_plugins name their setting."""
    if isinstance(error, ArgumentError):
        return ValueError(f"{setting}: {error}")
    if isinstance(error, ValueError) and "d2_plugins" in origin(error):
        return ValueError(" ".join(str(error).split()))
    unknown = re.search(r"No object named '(.+)' found in '(.+)' registry", str(error))
    if unknown and unknown[2] in _REGISTRIES:
        names = [name for name, _ in _REGISTRIES[unknown[2]]]
        hint = did_you_mean(unknown[1], names) or f"; there are {', '.join(names)}"
        return ValueError(f"{setting}.{unknown[2]}.NAME: there is no {unknown[1]!r}{hint}")
    return ValueError(in_a_line(error, setting))


def check_plugins_are_read(model: nn.Module, plugins: Any, setting: str, key: str) -> None:
    """Check that each plugin of a list in the config is in a block of the model.

    Args:
        model: as it was built.
        plugins: the list, of mappings.
        setting: that has the list, for the message.
        key: of a plugin's name in its mapping.

    Raises:
        ValueError: names the setting.
    """
    built = {m.plugin_name for m in model.modules() if isinstance(m, BlockPlugin)}
    for i, plugin in enumerate(plugins):
        if plugin[key] not in built:
            raise ValueError(
                f"{setting}[{i}]: {plugin[key]!r} is in no block of the model; name stages in it, "
                "and take a backbone that reads the list, such as build_resnet_plugin_fpn_backbone"
            )


def number_of_classes(model: Any) -> int | None:
    """Count the classes of a detector of Detectron2; None if it does not tell them."""
    number = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    return number if isinstance(number, int) else None


def known_classes(resumed: str, weights: str, train: Sequence[str]) -> Sequence[str] | None:
    """Read the classes of the checkpoint that a run goes on with, or evaluates.

    A checkpoint that does not name them is taken for one of the training sets in the config, if
    these are registered.
    """
    path = resumed or weights
    classes = class_names_of(path) if os.path.isfile(path) else None
    if classes is None and weights and not resumed:
        for name in train:
            if name in DatasetCatalog:
                return MetadataCatalog.get(name).get("thing_classes")
    return classes


def check_spelling(weights: str, setting: str, model: nn.Module) -> None:
    """Check that Detectron2 will find the tensors in a file by their names.

    In a file with matching_heuristics, Detectron2 matches names by their ends, and leaves out what
    has no place, such as the alpha of a warm start.
    """
    command = f"tools/convert_checkpoint.py {weights} converted.pth --to d2"
    check_resnet_names(weights, "res", setting, command)
    names = names_in(weights)
    if "matching_heuristics" not in names:
        return
    for place, module in model.named_modules():
        child = place.rpartition(".")[2]
        is_cold = isinstance(module, BlockPlugin) and module.alpha is None
        if is_cold and any(name.endswith(f".{child}.alpha") for name in names):
            raise ValueError(
                f"{setting}: {weights!r} has a {child} that was trained with a warm start (its "
                "alpha); the config's needs WARM_START True"
            )
