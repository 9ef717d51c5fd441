"""Pixel formats of pretrained backbones: order of channels, mean and deviation.

Weights need the pixel format of their training. A framework does not notice a wrong one.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from plugin_core.checkpoints.conversion import MOCO_ENCODERS, branch_of, find_backbone
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint

# In units of 0 … 255. Means that differ by less come from other images of the same data set.
_TOLERANCE = 3.0


@dataclass(frozen=True)
class PixelFormat:
    """A backbone's input pixels, and the place of its strides, which goes with them.

    Attributes:
        channel_order: "RGB" or "BGR".
        mean: of each channel in that order, 0 … 255; it is subtracted.
        std: of each channel in that order; it is divided by.
        stride_in_1x1: True if a stage strides in its first 1×1 convolution, as in Caffe2; False if
            it strides in its 3×3; None if this is unknown or the architecture has no such choice.
    """

    channel_order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride_in_1x1: bool | None


TORCHVISION = PixelFormat("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), False)
MSRA = PixelFormat("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), True)

# Formats of the frameworks' own catalogs, by a part of the address
_CATALOGS = {
    "ImageNetPretrained/MSRA/": MSRA,
    "ImageNetPretrained/torchvision/": TORCHVISION,
    "torchvision://": TORCHVISION,
    "open-mmlab://mmdet/mobilenet_v2": TORCHVISION,
    "open-mmlab://detectron/resnet50_caffe": MSRA,
    "open-mmlab://detectron/resnet101_caffe": MSRA,
    "open-mmlab://detectron2/resnet50_caffe": MSRA,
    "open-mmlab://detectron2/resnet101_caffe": MSRA,
}


def find_pixel_format(weights: str) -> PixelFormat | None:
    """Find the pixel format of pretrained weights; None if it is unknown.

    Args:
        weights: path of a checkpoint, or an address of one of the frameworks' catalogs. The format
            of an unreadable file is unknown.
    """
    if "://" in weights:
        return next((known for part, known in _CATALOGS.items() if part in weights), None)
    path = os.path.expanduser(weights.partition("?")[0])  # options of Detectron2's loader follow
    try:
        return pixel_format_of(read_checkpoint(path))
    except ValueError:
        return None


def pixel_format_of(checkpoint: Mapping[str, Any]) -> PixelFormat | None:
    """Find the pixel format of a checkpoint's content; None if it is unknown.

    Args:
        checkpoint: from :func:`plugin_core.checkpoints.reading.read_checkpoint`.
    """
    meta = checkpoint.get("meta")
    for holder in (checkpoint, meta if isinstance(meta, Mapping) else {}):
        if isinstance(holder.get("pixel_format"), Mapping):
            return _from_record(holder["pixel_format"])
        if isinstance(text := holder.get("cfg"), str) and (found := _of_config(text)):
            return found
    state_dict = branch_of(find_state_dict(checkpoint))
    if "pixel_mean" in state_dict and "pixel_std" in state_dict:
        return _of_detector(state_dict["pixel_mean"], state_dict["pixel_std"])
    try:
        backbone = find_backbone(state_dict)
    except ValueError:
        return None
    names = backbone.names
    wanted = None
    if backbone.spelling == "Caffe2":
        # ResNets with groups (ResNeXt) or GroupNorm have other origins, and other pixels.
        inner = state_dict[names["layer1.0.conv2.weight"]]
        if inner.shape[0] == inner.shape[1] and "res_conv1_bn_s" in state_dict:
            wanted = MSRA
    elif backbone.spelling == "torchvision":
        classifier = names.get("fc.weight")
        of_imagenet = classifier is not None and len(state_dict[classifier]) == 1000
        of_imagenet |= backbone.prefix.removesuffix(".") in MOCO_ENCODERS
        # IDA's public reproduction begins with torchvision's weights
        of_imagenet |= "clf.head.0.weight" in state_dict
        if of_imagenet and any(n.endswith(".running_mean") for n in names):
            wanted = TORCHVISION
    elif checkpoint.get("__author__") == "torchvision":
        wanted = TORCHVISION
    if wanted is not None and "layer1.0.conv3.weight" not in names:
        wanted = replace(wanted, stride_in_1x1=None)  # no 1×1 convolution to stride in
    return wanted


_STRIDES = {"caffe": True, "pytorch": False}  # of the config's `style`, in a stage's first 1×1


def _keywords(node: ast.expr) -> dict[str | None, ast.expr]:
    return {k.arg: k.value for k in node.keywords} if isinstance(node, ast.Call) else {}


def _of_config(text: str) -> PixelFormat | None:
    """Read the pixel format in the config of a training with mmengine, without running it."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError):
        return None
    found: dict[str, ast.expr] = {}  # the outermost of a name
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg:
            found.setdefault(node.arg, node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, node.value)
    try:
        pixels = _keywords(found["data_preprocessor"])
        order = pixels.get("bgr_to_rgb", pixels.get("to_rgb"))
        is_rgb = order is not None and ast.literal_eval(order)
        mean, std = (tuple(map(float, ast.literal_eval(pixels[k]))) for k in ("mean", "std"))
        style = _keywords(found["backbone"]).get("style") if "backbone" in found else None
        stride = None if style is None else _STRIDES.get(ast.literal_eval(style))
    except (KeyError, TypeError, ValueError):
        return None
    if len(mean) != 3 or len(std) != 3:
        return None
    return PixelFormat("RGB" if is_rgb else "BGR", mean, std, stride)


