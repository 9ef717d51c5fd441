"""Checks of what a config says beside its model: loops, data, optimizer, schedules, hooks.

mmengine finds a typo there when it builds the part, in a traceback after the work folder is made.
Each type is looked up in its registry, its arguments are compared with its constructor's, and what
is cheap is built.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmdet.datasets.transforms import LoadPanopticAnnotations
from mmdet.evaluation import CocoMetric, CocoPanopticMetric
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    DefaultScope,
    Registry,
)
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from torch import nn
from torch.utils.data import DataLoader

from mm_plugins.panoptic_quality import PanopticQualityMetric, check_installed
from plugin_core.errors import ArgumentError, check_arguments, did_you_mean

# Keys that no constructor is given
_REGISTRY_KEYS = ("type", "_scope_", "_delete_")
# Of a dataloader, taken out by mmengine before PyTorch gets the rest
_PARTS_OF_LOADER = (
    *("dataset", "sampler", "batch_sampler", "collate_fn", "worker_init_fn"),
    *("num_batch_per_epoch", "disable_subprocess_warning"),
)
_GIVEN_TO_FUNCTIONS = ("data_batch", "worker_id")
_ENVIRONMENT = ("cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit")
_IN_PLACE_OF = {
    LoadPanopticAnnotations: "LoadPanopticSegments",
    CocoPanopticMetric: "PanopticQualityMetric",
}
_COUNTS = ("max_epochs", "max_iters", "val_interval")


def check_training_settings(cfg: Config, *, train: bool) -> None:
    """Check all settings that a run will read, but for the model's.

    Args:
        cfg: the whole config.
        train: whether it trains, or only tests.

    Raises:
        ValueError: names each setting that is wrong, its value and what would be right.
    """
    with (
        DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"),
        torch.random.fork_rng(devices=()),
    ):
        wrong = list(_check_all(cfg, train))
    if wrong:
        raise ValueError("\n".join(dict.fromkeys(wrong)))


def check_options(options: Iterable[str], settings: Iterable[str]) -> None:
    """Check that a config, or mmengine, knows the first words of options.

    mmengine would take an unknown one for a new setting, which nothing reads.

    Args:
        options: of the command line.
        settings: of the config's file.

    Raises:
        ValueError: names the option, and the likely setting.
    """
    known = {*settings, *inspect.signature(Runner.__init__).parameters, "unreadable_images"}
    known |= {"runner_type", "auto_scale_lr", "tta_model", "tta_pipeline"}
    for option in options:
        first = option.partition(".")[0]
        if first not in known:
            raise ValueError(
                f"--cfg-options {option}: the config has no setting {first!r}"
                f"{did_you_mean(first, known)}"
            )


def _check_all(cfg: Config, train: bool) -> Iterator[str]:
    """Say what is wrong with each part of a config."""
    splits = ("train", "val") if train else ("test",)
    for split in splits:
        if (loader := cfg.get(f"{split}_dataloader")) is not None:
            yield from _check_loader(loader, f"{split}_dataloader")
        if (loop := cfg.get(f"{split}_cfg")) is not None:
            yield from _check_loop(loop, f"{split}_cfg")
        if split != "train" and (evaluator := cfg.get(f"{split}_evaluator")) is not None:
            metrics = f"{split}_evaluator"
            if isinstance(evaluator, Mapping) and "metrics" in evaluator:  # as the runner tells
                yield from _check_typed(evaluator, metrics, EVALUATOR, default=Evaluator)
                evaluator, metrics = evaluator["metrics"], f"{metrics}.metrics"
            for setting, node in _items(evaluator, metrics):
                yield from _check_metric(node, setting)
                yield from _check_counts(node, setting, cfg)
    if train:
        yield from _check_optimization(cfg)
    default_hooks = cfg.get("default_hooks") or {}
    for setting, node in (
        *((f"default_hooks.{name}", node) for name, node in default_hooks.items()),
        *_items(cfg.get("custom_hooks") or (), "custom_hooks"),
    ):
        if node is not None:
            yield from _check_hook(node, setting)
    for name, registry in (("visualizer", VISUALIZERS), ("log_processor", LOG_PROCESSORS)):
        node = cfg.get(name)
        if isinstance(node, dict) and "type" in node:
            yield from _check_typed(node, name, registry)
            for setting, backend in _items(node.get("vis_backends") or (), f"{name}.vis_backends"):
                yield from _check_typed(backend, setting, VISBACKENDS)
    for key in cfg.get("env_cfg") or {}:
        if key not in _ENVIRONMENT:
            there_are = f"there are {', '.join(_ENVIRONMENT)}{did_you_mean(key, _ENVIRONMENT)}"
            yield f"env_cfg.{key}: is read by nothing; {there_are}"
    level = cfg.get("log_level", "INFO")
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        yield f"log_level: must be one of {', '.join(levels)}, got {level!r}"
    seed = (cfg.get("randomness") or {}).get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        yield f"randomness.seed: must be a whole number from 0 on, or None, got {seed!r}"


def _items(node: Any, setting: str) -> Iterator[tuple[str, Any]]:
    """List a setting's parts, each with its setting; a mapping is its only one."""
    if isinstance(node, Sequence) and not isinstance(node, str):
        for i, part in enumerate(node):
            yield f"{setting}[{i}]", part
    else:
        yield setting, node


