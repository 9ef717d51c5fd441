"""Checks of a config and of the files that it names, before a run writes anything.

MMDetection would stop at a bare assertion, or go on with half of a checkpoint. These checks name
the wrong setting. They leave unknown settings to MMDetection.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmdet import __version__ as mmdet_version
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.models.layers import DinoTransformerDecoder
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import nn

from mm_plugins.analysis import load_config
from mm_plugins.backbones import PluginMobileNetV2, PluginResNet
from mm_plugins.block_plugins import BlockPlugin, is_for_last_block
from mm_plugins.datasets import reads
from mm_plugins.grounding.text_models import check_pretrained, describe_missing
from mm_plugins.init_cfgs import pretrained
from mm_plugins.training_settings import told_no_counts
from plugin_core.checkpoints.reading import read_checkpoint
from plugin_core.checkpoints.resnet_names import check_resnet_checkpoint, check_resnet_names
from plugin_core.datasets.check import Reads
from plugin_core.errors import ArgumentError, check_arguments, did_you_mean
from plugin_core.inspection.building import build_once, in_a_line

_RESNET_POSITIONS = ("after_conv1", "after_conv2", "after_conv3")
_MOBILENET_POSITIONS = ("after_linear_conv",)
_PLUGIN_KEYS = ("cfg", "position", "stages", "blocks")
# Keys that no constructor is given
_REGISTRY_KEYS = ("type", "_scope_", "_delete_", "postfix")


def check_config(cfg: Config, *, train: bool, resumes: bool) -> nn.Module | None:
    """Find mistakes in a config before the run.

    Args:
        cfg: the whole config, with command-line overrides.
        train: whether ``train_dataloader`` will be used, or ``test_dataloader`` only.
        resumes: whether weights come from a checkpoint of the same training.

    Returns:
        The model, built once, without memory for its parameters where that is possible; None if
        the config has none.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        return _check_config(cfg, train, resumes)


def _check_config(cfg: Config, train: bool, resumes: bool) -> nn.Module | None:
    loaders = ("train_dataloader", "val_dataloader") if train else ("test_dataloader",)
    for loader in loaders:
        if cfg.get(loader) is not None:
            _check_tokenizers(cfg[loader], loader)
    load_from = cfg.get("load_from")
    model = cfg.get("model", {})
    for setting, backbone, kind in _modules(model, ResNet, MobileNetV2):
        _check_plugins(backbone, kind, setting)
        for init_cfg in [] if load_from else pretrained(backbone.get("init_cfg")):
            checkpoint, where = init_cfg.get("checkpoint"), f"{setting}.init_cfg.checkpoint"
            if not isinstance(checkpoint, str):
                raise ValueError(f"{where}: must be the path of a checkpoint, got {checkpoint!r}")
            _check_names(checkpoint, where, backbone, setting)
            _check_layout(checkpoint, where)
    if "data_preprocessor" in cfg and model:  # the runner hands it on
        model = ConfigDict({"data_preprocessor": cfg.data_preprocessor, **model})
    built = _check_model(model) if model else None
    for module in built.modules() if train and built is not None else ():
        if told := told_no_counts(module, getattr(module, "counts", None), cfg):
            raise ValueError(f"model.head.loss.counts: {told}")
    if train and not load_from and not resumes and getattr(built, "trains", "") == "masks":
        raise ValueError(
            "load_from: names no checkpoint, and model.trains='masks' trains nothing but the mask "
            "head; name a checkpoint of a detector that was trained with model.trains='boxes'"
        )
    if load_from and not resumes:
        setting = "load_from" if train else "CHECKPOINT"
        check_weights(model, load_from, setting)
        _check_layout(load_from, setting)
    return built


def reads_of(config: str) -> Reads:
    """Tell what a config reads of its training data; raises ValueError."""
    cfg = load_config(config)
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        return reads(cfg, _check_model(cfg.model))


def check_weights(model: ConfigDict, path: str, setting: str) -> None:
    """Check that the ResNet in a whole model's checkpoint, if it has one, is the model's.

    Args:
        model: config of the model.
        path: path of the checkpoint.
        setting: setting that names the checkpoint, for the message.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    is_classifier = _registry().scope == "mmpretrain"
    to = "mmpretrain" if is_classifier else "mm"
    kinds: list[type] = [ResNet, MobileNetV2]
    if is_classifier:
        from mmpretrain.models import backbones

        kinds += [backbones.ResNet, backbones.MobileNetV2]
    for where, backbone, _ in _modules(model, *kinds):
        prefix = re.sub(r"\[(\d+)\]", r".\1", where).removeprefix("model.") + "."
        networks = _check_names(path, setting, backbone, where, to)
        if is_classifier and networks and not networks & {prefix, f"module.{prefix}"}:
            raise ValueError(
                f"{setting}: {path!r} has not the names of MMPretrain's classifiers; convert it: "
                f"{_command(path, to)}, or if it is a backbone alone use {where}.init_cfg="
                f"dict(type='Pretrained', checkpoint={path!r})"
            )
        if networks and networks <= {"", "module."}:
            raise ValueError(
                f"{setting}: {path!r} holds a backbone alone, which is not loaded into a detector; "
                f"use {where}.init_cfg=dict(type='Pretrained', checkpoint={path!r})"
            )


def _check_tokenizers(node: Any, setting: str) -> None:
    """Check the text models that the data's transforms name."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            _check_tokenizers(part, f"{setting}[{i}]")
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "tokenizer_name" and isinstance(value, str):
                check_pretrained(value, f"{setting}.{key}")
            _check_tokenizers(value, f"{setting}.{key}")


