"""Checks of a config and of the files that it names, before a run writes anything.

Where MMDetection would stop at a bare assertion, or go on with half of a checkpoint, these say
which setting is wrong. A setting that they do not know they leave to MMDetection.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterator
from typing import Any

from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict

from plugin_core.preflight import check_coco_json, check_resnet_checkpoint

_POSITIONS = ("after_conv1", "after_conv2", "after_conv3")


def check_config(cfg: Config, *, train: bool, resumes: bool) -> None:
    """Check what can be known to be wrong before the model is built.

    Args:
        cfg: the whole config, with command-line overrides.
        train: whether ``train_dataloader`` will be used, or ``test_dataloader`` only.
        resumes: whether weights come from a checkpoint of the same training.

    Raises:
        ValueError: names the setting, its value and what would be right.
    """
    register_all_modules(init_default_scope=False)
    loaders = ("train_dataloader", "val_dataloader") if train else ("test_dataloader",)
    for loader in loaders:
        if cfg.get(loader) is not None:
            _check_datasets(cfg[loader].get("dataset"), f"{loader}.dataset")
    load_from = cfg.get("load_from")
    for setting, backbone in _backbones(cfg.get("model", {}), "model"):
        _check_plugins(backbone, setting)
        if load_from and not resumes:
            _check_weights(load_from, "load_from", backbone, setting)
        init_cfg = backbone.get("init_cfg")
        if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained" and not load_from:
            _check_weights(
                init_cfg["checkpoint"], f"{setting}.init_cfg.checkpoint", backbone, setting
            )


def _check_datasets(dataset: Any, setting: str) -> None:
    """Check a dataset, or those that it wraps, concatenates or repeats."""
    if isinstance(dataset, (list, tuple)):
        for i, part in enumerate(dataset):
            _check_datasets(part, f"{setting}[{i}]")
        return
    if not isinstance(dataset, dict):
        return
    for key in ("dataset", "datasets"):
        _check_datasets(dataset.get(key), f"{setting}.{key}")
    ann_file = dataset.get("ann_file")
    root = dataset.get("data_root") or ""
    if isinstance(ann_file, str) and ann_file.endswith(".json") and "://" not in root + ann_file:
        check_coco_json(os.path.join(root, ann_file), f"{setting}.ann_file")
        images = os.path.join(root, dataset.get("data_prefix", {}).get("img", ""))
        if images and not os.path.isdir(images):
            raise ValueError(f"{setting}.data_prefix.img: there is no image folder {images!r}")


def _backbones(node: Any, setting: str) -> Iterator[tuple[str, ConfigDict]]:
    """ResNets of a model's config, and where they stand in it."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("type"), str):
        kind = MODELS.get(node["type"])
        if inspect.isclass(kind) and issubclass(kind, ResNet):
            yield setting, node
    for key, value in node.items():
        yield from _backbones(value, f"{setting}.{key}")


def _check_plugins(backbone: ConfigDict, setting: str) -> None:
    depths = list(MODELS.get(backbone["type"]).arch_settings)
    if "depth" in backbone and backbone["depth"] not in depths:
        raise ValueError(
            f"{setting}.depth: no {backbone['type']} of depth {backbone['depth']!r}; "
            f"there are {', '.join(map(str, depths))}"
        )
    num_stages = backbone.get("num_stages", 4)
    for i, plugin in enumerate(backbone.get("plugins") or ()):
        where = f"{setting}.plugins[{i}]"
        if not isinstance(plugin, dict) or not isinstance(plugin.get("cfg"), dict):
            raise ValueError(
                f"{where}: expected dict(cfg=dict(type=…), position=…, stages=…), got {plugin!r}"
            )
        _check_layer(plugin["cfg"], f"{where}.cfg")
        if plugin.get("position") not in _POSITIONS:
            raise ValueError(
                f"{where}.position: {plugin.get('position')!r} is none of {', '.join(_POSITIONS)}"
            )
        stages = plugin.get("stages")
        if stages is not None and (
            len(stages) != num_stages or not all(isinstance(s, bool) for s in stages)
        ):
            raise ValueError(
                f"{where}.stages: expected {num_stages} times True or False, one for each stage "
                f"of {setting}, got {stages!r}"
            )
        if backbone.get("depth") in (18, 34) and plugin["position"] == "after_conv3":
            raise ValueError(
                f"{where}.position: 'after_conv3', but the blocks of a ResNet-{backbone['depth']} "
                "end in conv2; use 'after_conv2'"
            )
        unknown = set(plugin) - {"cfg", "position", "stages"}
        if unknown:
            raise ValueError(f"{where}: unknown key {', '.join(sorted(unknown))}")
        if backbone.get("depth") in (18, 34) and backbone["type"].rpartition(".")[2] == "ResNet":
            raise ValueError(
                f"{setting}.type: MMDetection's ResNet-{backbone['depth']} takes no plugins; "
                "use type='PluginResNet' and position='after_conv2'"
            )


def _check_layer(layer: ConfigDict, setting: str) -> None:
    kind = MODELS.get(str(layer.get("type")))
    if kind is None:
        likely = difflib.get_close_matches(str(layer.get("type")), MODELS.module_dict)
        hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
        raise ValueError(f"{setting}.type: no module is registered as {layer.get('type')!r}{hint}")
    arguments = inspect.signature(kind).parameters
    if any(a.kind is inspect.Parameter.VAR_KEYWORD for a in arguments.values()):
        return
    for key in set(layer) - {"type", "postfix", "_scope_"} - set(arguments):
        raise ValueError(
            f"{setting}: {layer['type']} has no argument {key!r}; "
            f"it has {', '.join(a for a in arguments if a != 'in_channels')}"
        )
    try:
        kind(in_channels=8, **{k: v for k, v in layer.items() if k in arguments})
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def _check_weights(path: str, setting: str, backbone: ConfigDict, backbone_setting: str) -> None:
    if "://" not in path and "depth" in backbone:
        depth_setting = f"{backbone_setting}.depth"
        check_resnet_checkpoint(path, backbone["depth"], setting, depth_setting)
