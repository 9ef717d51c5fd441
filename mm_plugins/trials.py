"""MMDetection's side of trying plugins: which lines of a config insert one, and its runs."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead, Shared2FCBBoxHead
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import set_random_seed
from mmengine.runner.checkpoint import load_checkpoint

from mm_plugins.analysis import analyze
from mm_plugins.attention_mask_consistency import AMCMixin
from mm_plugins.backbones import PluginMobileNetV2, PluginResNet
from mm_plugins.batchformer import BatchFormerMixin
from mm_plugins.dataset_nodes import find_datasets
from mm_plugins.datasets import prepare
from mm_plugins.evaluation_runs import coco_metric, results_file, results_prefix
from mm_plugins.grounding.functional_entropy import FunctionalEntropyMixin
from mm_plugins.preflight import check_config
from mm_plugins.roi_heads import BatchFormerBBoxHead
from mm_plugins.training_settings import check_training_settings
from plugin_core.block_plugins import blocks_of, registered_block_plugins
from plugin_core.files import replacing
from plugin_core.inspection.building import silence
from plugin_core.inspection.cost import Cost
from plugin_core.shipped import TOOLS, shipped_config
from plugin_core.training.trials import Plugin, Run

# A MobileNetV2's layers by the stage of a ResNet that has their stride
_LAYERS = {2: (1, 2), 3: (3,), 4: (4, 5), 5: (6, 7)}
# Plugin → its setting of a detector, and what adds it
_MIXINS: Mapping[str, tuple[str, type]] = {
    "amc": ("attention_mask_consistency", AMCMixin),
    "functional_entropy": ("functional_entropy", FunctionalEntropyMixin),
    "batchformer_v2": ("batchformer", BatchFormerMixin),
}
# Settings of schedulers that count iterations, or epochs
_COUNTS = ("begin", "end", "T_max", "total_iters", "total_steps", "step_size")


class MMDetectionTrials:
    """A config of MMDetection in a trial; see :class:`plugin_core.training.trials.Framework`.

    Args:
        config: path of the user's Python file, or ``mm_plugins::`` and a name.
        steps: iterations of a training; the config's own by default.
        iou_type: "bbox" or "segm", which detectors are compared by.

    Raises:
        ValueError: if the config is wrong, or its evaluation is no CocoMetric's.
    """

    suffix = ".py"

    def __init__(self, config: str, steps: int | None, iou_type: str = "bbox") -> None:
        register_all_modules(init_default_scope=False)
        self.config = os.path.abspath(shipped_config(config))
        if Config._is_lazy_import(self.config):
            raise ValueError(
                f"{config}: is a config of Python's imports (read_base), on which no text config "
                "can be based yet; write it with _base_"
            )
        cfg = self.cfg = self._read(self.config)
        self.scope = cfg.get("default_scope") or "mmdet"
        check_training_settings(cfg, train=True)
        self.batch_size = cfg.train_dataloader.batch_size
        self.iou_type, metric = iou_type, self._metric(cfg.val_evaluator)
        if iou_type not in (given := metric.get("metric", "bbox")):
            raise ValueError(f"--iou-type {iou_type}: is not in val_evaluator.metric, {given!r}")
        self.annotations = os.path.abspath(metric["ann_file"])
        self.steps = steps or self.own_steps

    @property
    def images(self) -> str | None:
        node = self.cfg.val_dataloader.dataset
        datasets = find_datasets(node, "val_dataloader.dataset", files=False)
        return next((dataset.images for dataset in datasets), None)

    def derive(self, plugin: Plugin | None) -> str:
        settings: dict[str, Any] = {}
        if plugin is not None and plugin.config:
            self._check_alike(plugin.config)
            return _text(plugin.config, {})
        if plugin is not None:
            settings["model"] = self._lines(plugin)
            imports = self.cfg.get("custom_imports") or {}
            names = imports.get("imports") or []
            names = [names] if isinstance(names, str) else list(names)
            if "mm_plugins" not in names:
                settings["custom_imports"] = {"imports": [*names, "mm_plugins"]}
        return _text(self.config, settings)

    def _check_alike(self, config: str) -> None:
        """Check that the user's own variant has the same steps, images a step and test images."""
        cfg = self._read(config)
        if cfg.train_dataloader.batch_size != self.batch_size:
            raise ValueError(
                f"{config}: train_dataloader.batch_size must be {self.batch_size}, "
                f"got {cfg.train_dataloader.batch_size}"
            )
        for key in ("train_cfg", "val_dataloader", "val_evaluator"):
            if cfg[key] != self.cfg[key]:
                raise ValueError(f"{config}: {key} must be as in {self.config}, got {cfg[key]}")

    def _lines(self, plugin: Plugin) -> dict[str, Any]:
        """Give what a plugin changes of the model."""
        model = self.cfg.model
        if plugin.name in _MIXINS:
            setting, mixin = _MIXINS[plugin.name]
            if model.get(setting) is not None:
                raise ValueError(f"model.{setting}: the config has it already")
            return {**self._detector(mixin), setting: {}}
        if plugin.name == "batchformer_v1":
            heads = (model.get("roi_head") or {}).get("bbox_head")
            if heads is None:
                raise ValueError(
                    f"model.roi_head: BatchFormer V1 is in RoI heads, and {model.type!r} has no "
                    "bbox_head there"
                )
            if isinstance(heads, Sequence):
                changed: Any = [{**_plain(head), **_with_batchformer(head)} for head in heads]
            else:
                changed = _with_batchformer(heads)
            return {"roi_head": {"bbox_head": changed}}
        return {"backbone": self._backbone(plugin)}

    def _detector(self, mixin: type) -> dict[str, Any]:
        """Name the detector that takes a method."""
        name = self.cfg.model.type
        if _is(name, mixin):
            return {}
        with_plugins = f"Plugin{name}"
        if not isinstance(name, str) or not _is(with_plugins, mixin):
            takes = [n for n in MODELS.module_dict if n.startswith("Plugin") and _is(n, mixin)]
            takers = ", ".join(sorted(n.removeprefix("Plugin") for n in takes))
            raise ValueError(f"model.type: {name!r} takes no such plugin; these do: {takers}")
        return {"type": with_plugins}

    def _backbone(self, plugin: Plugin) -> dict[str, Any]:
        backbone = self.cfg.model.get("backbone") or {}
        name = backbone.get("type")
        kind: Any = MODELS.get(name) if isinstance(name, str) else name
        changed: dict[str, Any] = {}
        is_last = blocks_of(plugin.name) == "last"
        if _is(name, MobileNetV2):
            changed = {"type": "PluginMobileNetV2"} if kind is MobileNetV2 else {}
            takes, position = PluginMobileNetV2, "after_linear_conv"
            layers = [layer for stage in plugin.stages for layer in _LAYERS[stage]]
            count = 7
        elif _is(name, ResNet):
            is_small = backbone.get("depth") in (10, 18, 34)
            changed = {"type": "PluginResNet"} if kind is ResNet and (is_small or is_last) else {}
            takes = PluginResNet if is_small else ResNet
            position = "after_conv2" if is_small else "after_conv3"
            layers = [stage - 1 for stage in plugin.stages]
            count = backbone.get("num_stages", 4)
        else:
            raise ValueError(
                f"model.backbone.type: {name!r} takes no block plugins; ResNet and MobileNetV2 do"
            )
        if not changed and not _is(name, takes):
            raise ValueError(f"model.backbone.type: {name!r} of this depth takes no block plugins")
        if layers[-1] > count:
            raise ValueError(
                f"model.backbone.num_stages: the backbone has {count}, and the plugin is for "
                f"stage {plugin.stages[-1]}, its {layers[-1]}th"
            )
        known = registered_block_plugins()
        if plugin.name in known:
            layer: dict[str, Any] = {"type": known[plugin.name].__name__, "warm_start": True}
        else:
            layer = {"type": "BlockPlugin", "name": plugin.name, "warm_start": True}
        layer |= plugin.arguments
        new: dict[str, Any] = {"cfg": layer, "position": position}
        if is_last and not (changed or _is(name, PluginResNet) or _is(name, PluginMobileNetV2)):
            new["blocks"] = "all"  # a relative of MMDetection's ResNet puts it into no other place
        if len(layers) < count:
            new["stages"] = tuple(number in layers for number in range(1, count + 1))
        if backbone.get("frozen_stages", -1) >= layers[0]:
            # A frozen block's plugin would stay as it is.
            changed["frozen_stages"] = layers[0] - 1
        return {**changed, "plugins": [*_plain(backbone.get("plugins") or []), new]}

    def settings(self, path: Path) -> Mapping[str, Any]:
        return self._read(str(path))._cfg_dict.to_dict()

    def check(self, path: Path) -> int:
        cfg = self._read(str(path))
        check_training_settings(cfg, train=True)
        model = check_config(cfg, train=True, resumes=False)
        for setting, copy_ in prepare(cfg, model, train=True).items():
            if setting.startswith("val_evaluator") and setting.endswith("ann_file"):
                self.annotations = copy_
        return sum(parameter.numel() for parameter in model.parameters()) if model else 0

    def cost(self, path: Path) -> Cost:
        with silence():
            return analyze(self._read(str(path))).total

    def initialize(self, seed: int, path: Path) -> None:
        set_random_seed(seed)
        with DefaultScope.overwrite_default_scope(self.scope):
            model = MODELS.build(copy.deepcopy(self.cfg.model))
            model.init_weights()
        if self.cfg.get("load_from"):
            load_checkpoint(model, self.cfg.load_from, map_location="cpu")
        with replacing(path) as file:
            torch.save({"state_dict": model.state_dict(), "meta": {}}, file)

    def run_config(self, base: Path, run: Run | None, folder: Path, steps: int) -> str:
        cfg = self._read(str(base))
        hooks = _plain(cfg.get("custom_hooks") or [])
        if not any(hook.get("type") == "ExactResumeHook" for hook in hooks):
            hooks.append({"type": "ExactResumeHook"})
        settings: dict[str, Any] = {
            "work_dir": str(folder.absolute()),
            "randomness": {"seed": run.seed if run else 0},
            "custom_hooks": hooks,
        }
        if run is None or steps != self.own_steps:
            settings |= self._schedule(cfg, steps)
        if run is None:
            settings |= dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator"))
            settings["default_hooks"]["logger"] = {"interval": 1}
            return _text(str(base.absolute()), settings)
        settings["load_from"] = str(run.initial.absolute())
        settings.setdefault("train_cfg", {})["val_interval"] = self._length(steps)[1]
        evaluator = _plain(cfg.val_evaluator)
        self._keep_results(evaluator, folder)
        # Of an evaluation that a kill has prevented
        settings["val_evaluator"] = evaluator
        is_one = isinstance(evaluator, Mapping)
        settings["test_evaluator"] = {"_delete_": True, **evaluator} if is_one else evaluator
        settings["test_dataloader"] = {"_delete_": True, **_plain(cfg.val_dataloader)}
        settings["test_cfg"] = {"_delete_": True, "type": "TestLoop"}
        return _text(str(base.absolute()), settings)

    def _length(self, steps: int) -> tuple[str, int]:
        """The length of a training in the unit of its loop, "epoch" or "iter"."""
        own = self.cfg.train_cfg
        by_epoch = steps == self.own_steps and "max_epochs" in own
        return ("epoch", own.max_epochs) if by_epoch else ("iter", steps)

    def _schedule(self, cfg: Config, steps: int) -> dict[str, Any]:
        """Scale the schedule to a number of iterations."""
        total = self.own_steps
        schedulers = []
        for scheduler in _plain(cfg.get("param_scheduler") or []):
            by_epoch = scheduler.get("by_epoch", True)
            factor = steps / (cfg.train_cfg.get("max_epochs", total) if by_epoch else total)
            scheduler.pop("convert_to_iter_based", None)
            for key in _COUNTS:
                if isinstance(scheduler.get(key), int):
                    scheduler[key] = round(scheduler[key] * factor)
            if "end" in scheduler:
                scheduler["end"] = max(scheduler["end"], scheduler.get("begin", 0) + 1)
            if "milestones" in scheduler:
                milestones = {max(1, round(m * factor)) for m in scheduler["milestones"]}
                scheduler["milestones"] = sorted(milestones)
            schedulers.append({**scheduler, "by_epoch": False})
        hook = (cfg.get("default_hooks") or {}).get("checkpoint") or {}
        interval = max(1, steps // 4)
        if not hook.get("by_epoch", True) and hook.get("interval", -1) > 0:
            interval = min(interval, hook["interval"])
        return {
            "train_cfg": {"_delete_": True, "type": "IterBasedTrainLoop", "max_iters": steps},
            "param_scheduler": schedulers,
            "default_hooks": {"checkpoint": {"by_epoch": False, "interval": interval}},
            "log_processor": {"by_epoch": False},
        }

    @cached_property
    def own_steps(self) -> int:
        """Count the iterations of the config's training."""
        loop = self.cfg.train_cfg
        if "max_iters" in loop:
            return loop.max_iters
        dataset = copy.deepcopy(self.cfg.train_dataloader.dataset)
        with DefaultScope.overwrite_default_scope(self.scope), redirect_stdout(None):
            images = len(DATASETS.build(dataset))
        return loop.max_epochs * math.ceil(images / self.batch_size)

    def command(self, config: Path, folder: Path, steps: int) -> list[str]:
        if last := self.weights(folder, steps):
            return [sys.executable, str(TOOLS / "test_mmdet.py"), str(config), str(last)]
        # Where there is nothing to go on from, --resume would leave out load_from.
        resume = ["--resume"] if any(folder.glob("*.pth")) else []
        return [sys.executable, str(TOOLS / "train_mmdet.py"), str(config), *resume]

    def log(self, folder: Path) -> list[dict[str, float]]:
        records = []
        for path in folder.glob("*/vis_data/scalars.json"):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # of a line that is being written
                    record = json.loads(line)
                    if "time" in record and "loss" in record:
                        step = record.get("iter", record.get("step", 0))
                        records.append({"step": step, "time": record["time"]})
        return records

    def results(self, folder: Path) -> Path | None:
        path = results_file(folder, self.iou_type)
        return path if path.is_file() else None

    def _keep_results(self, evaluator: Any, folder: Path) -> None:
        """Let the evaluator of a config write what :meth:`results` finds."""
        self._metric(evaluator)["outfile_prefix"] = results_prefix(folder)

    def _metric(self, evaluator: Any) -> Any:
        """Find the evaluator whose annotation file is that of the images."""
        return coco_metric(evaluator, "val_evaluator")

    def weights(self, folder: Path, steps: int) -> Path | None:
        unit, length = self._length(steps)
        path = folder / f"{unit}_{length}.pth"
        return path if path.is_file() else None

    def _read(self, config: str) -> Config:
        try:
            cfg = Config.fromfile(config)
        except Exception as error:  # of mmengine's reader, or of the config's own code
            raise ValueError(f"{config}: {type(error).__name__}: {error}") from error
        for key in ("model", "train_dataloader", "train_cfg", "val_dataloader", "val_evaluator"):
            if not cfg.get(key):
                raise ValueError(f"{config}: has no {key}")
        return cfg


def _is(name: Any, kind: type) -> bool:
    found: Any = MODELS.get(name) if isinstance(name, str) else name
    return inspect.isclass(found) and issubclass(found, kind)


def _with_batchformer(head: Mapping[str, Any]) -> dict[str, Any]:
    name = head.get("type")
    if _is(name, BatchFormerBBoxHead):
        raise ValueError("model.roi_head.bbox_head: is a BatchFormerBBoxHead already")
    kind: Any = MODELS.get(name) if isinstance(name, str) else name
    if kind not in (ConvFCBBoxHead, Shared2FCBBoxHead):
        raise ValueError(
            f"model.roi_head.bbox_head.type: {name!r} cannot be replaced by a "
            "BatchFormerBBoxHead; a Shared2FCBBoxHead can"
        )
    return {"type": "BatchFormerBBoxHead"}


def _plain(node: Any) -> Any:
    """Copy a part of a config as plain mappings and lists."""
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(part) for part in node] if isinstance(node, list) else copy.deepcopy(node)


def _text(base: str, settings: Mapping[str, Any]) -> str:
    """Write a config that is based on another one."""
    return f"_base_ = {base!r}\n" + (Config(dict(settings)).pretty_text if settings else "")
