"""Checks of a config and of the files that it names, before a run writes anything.

Where MMDetection would stop at a bare assertion, or go on with half of a checkpoint, these say
which setting is wrong. A setting that they do not know they leave to MMDetection.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from mmdet.datasets import CocoDataset
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from torch import nn

from mm_plugins.batchformer import build_batchformer_detector, insert_batchformer
from mm_plugins.block_plugins import IDABlock, TripletAttention
from mm_plugins.grounding.text_models import check_pretrained, check_text_model
from mm_plugins.regularized import build_regularized_detector, functional_entropy_loss
from mm_plugins.roi_heads import BatchFormerBBoxHead, IDABBoxHead
from plugin_core import AttentionMaskConsistency, BatchFormer
from plugin_core.checkpoints.reading import read_checkpoint
from plugin_core.checkpoints.resnet_names import check_resnet_checkpoint, check_resnet_names
from plugin_core.evaluation.datasets import check_coco_json

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
            _check_tokenizers(cfg[loader], loader)
    load_from = cfg.get("load_from")
    model = cfg.get("model", {})
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        _check_detectors(model, "model")
    for setting, head in _modules(model, "model", IDABBoxHead, BatchFormerBBoxHead):
        kind, arguments = MODELS.get(head["type"]), _arguments(head)
        _check_arguments(kind, arguments, setting)
        if (inner := arguments.get("batchformer")) is not None:
            _check_is_dict(inner, f"{setting}.batchformer")
            _check_arguments(BatchFormer, inner, f"{setting}.batchformer", "embed_dims")
        _check_values(kind, arguments, setting)
    for setting, backbone in _modules(model, "model", ResNet, MobileNetV2):
        _check_plugins(backbone, setting)
        init_cfg = backbone.get("init_cfg")
        if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained" and not load_from:
            checkpoint, where = init_cfg["checkpoint"], f"{setting}.init_cfg.checkpoint"
            _check_names(checkpoint, where, backbone, setting)
            _check_layout(checkpoint, where)
    if load_from and not resumes:
        check_weights(model, load_from, "load_from")
        _check_layout(load_from, "load_from")


def check_weights(model: ConfigDict, path: str, setting: str) -> None:
    """Check that a checkpoint of a whole model, if it has a ResNet, has the model's.

    Args:
        model: its config.
        path: of the checkpoint.
        setting: that names the checkpoint, for the message.

    Raises:
        ValueError: names the setting, its value and what would be right.
    """
    for where, backbone in _modules(model, "model", ResNet, MobileNetV2):
        networks = _check_names(path, setting, backbone, where)
        if networks and networks <= {"", "module."}:
            raise ValueError(
                f"{setting}: {path!r} holds a backbone alone, which is not loaded into a detector; "
                f"use {where}.init_cfg=dict(type='Pretrained', checkpoint={path!r})"
            )


def _check_detectors(node: Any, setting: str) -> None:
    """Check a model, or those that it holds, such as a student and its teacher."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            _check_detectors(part, f"{setting}[{i}]")
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        _check_detectors(value, f"{setting}.{key}")
    kind = node.get("type")
    build: Any = MODELS.get(kind) if isinstance(kind, str) else kind
    if build not in (build_batchformer_detector, build_regularized_detector):
        return
    if "detector" not in node:
        raise ValueError(
            f"{setting}.detector: missing; name the detector's type, as it stands in the config "
            "without the plugin"
        )
    if build is build_regularized_detector:
        _check_losses(node, setting)
    else:
        _check_batchformer(node, setting)
    # It says by itself which of the model's settings is wrong.
    _check_values(build, _arguments(copy.deepcopy(node)), setting)


def _check_losses(node: Any, setting: str) -> None:
    losses: dict[str, Any] = {
        "attention_mask_consistency": AttentionMaskConsistency,
        "functional_entropy": functional_entropy_loss,
    }
    for name, loss in losses.items():
        if (given := node.get(name)) is not None:
            _check_is_dict(given, f"{setting}.{name}")
            _check_arguments(loss, given, f"{setting}.{name}")
            _check_values(loss, given, f"{setting}.{name}")
    check_text_model(node, setting)


