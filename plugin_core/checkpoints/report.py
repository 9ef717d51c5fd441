"""Reports on conversions, and on the pixels that the weights want."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plugin_core.checkpoints.conversion import Conversion
from plugin_core.checkpoints.detr_conversion import DetrConversion
from plugin_core.checkpoints.pixel_format import PixelFormat

SHOWN = 6  # names or groups of names in a line


@dataclass(frozen=True)
class Target:
    """The model that gets the weights.

    Args:
        state_dict: the model's names and shapes.
        pixel_settings: gives name and value of the framework's setting for each field of a format.
        pixel_format: the model's pixel format by its config; None if the config gives none.
    """

    state_dict: Mapping[str, Tensor]
    pixel_settings: Callable[[PixelFormat], dict[str, tuple[str, Any]]]
    pixel_format: PixelFormat | None = None


def report(conversion: Conversion) -> str:
    """Say what became of a backbone's tensors."""
    total = len(conversion.tensors) + len(conversion.fresh)
    lines = [f"matched {len(conversion.matched)} of the backbone's {total} tensors"]
    if conversion.implied:
        implied = in_short(conversion.implied)
        lines.append(f"set to what the source computes without them: {implied}")
    return "\n".join([*lines, _rest(conversion.fresh, conversion.unused)])


def report_detr(conversion: DetrConversion, target: Target) -> str:
    """Say what became of a whole detector's tensors."""
    lines = []
    if conversion.from_coco_ids:
        is_panoptic = conversion.settings["bbox_head"]["num_classes"] > 80
        known = (
            "133 panoptic categories of COCO, of its 250"
            if is_panoptic
            else ("80 categories of COCO, of its 91")
        )
        lines.append(f"classes: the {known} ids")
    places = [n for n in target.state_dict if not n.endswith("num_batches_tracked")]
    fresh = [n for n in places if n not in conversion.tensors]
    unused = [n for n in conversion.tensors if n not in target.state_dict]
    lines.append(f"matched {len(places) - len(fresh)} of the detector's {len(places)} tensors")
    return "\n".join([*lines, _rest(fresh, unused)])


def _rest(fresh: Sequence[str], unused: Sequence[str]) -> str:
    return f"fresh, as SOURCE has none: {in_short(fresh)}\nunused of SOURCE: {in_short(unused)}"


def in_short(names: Sequence[str]) -> str:
    """List names, or if they are many, say how many there are of each kind."""
    if len(names) <= SHOWN:
        return ", ".join(names) or "none"
    kinds: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in names:
        parts = re.sub(r"\d+", "*", name).split(".")
        kinds[tuple(parts[:3])].append(parts)
    largest = sorted(kinds.values(), key=len, reverse=True)
    shown = [f"{'.'.join(os.path.commonprefix(kind))} ({len(kind)})" for kind in largest[:SHOWN]]
    rest = sum(map(len, largest[SHOWN:]))
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def report_pixels(wanted: PixelFormat | None, target: Target) -> str:
    """Say which settings give the weights the pixels of their training."""
    if wanted is None:
        return "pixels: unknown; set those that the weights were trained with"
    settings = target.pixel_settings(wanted)
    if wanted.stride_in_1x1 is None:
        del settings["stride_in_1x1"]
    return "pixels: " + ", ".join(f"{name} = {value!r}" for name, value in settings.values())