def _check_typed(
    node: Any,
    setting: str,
    registry: Registry,
    given: Sequence[str] = (),
    default: Callable[..., Any] | None = None,
) -> Iterator[str]:
    """Check the type of a node and the names of its arguments.

    Args:
        node: of the config.
        setting: that has it.
        registry: of the type.
        given: arguments that mmengine adds.
        default: class where the node names none.
    """
    if not isinstance(node, Mapping):
        if isinstance(node, (str, int, float, list, tuple)):
            yield f"{setting}: must be dict(type=…), got {node!r}"
        return
    kind = _kind(node, registry, default)
    if kind is None:
        name = node.get("type")
        if name is None:
            yield f"{setting}.type: is missing; {setting} is a dict with the type of a class"
        elif isinstance(name, str) and "." not in name:
            with registry.switch_scope_and_registry(None) as own:
                names = {key for one in _with_parents(own) for key in one.module_dict}
            yield f"{setting}.type: there is no {registry.name} {name!r}{did_you_mean(name, names)}"
        return
    arguments = [key for key in node if key not in (*_REGISTRY_KEYS, *given)]
    if kind is CheckpointHook:  # it hands on to the runner what it does not know itself
        kind = _checkpoint_hook_takes()
    try:
        check_arguments(kind, arguments, reserved=given)
    except ArgumentError as error:
        yield f"{setting}.{error.argument}: {error.reason}"
    except (TypeError, ValueError):  # a class without a signature
        return
    if kind in _IN_PLACE_OF and importlib.util.find_spec("panopticapi") is None:
        yield (
            f"{setting}.type: {kind.__name__} needs panopticapi, which is on no package index; use "
            f"type={_IN_PLACE_OF[kind]!r} in its place, with custom_imports of mm_plugins"
        )


def _checkpoint_hook_takes() -> Callable[..., None]:
    """Make a function that takes what a CheckpointHook and the runner that it calls take."""

    def function(**arguments: Any) -> None: ...

    parameters = {
        p.name: p.replace(kind=p.KEYWORD_ONLY)
        for method in (Runner.save_checkpoint, CheckpointHook.__init__)
        for p in inspect.signature(method).parameters.values()
        if p.kind is not p.VAR_KEYWORD and p.name != "self"
    }
    function.__signature__ = inspect.Signature([*parameters.values()])  # type: ignore[attr-defined]
    return function