def describe_mismatch(wanted: PixelFormat, used: PixelFormat) -> list[str]:
    """Name the fields in which ``used`` differs from ``wanted``, in their order.

    Means and deviations a few units apart count as equal. An unknown stride equals any.
    """
    names = []
    for field in fields(PixelFormat):
        ours, theirs = getattr(wanted, field.name), getattr(used, field.name)
        if field.name in ("mean", "std"):
            same = len(ours) == len(theirs) and all(
                abs(a - b) < _TOLERANCE for a, b in zip(ours, theirs, strict=True)
            )
        else:
            same = ours == theirs or None in (ours, theirs)
        if not same:
            names.append(field.name)
    return names


def explain_mismatch(
    weights: str,
    wanted: PixelFormat,
    used: PixelFormat,
    settings: Callable[[PixelFormat], Mapping[str, tuple[str, Any]]],
) -> list[str]:
    """Write a sentence for each setting that disagrees with the weights.

    Args:
        weights: path or address.
        wanted: the weights' pixel format.
        used: the config's pixel format.
        settings: gives a framework's setting and its value for each field of a pixel format.
    """
    right, wrong = settings(wanted), settings(used)
    return [
        f"{wrong[field][0]} is {wrong[field][1]!r}, but the weights {weights!r} look like ones "
        f"that want {right[field][1]!r}; a wrong value makes results worse without an error"
        for field in describe_mismatch(wanted, used)
    ]


def _from_record(record: Mapping[str, Any]) -> PixelFormat | None:
    try:
        return PixelFormat(
            channel_order=str(record["channel_order"]),
            mean=tuple(map(float, record["mean"])),
            std=tuple(map(float, record["std"])),
            stride_in_1x1=record["stride_in_1x1"],
        )
    except (KeyError, TypeError, ValueError):
        return None


def _of_detector(pixel_mean: Tensor, pixel_std: Tensor) -> PixelFormat | None:
    mean, std = (tuple(map(float, t.flatten())) for t in (pixel_mean, pixel_std))
    # ImageNet's, and photographs' in general, are brightest in red and darkest in blue.
    order = {tuple(sorted(mean)): "BGR", tuple(sorted(mean, reverse=True)): "RGB"}.get(mean)
    if order is None or len(set(mean)) < 3:
        return None
    return PixelFormat(order, mean, std, stride_in_1x1=None)
