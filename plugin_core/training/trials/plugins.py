"""Names of what a trial tries."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plugin_core.block_plugins import child_name, find_block_plugin
from plugin_core.errors import ArgumentError, did_you_mean

PLAIN = "plain"
CONTROL = "control"
STAGES = (2, 3, 4, 5)
# Plugins that are no block's: of an RoI head, of a DETR's encoder, of the losses
DETECTOR_PLUGINS = ("batchformer_v1", "batchformer_v2", "amc", "functional_entropy")
_DEFAULT_STAGES = {"ida": (4, 5)}  # as in configs/: earlier maps are large for its attention


@dataclass(frozen=True)
class Plugin:
    """A plugin to try.

    Args:
        name: of a block plugin as configs know it, or one of ``DETECTOR_PLUGINS``.
        stages: of a ResNet, 2 to 5, whose blocks get it; none for a plugin of the detector.
        label: that names its files.
        arguments: of the block plugin.
        config: path of a config of the user's own that takes the place of a derived one.
    """

    name: str
    stages: tuple[int, ...] = ()
    label: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""


def read_plugins(given: Sequence[str]) -> list[Plugin]:
    """Read the values of ``--with``: names of plugins, maybe with stages as in "ida@4,5".

    "NAME=CONFIG" is a config of the user's own.

    Raises:
        ValueError: if there is no such plugin, stage or config, or one is given twice.
    """
    plugins: list[Plugin] = []
    for text in given:
        name, at, numbers = text.partition("@")
        setting = f"--with {text}"
        own, has_config, config = text.partition("=")
        if has_config:
            if not re.fullmatch(r"\w[\w-]*", own):
                raise ValueError(f"{setting}: expected a name of letters, digits, _ and -")
            if not os.path.isfile(config):
                raise ValueError(f"{setting}: there is no such config file")
            plugin = Plugin(own, label=own, config=os.path.abspath(config))
        elif name in DETECTOR_PLUGINS:
            if at:
                raise ValueError(f"{setting}: {name} is no block plugin and takes no stages")
            plugin = Plugin(name, (), name)
        else:
            try:
                find_block_plugin(name)
            except ArgumentError as error:
                hint = did_you_mean(name, DETECTOR_PLUGINS)
                detectors = ", ".join(DETECTOR_PLUGINS)
                raise ValueError(
                    f"{setting}: {error.reason}; or a plugin of the detector: {detectors}{hint}"
                ) from error
            stages: tuple[int, ...] = _DEFAULT_STAGES.get(name, STAGES)
            if at:
                if not re.fullmatch(r"[2-5](,[2-5])*", numbers):
                    raise ValueError(
                        f"{setting}: stages must be numbers from 2 to 5 such as {name}@4,5, "
                        f"got {numbers!r}"
                    )
                stages = tuple(sorted({int(number) for number in numbers.split(",")}))
            label = re.sub(r"\W", "_", child_name(name))
            plugin = Plugin(name, stages, "_".join([label, *map(str, stages)]) if at else label)
        if plugin.label in (PLAIN, CONTROL):
            raise ValueError(f"{setting}: a trial has a variant named {plugin.label!r} already")
        if any(plugin.label == other.label for other in plugins):
            raise ValueError(f"{setting}: is given twice")
        plugins.append(plugin)
    if not plugins:
        raise ValueError("--with: name at least one plugin, such as --with triplet_attention")
    return plugins