def _modules(model: Any, *kinds: type) -> Iterator[tuple[str, ConfigDict, type]]:
    """Find the modules of some classes in a model's config: setting, node and class of each."""
    for setting, node in _nodes(model, "model"):
        kind = node.get("type")
        kind = _registry().get(kind) if isinstance(kind, str) else kind
        if inspect.isclass(kind) and issubclass(kind, kinds):
            yield setting, node, kind


def _registry() -> Registry:
    """Find the registry of models that a config's scope chooses: MMDetection's or MMPretrain's."""
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry


def _check_plugins(backbone: ConfigDict, kind: Any, setting: str) -> None:
    """Check a backbone's depth and its plugins' places. MMDetection has only bare assertions."""
    is_resnet = issubclass(kind, ResNet)
    depth = backbone.get("depth")
    if is_resnet and depth is not None and depth not in kind.arch_settings:
        raise ValueError(
            f"{setting}.depth: no {kind.__name__} of depth {depth!r}; "
            f"there are {', '.join(map(str, kind.arch_settings))}"
        )
    positions: tuple[str, ...] = _RESNET_POSITIONS if is_resnet else _MOBILENET_POSITIONS
    num_stages = backbone.get("num_stages", 4) if is_resnet else len(kind.arch_settings)
    plugins = backbone.get("plugins") or ()
    is_small = is_resnet and depth in (10, 18, 34)
    if is_small:
        positions = positions[1:2]
    if plugins and (kind is MobileNetV2 or (kind is ResNet and is_small)):
        name = f"ResNet-{depth}" if is_small else "MobileNetV2"
        raise ValueError(
            f"{setting}.type: MMDetection's {name} takes no plugins; "
            f"use type='Plugin{kind.__name__}' and position={positions[0]!r}"
        )
    if not isinstance(plugins, (list, tuple)):
        raise ValueError(
            f"{setting}.plugins: must be a list of dict(cfg=dict(type=…), position=…, stages=…), "
            f"got {plugins!r}"
        )
    children: dict[tuple[Any, ...], int] = {}
    for i, plugin in enumerate(plugins):
        where = f"{setting}.plugins[{i}]"
        if not isinstance(plugin, dict) or not isinstance(plugin.get("cfg"), dict):
            raise ValueError(
                f"{where}: expected dict(cfg=dict(type=…), position=…, stages=…), got {plugin!r}"
            )
        for key in plugin:
            if key not in _PLUGIN_KEYS:
                raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, _PLUGIN_KEYS)}")
        if plugin.get("position") not in positions:
            raise ValueError(
                f"{where}.position: must be {' or '.join(map(repr, positions))} in this backbone, "
                f"got {plugin.get('position')!r}"
            )
        stages = plugin.get("stages")
        if stages is not None and (
            not isinstance(stages, (list, tuple))
            or len(stages) != num_stages
            or any(stage not in (True, False) for stage in stages)
        ):
            raise ValueError(
                f"{where}.stages: expected {num_stages} times True or False, one for each stage "
                f"of {setting}, got {stages!r}"
            )
        name = plugin["cfg"].get("type")
        if name is None or (isinstance(name, str) and _registry().get(name) is None):
            hint = did_you_mean(name, _registry().module_dict) if name else ""
            raise ValueError(
                f"{where}.cfg.type: must be a plugin layer such as 'TripletAttention' or "
                f"'BlockPlugin', got {name!r}{hint}"
            )
        layer = _registry().get(name) if isinstance(name, str) else name
        if inspect.isclass(layer) and issubclass(layer, BlockPlugin):
            if "in_channels" in plugin["cfg"]:
                raise ValueError(f"{where}.cfg.in_channels: leave it out; the backbone passes it")
            if layer is BlockPlugin and "name" not in plugin["cfg"]:
                raise ValueError(f"{where}.cfg.name: is missing; name a block plugin ('timm:eca')")
        try:
            is_for_last = is_for_last_block(plugin)
        except ArgumentError as error:
            at = "cfg." if error.argument == "name" else ""
            raise ValueError(f"{where}.{at}{error.argument}: {error.reason}") from error
        if is_for_last and not issubclass(kind, (PluginResNet, PluginMobileNetV2)):
            hint = "use type='PluginResNet', or " if kind is ResNet else ""
            raise ValueError(
                f"{where}.blocks: {name!r} is for the last block of a stage, and "
                f"{kind.__name__} puts plugins into all of them; {hint}say so by blocks='all'"
            )
        chosen = range(num_stages) if stages is None else [n for n, on in enumerate(stages) if on]
        for stage in chosen:
            other = children.setdefault((name, plugin["cfg"].get("postfix", ""), stage), i)
            if other != i:
                raise ValueError(
                    f"{where}.cfg: plugins[{other}] is a {name!r} in the same stage; give each a "
                    "postfix of its own, such as postfix='_2'"
                )