def _check_batchformer(node: Any, setting: str) -> None:
    batchformer = node.get("batchformer")
    if batchformer is not None:
        _check_is_dict(batchformer, f"{setting}.batchformer")
        _check_arguments(insert_batchformer, batchformer, f"{setting}.batchformer", "encoder")
    encoder = node.get("encoder") or _find(node, "panoptic_head", "pixel_decoder", "encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("num_layers"), int):
        # Not every detector can be built without memory for its parameters.
        probe: Any = nn.Module()
        probe.layers = nn.ModuleList(nn.Identity() for _ in range(encoder["num_layers"]))
        probe.embed_dims = _find(encoder, "layer_cfg", "self_attn_cfg", "embed_dims") or 256
        _check_values(insert_batchformer, {"encoder": probe, **(batchformer or {})}, setting)


def _find(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _check_is_dict(value: Any, setting: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{setting}: expected dict(…), got {value!r}")


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


def _check_tokenizers(node: Any, setting: str) -> None:
    """Check the text models that transforms of the data name."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            _check_tokenizers(part, f"{setting}[{i}]")
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "tokenizer_name" and isinstance(value, str):
                check_pretrained(value, f"{setting}.{key}")
            _check_tokenizers(value, f"{setting}.{key}")


def _modules(node: Any, setting: str, *kinds: type) -> Iterator[tuple[str, ConfigDict]]:
    """Modules of some kinds in a model's config, and where they stand in it."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            yield from _modules(part, f"{setting}[{i}]", *kinds)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("type"), str):
        kind = MODELS.get(node["type"])
        if inspect.isclass(kind) and issubclass(kind, kinds):
            yield setting, node
    for key, value in node.items():
        yield from _modules(value, f"{setting}.{key}", *kinds)


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
    _check_arguments(kind, _arguments(backbone), setting)
    for i, plugin in enumerate(plugins):
        where = f"{setting}.plugins[{i}]"
        if not isinstance(plugin, dict) or not isinstance(plugin.get("cfg"), dict):
            raise ValueError(
                f"{where}: expected dict(cfg=dict(type=…), position=…, stages=…), got {plugin!r}"
            )
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
        _check_layer(plugin, backbone, f"{where}.cfg")


def _check_layer(plugin: ConfigDict, backbone: ConfigDict, setting: str) -> None:
    layer = plugin["cfg"]
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
    if not (inspect.isclass(kind) and issubclass(kind, (TripletAttention, IDABlock))):
        return  # a layer of others: its arguments are its own affair
    arguments = _arguments(layer)
    if "in_channels" in arguments:
        raise ValueError(f"{setting}.in_channels: leave it out; the backbone passes its own")
    _check_arguments(kind, arguments, setting)
    for channels in _channels_at(plugin, backbone):
        _check_values(kind, {"in_channels": channels, **arguments}, setting)


def _channels_at(plugin: ConfigDict, backbone: ConfigDict) -> list[int]:
    """How many channels a plugin is given, in all blocks that get it, as the backbone has it."""
    channels: set[int] = set()

    class Probe(nn.Identity):
        def __init__(self, in_channels: int) -> None:
            super().__init__()
            channels.add(in_channels)

    probed = {**copy.deepcopy(backbone), "plugins": [{**plugin, "cfg": {"type": Probe}}]}
    # What else may be wrong with the backbone is left to MMDetection.
    with contextlib.suppress(Exception), torch.device("meta"):
        MODELS.build(probed)
    return sorted(channels)


def _check_values(kind: Callable[..., Any], arguments: Mapping[str, Any], setting: str) -> None:
    """Check that a module of ours takes these values, without memory for its parameters."""
    try:
        with torch.device("meta"):
            kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error
    except Exception:  # a loss that is unknown, or that cannot be built so: MMDetection's affair
        return


def _arguments(module: ConfigDict) -> dict[str, Any]:
    return {k: v for k, v in module.items() if k not in ("type", "postfix", "_scope_", "_delete_")}


def _check_arguments(
    kind: Callable[..., Any], arguments: Mapping[str, Any], setting: str, *reserved: str
) -> None:
    """Check that a function takes these arguments, or a class, or a base that it hands them on to.

    Args:
        kind: the function or class.
        arguments: by name.
        setting: where they stand in the config.
        reserved: names that the config may not give.
    """
    known: set[str] = set()
    functions = [kind]
    if inspect.isclass(kind):
        functions = [base.__init__ for base in kind.__mro__]  # type: ignore[misc]
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        known |= {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    known -= {"self", *reserved}
    for argument in arguments:
        if argument not in known:
            likely = difflib.get_close_matches(argument, known)
            hint = f"; did you mean {' or '.join(likely)}?" if likely else ""
            raise ValueError(f"{setting}: {kind.__name__} has no argument {argument!r}{hint}")


def _check_names(path: str, setting: str, backbone: ConfigDict, backbone_setting: str) -> set[str]:
    """Check the ResNet in a checkpoint; gives what comes before its names, if there is one."""
    if "://" in path:
        return set()
    path = os.path.expanduser(path)  # as mmengine does
    if "depth" in backbone:
        check_resnet_checkpoint(path, backbone["depth"], setting, f"{backbone_setting}.depth")
        command = f"tools/convert_checkpoint.py {path} converted.pth --to mm"
        return check_resnet_names(path, "layer", setting, command)
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no checkpoint {path!r}")
    return set()


def _check_layout(path: str, setting: str) -> None:
    """Check that a checkpoint's tensors stand where mmengine looks for them."""
    if "://" in path:
        return
    try:
        content = read_checkpoint(os.path.expanduser(path))
    except ValueError:
        return  # which mmengine notices, unlike the other
    if isinstance(content.get("model"), Mapping) and "state_dict" not in content:
        raise ValueError(
            f"{setting}: {path!r} has its tensors under 'model', as Detectron2 writes them, of "
            "which none would be loaded; write them as MMDetection has them: "
            f"torch.save({{'state_dict': torch.load({path!r})['model']}}, 'converted.pth')"
        )