def _kind(node: Any, registry: Registry, default: Callable[..., Any] | None = None) -> Any:
    """Find the class that a node names; None if there is none, or it is of another package."""
    name = node.get("type", default)
    if not isinstance(name, str):
        return name
    try:
        with registry.switch_scope_and_registry(None) as own:  # of the config's scope
            return own.get(name)
    except Exception:  # of a package that cannot be imported
        return None


def _with_parents(registry: Registry | None) -> Iterator[Registry]:
    while registry is not None:
        yield registry
        registry = registry.parent


def _tried(setting: str, build: Callable[[], Any]) -> Iterator[str]:
    """Build something, and say what it raises."""
    try:
        build()
    except Exception as error:  # a constructor may raise anything
        said = error.args[0] if isinstance(error, KeyError) and error.args else error
        text = " ".join(str(said).split()) or type(error).__name__
        yield f"{setting}: {text[:300]}"


def _check_loader(node: Any, setting: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    rest = {key: value for key, value in node.items() if key not in _PARTS_OF_LOADER}
    try:
        check_arguments(DataLoader, rest)
    except ArgumentError as error:
        yield f"{setting}.{error.argument}: {error.reason}"
        return
    yield from _tried(setting, lambda: DataLoader([0], **rest))  # type: ignore[arg-type]
    batch_size = rest.get("batch_size")
    if isinstance(batch_size, bool) or (batch_size is not None and not isinstance(batch_size, int)):
        yield f"{setting}.batch_size: must be a whole number, got {batch_size!r}"
    for part, given in (("sampler", ("dataset", "seed")), ("batch_sampler", ("sampler",))):
        if node.get(part) is not None:
            yield from _check_typed(node[part], f"{setting}.{part}", DATA_SAMPLERS, given)
    for part in ("collate_fn", "worker_init_fn"):
        if isinstance(node.get(part), dict):
            yield from _check_typed(node[part], f"{setting}.{part}", FUNCTIONS, _GIVEN_TO_FUNCTIONS)
    yield from _check_dataset(node.get("dataset"), f"{setting}.dataset")


def _check_dataset(node: Any, setting: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    yield from _check_typed(node, setting, DATASETS)
    for key in ("dataset", "datasets"):
        for inner, part in _items(node.get(key), f"{setting}.{key}"):
            yield from _check_dataset(part, inner)
    if isinstance(pipeline := node.get("pipeline"), (list, tuple)):
        for inner, step in _items(pipeline, f"{setting}.pipeline"):
            yield from _check_step(step, inner)


def _check_step(step: Any, setting: str) -> Iterator[str]:
    """Check a transform of a pipeline."""
    found = list(_check_typed(step, setting, TRANSFORMS))
    yield from found
    # A tokenizer takes seconds to read, and is checked elsewhere.
    if not found and isinstance(step, dict) and "tokenizer_name" not in step:
        yield from _tried(setting, lambda: TRANSFORMS.build(copy.deepcopy(step)))


def _check_metric(node: Any, setting: str) -> Iterator[str]:
    found = list(_check_typed(node, setting, METRICS))
    yield from found
    kind = _kind(node, METRICS) if isinstance(node, dict) else None
    if not found and kind is CocoMetric:
        rest = {k: v for k, v in node.items() if k not in (*_REGISTRY_KEYS, "ann_file")}
        yield from _tried(setting, partial(kind, **rest))
    if kind is PanopticQualityMetric:
        yield from _tried(f"{setting}.type", check_installed)
    if not found and getattr(kind, "__module__", "").startswith("mm_plugins.mmpretrain."):
        yield from _tried(setting, lambda: METRICS.build(copy.deepcopy(node)))


def _check_counts(node: Any, setting: str, cfg: Config) -> Iterator[str]:
    kind = _kind(node, METRICS) if isinstance(node, dict) else None
    if kind is not None and (told := told_no_counts(kind, node.get("counts"), cfg)):
        yield f"{setting}.counts: {told}"


def told_no_counts(part: Any, counts: Any, cfg: Config) -> str:
    """Say that nothing tells a loss or a metric how many training images each class has.

    Args:
        part: the loss, the metric or its class; of what needs no counts nothing is said.
        counts: that it has; None for none.
        cfg: the whole config.
    """
    hook = getattr(part, "counted_by", None)
    hooks = [_kind(node, HOOKS) for _, node in _items(cfg.get("custom_hooks") or (), "")]
    counts_them = cfg.get("train_dataloader") is not None and hook in [
        getattr(kind, "__name__", "") for kind in hooks
    ]
    return "" if hook is None or counts is not None or counts_them else part.no_counts


def _check_hook(node: Any, setting: str) -> Iterator[str]:
    found = list(_check_typed(node, setting, HOOKS, ("priority",)))
    yield from found
    kind = _kind(node, HOOKS) if isinstance(node, dict) else None
    # mmengine's own hooks begin to work with the run; others may when they are made.
    if not found and inspect.isclass(kind) and kind.__module__.startswith("mmengine."):
        arguments = {k: v for k, v in node.items() if k not in (*_REGISTRY_KEYS, "priority")}
        yield from _tried(setting, partial(kind, **arguments))
        interval = node.get("interval", 1)
        if isinstance(interval, bool) or not isinstance(interval, int):
            yield f"{setting}.interval: must be a whole number, got {interval!r}"


def _check_loop(node: Any, setting: str) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    by_epoch = node.get("by_epoch")
    own: Any = {"val_cfg": ValLoop, "test_cfg": TestLoop}.get(setting)
    if own is None and "type" not in node:
        if by_epoch is None:
            yield f"{setting}.type: is missing; 'EpochBasedTrainLoop' or 'IterBasedTrainLoop'"
            return
        own = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
    given = ("runner", "dataloader", "evaluator", "by_epoch")
    yield from _check_typed(node, setting, LOOPS, given, own)
    for key in _COUNTS:
        value = node.get(key)
        if value is not None and (type(value) is not int or value < 1):
            yield f"{setting}.{key}: must be a whole number from 1 on, got {value!r}"


def _check_optimization(cfg: Config) -> Iterator[str]:
    """Check the optimizer, and the schedules with it."""
    wrapper = cfg.get("optim_wrapper")
    if not isinstance(wrapper, dict) or not isinstance(wrapper.get("optimizer"), dict):
        return  # several optimizers, or none
    given = ("optimizer", "constructor", "paramwise_cfg", "max_non_finite_steps")
    yield from _check_typed(wrapper, "optim_wrapper", OPTIM_WRAPPERS, given, OptimWrapper)
    setting, node = "optim_wrapper.optimizer", wrapper["optimizer"]
    found = list(_check_typed(node, setting, OPTIMIZERS))
    yield from found
    kind = _kind(node, OPTIMIZERS)
    if found or not inspect.isclass(kind):
        return
    arguments = {k: v for k, v in node.items() if k not in _REGISTRY_KEYS}
    if isinstance(arguments.get("lr"), str):
        yield f"{setting}.lr: must be a number, got {arguments['lr']!r}"
        return
    built: list[Any] = []
    parameter = nn.Parameter(torch.zeros(1))
    found = list(_tried(setting, lambda: built.append(kind([parameter], **arguments))))
    yield from found
    for setting, node in _schedules(cfg.get("param_scheduler")):
        wrong = list(_check_typed(node, setting, PARAM_SCHEDULERS, ("convert_to_iter_based",)))
        yield from wrong
        kind = _kind(node, PARAM_SCHEDULERS) if isinstance(node, dict) else None
        if found or wrong or kind is None:
            continue
        skipped = (*_REGISTRY_KEYS, "convert_to_iter_based")
        rest = {k: v for k, v in node.items() if k not in skipped}
        yield from _tried(setting, partial(kind, built[0], **rest))


def _schedules(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and "type" not in node:  # of several optimizers
        for key, part in node.items():
            yield from _items(part, f"param_scheduler.{key}")
    elif node is not None:
        yield from _items(node, "param_scheduler")