def _check_model(model: ConfigDict) -> nn.Module:
    """Build the model once without memory, and raise its parts' errors in one line."""

    def build(device: str) -> nn.Module:
        return MODELS.build(copy.deepcopy(model))

    def explain(error: Exception) -> ValueError:
        setting, node = _being_built(error, model)
        kind = node.get("type")
        is_unknown = isinstance(error, KeyError) and isinstance(kind, str)
        if is_unknown and _registry().get(kind) is None:
            hint = did_you_mean(kind, _registry().module_dict)
            return ValueError(f"{setting}.type: no module is registered as {kind!r}{hint}")
        if isinstance(error, OSError) and setting.endswith("tokenizer"):
            return ValueError(f"{setting}.name_or_path: {describe_missing(node, error)}")
        if isinstance(error, TypeError) and kind is not None:
            try:
                arguments = [key for key in node if key not in _REGISTRY_KEYS]
                check_arguments(_registry().get(kind) if isinstance(kind, str) else kind, arguments)
            except ArgumentError as unknown:
                error = unknown
                if unknown.argument == "plugins":
                    return ValueError(
                        f"{setting}.type: {kind!r} takes no plugins; type='PluginResNet' and "
                        "'PluginMobileNetV2' do"
                    )
        if isinstance(error, ArgumentError):
            return ValueError(f"{setting}.{error.argument}: {error.reason}")
        if isinstance(error, ValueError):
            return ValueError(f"{setting}: {' '.join(str(error).split())}")
        return ValueError(in_a_line(error, setting))

    built = build_once(build, explain)
    check_decoder(getattr(built, "decoder", None))
    return built


def check_decoder(decoder: Any) -> None:
    """Refuse a decoder of Grounding DINO that does not fit the forward that it has from DINO's.

    That is so in onedl-mmdetection 3.4.6 to 3.5.1, where DINO's encodes boxes twice as widely.

    Args:
        decoder: of a detector; others pass.

    Raises:
        ValueError: says so, with the installed version.
    """
    if not isinstance(decoder, GroundingDinoTransformerDecoder):
        return
    with torch.device("meta"):
        dino = DinoTransformerDecoder(1, {}, post_norm_cfg=None)
    given, taken = (d.ref_point_head.layers[0].in_features // d.embed_dims for d in (dino, decoder))
    if given != taken:
        raise ValueError(
            f"model.type: Grounding DINO cannot run in MMDetection {mmdet_version}: its decoder "
            f"encodes boxes in {given} times a query's width, and its ref_point_head takes "
            f"{taken} times; install mmdet 3.3 for it"
        )


def _being_built(error: Exception, model: ConfigDict) -> tuple[str, ConfigDict]:
    """Find the innermost module that was being built when an error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        # mmengine's function and mmcv's, both with the module's config as `cfg`. Whoever builds a
        # part may have added to it.
        if frame.f_code.co_name in ("build_from_cfg", "build_plugin_layer"):
            built = frame.f_locals.get("cfg")
            alike = [
                (setting, node)
                for setting, node in _nodes(model, "model")
                if isinstance(built, dict)
                and node
                and all(built.get(key) == node[key] for key in node if key != "postfix")
            ]
            if alike:
                return max(alike, key=lambda place: len(place[1].keys() - {"postfix"}))
    return "model", model


def _nodes(node: Any, setting: str) -> Iterator[tuple[str, ConfigDict]]:
    """List all mappings in a model's config, each with its setting."""
    if isinstance(node, (list, tuple)):
        for i, part in enumerate(node):
            yield from _nodes(part, f"{setting}[{i}]")
    if isinstance(node, dict):
        yield setting, node
        for key, value in node.items():
            yield from _nodes(value, f"{setting}.{key}")


def _command(path: str, to: str) -> str:
    return f"tools/convert_checkpoint.py {path} converted.pth --to {to}"


def _check_names(
    path: str, setting: str, backbone: ConfigDict, backbone_setting: str, to: str = "mm"
) -> set[str]:
    """Check the ResNet in a checkpoint, if there is one, and return the prefixes of its names."""
    if "://" in path:
        return set()
    path = os.path.expanduser(path)  # as mmengine does
    if "depth" in backbone:
        check_resnet_checkpoint(path, backbone["depth"], setting, f"{backbone_setting}.depth")
        return check_resnet_names(path, "layer", setting, _command(path, to))
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
        return  # mmengine notices an unreadable file, but not a wrong layout
    if isinstance(content.get("model"), Mapping) and "state_dict" not in content:
        raise ValueError(
            f"{setting}: {path!r} has its tensors under 'model', as Detectron2 writes them, of "
            "which none would be loaded; write them as MMDetection has them: "
            f"torch.save({{'state_dict': torch.load({path!r})['model']}}, 'converted.pth')"
        )
