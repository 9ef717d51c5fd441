"""Checks of a config and of the files that it names, before a run writes anything.

Where MMDetection would stop at a bare assertion, or go on with half of a checkpoint, these say
which setting is wrong. A setting that they do not know they leave to MMDetection.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict

from mm_plugins.layers import TripletAttention
from plugin_core.preflight import check_coco_json, check_resnet_checkpoint, check_resnet_names

_RESNET_POSITIONS = ("after_conv1", "after_conv2", "after_conv3")
_MOBILENET_POSITIONS = ("after_linear_conv",)


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
            is_train = loader == "train_dataloader"
            _check_datasets(cfg[loader].get("dataset"), f"{loader}.dataset", is_train)
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


def _check_datasets(dataset: Any, setting: str, train: bool) -> None:
    """Check a dataset in COCO's format, or those that a dataset wraps, concatenates or repeats."""
    if isinstance(dataset, (list, tuple)):
        for i, part in enumerate(dataset):
            _check_datasets(part, f"{setting}[{i}]", train=False)
        return
    if not isinstance(dataset, dict):
        return
    for key in ("dataset", "datasets"):
        _check_datasets(dataset.get(key), f"{setting}.{key}", train)
    kind = dataset.get("type")
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    ann_file, root = dataset.get("ann_file"), dataset.get("data_root") or ""
    if (
        not (inspect.isclass(kind) and issubclass(kind, CocoDataset))
        or dataset.get("backend_args")  # files are not read from the disk
        or not isinstance(ann_file, str)
        or not ann_file
        or "://" in os.path.join(root, ann_file)
    ):
        return
    filtered = dict(dataset.get("filter_cfg") or {}).get("filter_empty_gt", False)
    check_coco_json(
        os.path.join(root, ann_file), f"{setting}.ann_file", needs_annotations=train and filtered
    )
    prefix = dataset.get("data_prefix")
    folder = prefix.get("img") if isinstance(prefix, dict) else None
    if isinstance(folder, str) and folder and "://" not in folder:
        images = os.path.join(root, folder)
        if not os.path.isdir(images):
            raise ValueError(f"{setting}.data_prefix.img: there is no image folder {images!r}")


def _backbones(node: Any, setting: str) -> Iterator[tuple[str, ConfigDict]]:
    """Backbones of a model's config that are known here, and where they stand in it."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get("type"), str):
        kind = MODELS.get(node["type"])
        if inspect.isclass(kind) and issubclass(kind, (ResNet, MobileNetV2)):
            yield setting, node
    for key, value in node.items():
        yield from _backbones(value, f"{setting}.{key}")


def _check_plugins(backbone: ConfigDict, setting: str) -> None:
    kind = MODELS.get(backbone["type"])
    is_resnet = issubclass(kind, ResNet)
    if is_resnet and "depth" in backbone and backbone["depth"] not in kind.arch_settings:
        raise ValueError(
            f"{setting}.depth: no {backbone['type']} of depth {backbone['depth']!r}; "
            f"there are {', '.join(map(str, kind.arch_settings))}"
        )
    small = is_resnet and backbone.get("depth") in (18, 34)
    positions = _RESNET_POSITIONS if is_resnet else _MOBILENET_POSITIONS
    num_stages = backbone.get("num_stages", 4) if is_resnet else len(kind.arch_settings)
    plugins = backbone.get("plugins") or ()
    if plugins and (kind is MobileNetV2 or (kind is ResNet and small)):
        name = f"ResNet-{backbone['depth']}" if small else "MobileNetV2"
        position = "after_conv2" if small else "after_linear_conv"
        raise ValueError(
            f"{setting}.type: MMDetection's {name} takes no plugins; "
            f"use type='Plugin{kind.__name__}' and position={position!r}"
        )
    names = [key for key in backbone if key not in ("type", "_scope_", "_delete_")]
    _check_arguments(kind, names, setting)
    for i, plugin in enumerate(plugins):
        where = f"{setting}.plugins[{i}]"
        if not isinstance(plugin, dict) or not isinstance(plugin.get("cfg"), dict):
            raise ValueError(
                f"{where}: expected dict(cfg=dict(type=…), position=…, stages=…), got {plugin!r}"
            )
        _check_layer(plugin["cfg"], f"{where}.cfg")
        if plugin.get("position") not in positions:
            raise ValueError(
                f"{where}.position: {plugin.get('position')!r} is none of {', '.join(positions)}"
            )
        stages = plugin.get("stages")
        if stages is not None and (not isinstance(stages, Sized) or len(stages) != num_stages):
            raise ValueError(
                f"{where}.stages: expected {num_stages} times True or False, one for each stage "
                f"of {setting}, got {stages!r}"
            )
        if small and plugin["position"] == "after_conv3":
            raise ValueError(
                f"{where}.position: 'after_conv3', but the blocks of a ResNet-{backbone['depth']} "
                "end in conv2; use 'after_conv2'"
            )
        unknown = set(plugin) - {"cfg", "position", "stages"}
        if unknown:
            raise ValueError(f"{where}: unknown key {', '.join(sorted(unknown))}")


def _check_layer(layer: ConfigDict, setting: str) -> None:
    name = layer.get("type")
    if name is None:
        raise ValueError(f"{setting}.type: missing; expected dict(type='TripletAttention', …)")
    if not isinstance(name, str):
        return  # a class
    kind = MODELS.get(name)
    if kind is None:
        likely = difflib.get_close_matches(name, MODELS.module_dict)
        hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
        raise ValueError(f"{setting}.type: no module is registered as {name!r}{hint}")
    if not (inspect.isclass(kind) and issubclass(kind, TripletAttention)):
        return  # a layer of others: its arguments are its own affair
    arguments = {k: v for k, v in layer.items() if k not in ("type", "postfix", "_scope_")}
    _check_arguments(kind, arguments, setting)
    try:
        kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def _check_arguments(kind: type, arguments: Iterable[str], setting: str) -> None:
    """Check that a class takes these arguments, itself or by a base that it hands them on to."""
    known: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        known |= {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    for argument in arguments:
        if argument not in known:
            likely = difflib.get_close_matches(argument, known)
            hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
            raise ValueError(f"{setting}: {kind.__name__} has no argument {argument!r}{hint}")


def _check_weights(path: str, setting: str, backbone: ConfigDict, backbone_setting: str) -> None:
    if "://" in path:
        return
    path = os.path.expanduser(path)  # as mmengine does
    if "depth" in backbone:
        depth_setting = f"{backbone_setting}.depth"
        check_resnet_checkpoint(path, backbone["depth"], setting, depth_setting)
        command = f"tools/convert_checkpoint.py {path} converted.pth --to mm"
        networks = check_resnet_names(path, "layer", setting, command)
        if setting == "load_from" and networks and networks <= {"", "module."}:
            raise ValueError(
                f"load_from: {path!r} holds a backbone alone, which is not loaded into a detector; "
                f"use {backbone_setting}.init_cfg=dict(type='Pretrained', checkpoint={path!r})"
            )
    elif not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
