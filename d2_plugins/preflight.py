"""Checks of a config and of the files that it names, before a run writes anything."""

from __future__ import annotations

import importlib.util
import mmap
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    ResNet,
    build_model,
)
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from d2_plugins.attention_mask_consistency import is_amc
from d2_plugins.checkpointer import check_weights, find_resumable
from d2_plugins.config import add_plugin_config, load_lazy_config, merge_config
from d2_plugins.datasets import describe, prepare
from d2_plugins.evaluation import check_evaluator
from d2_plugins.mmdet_bridge import check_detector, is_bridge
from d2_plugins.optimizer import check_solver
from d2_plugins.roi_heads import (
    CascadePluginROIHeads,
    Res5PluginROIHeads,
    StandardPluginROIHeads,
)
from plugin_core import BlockPlugin
from plugin_core.block_plugins import registered_block_plugins
from plugin_core.checkpoints.reading import class_names_of
from plugin_core.checkpoints.resnet_names import (
    RESNET_DEPTHS,
    check_resnet_checkpoint,
    check_resnet_names,
)
from plugin_core.datasets.check import Reads, Use
from plugin_core.datasets.coco_file import check_whole
from plugin_core.errors import ArgumentError, did_you_mean, origin
from plugin_core.inspection.building import build_once, in_a_line

# Detectron2's builders of ResNets, and the same with plugins
_WITH_PLUGINS = {
    "build_resnet_backbone": "build_resnet_plugin_backbone",
    "build_resnet_fpn_backbone": "build_resnet_plugin_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_plugin_fpn_backbone",
}
# Detectron2's meta-architectures that build no RoI heads
_WITHOUT_ROI_HEADS = ("RetinaNet", "AMCRetinaNet", "ProposalNetwork", "SemanticSegmentor")

# Folders that a dataset's metadata may name
_FOLDERS = {
    "image_root": "image",
    "panoptic_root": "panoptic annotations'",
    "sem_seg_root": "semantic annotations'",
}
# Packages for evaluating some datasets. Without this check Detectron2 misses them after training.
_PACKAGES = {
    "lvis": ("lvis", "pip install lvis"),
    "cityscapes_instance": ("cityscapesscripts", "pip install cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "pip install cityscapesscripts"),
    "coco_panoptic_seg": (
        "panopticapi",
        "pip install git+https://github.com/cocodataset/panopticapi.git",
    ),
}


def check_config(cfg: CfgNode, *, eval_only: bool, resume: bool) -> None:
    """Find mistakes in a config before the run.

    Args:
        cfg: the whole config.
        eval_only: whether only the test sets and the weights will be used.
        resume: whether weights come from ``cfg.OUTPUT_DIR`` where it has a checkpoint.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    _check_meta_architecture(cfg)
    if not is_bridge(cfg):
        _check_backbone(cfg)
        _check_roi_heads(cfg)
    _check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN: names no dataset to train on")
        check_solver(cfg)
        _check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN, train=True)
    resumed = (find_resumable(cfg.OUTPUT_DIR) if resume else None) or ""
    if is_bridge(cfg):
        model = check_detector(cfg, eval_only=eval_only, resumed=bool(resumed))
    else:
        model = _check_model(cfg)
    if not resumed:
        _check_weights(cfg, eval_only, model)
    _check_data(cfg, model, eval_only=eval_only, resumed=resumed)


def reads_of(config: str) -> Reads:
    """Tell what a config of either kind reads of its training data; raises ValueError."""
    if config.endswith(".py"):
        lazy = load_lazy_config(config, [])
        return _lazy_reads(lazy, _build_lazily(lazy))
    cfg = _default_config()
    merge_config(cfg, config, ["MODEL.DEVICE", "cpu"])
    return _reads(cfg, None if is_bridge(cfg) else _check_model(cfg))


def _reads(cfg: CfgNode, model: nn.Module | None) -> Reads:
    number = None if is_bridge(cfg) else _number_of_classes(model)
    node = "MODEL.RETINANET" if hasattr(model, "num_classes") else "MODEL.ROI_HEADS"
    use = Use(
        "train",
        cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else "",
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        keeps_empty=len(cfg.DATASETS.TRAIN) > 1 or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        skips_unreadable=cfg.INPUT.SKIP_BAD_IMAGES,
    )
    return Reads(use, heads=[] if number is None else [(f"{node}.NUM_CLASSES", number)])


def _check_data(cfg: CfgNode, model: nn.Module, *, eval_only: bool, resumed: str) -> None:
    """Check the files of the datasets, and what the model reads of them."""
    sigmas, reads = cfg.TEST.KEYPOINT_OKS_SIGMAS, _reads(cfg, model)
    keypoints = reads.use.keypoints
    # Without sigmas of its own pycocotools takes those of COCO's 17 keypoints.
    if keypoints and cfg.DATASETS.TEST and len(sigmas or range(17)) != keypoints:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS: it has {len(sigmas) or 17} sigmas, but "
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {keypoints}; set one for each keypoint "
            "(about 0.05)"
        )
    prepare(
        [] if eval_only else [("DATASETS.TRAIN", name) for name in cfg.DATASETS.TRAIN],
        [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST],
        reads,
        _known_classes(resumed, cfg.MODEL.WEIGHTS if eval_only else "", cfg.DATASETS.TRAIN),
    )


def _number_of_classes(model: Any) -> int | None:
    """Count the classes of a detector of Detectron2; None if it does not tell them."""
    number = getattr(getattr(model, "roi_heads", model), "num_classes", None)
    return number if isinstance(number, int) else None


def _known_classes(resumed: str, weights: str, train: Sequence[str]) -> Sequence[str] | None:
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


def check_lazy_config(cfg: DictConfig, *, eval_only: bool, resume: bool) -> None:
    """Check the datasets and the weights of a LazyConfig, before anything is built.

    Args:
        cfg: the whole config, laid out as Detectron2's own.
        eval_only: whether only the test set and the weights will be used.
        resume: whether weights come from ``cfg.train.output_dir`` where it has a checkpoint.

    Raises:
        ValueError: names the key, its value and the right ones.
    """
    for split in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{split}.dataset.names"
        names = OmegaConf.select(cfg, key)
        if names is not None:  # another kind of loader has no names
            _check_datasets(key, _lazy_names(cfg, split), train=split == "train")
    _check_lazy_plugins(cfg)
    weights = cfg.train.init_checkpoint.partition("?")[0]
    resumed = (find_resumable(cfg.train.output_dir) if resume else None) or ""
    if eval_only and not weights:
        raise ValueError("train.init_checkpoint: --eval-only needs the checkpoint to evaluate")
    model = _build_lazily(cfg)
    key = "model.backbone.bottom_up.plugins"
    _check_plugins_are_read(model, OmegaConf.select(cfg, key) or (), key, "name")
    _check_lazy_data(cfg, model, eval_only=eval_only, resumed=resumed)
    if not weights or resumed or "://" in weights:
        return
    depth_key = "model.backbone.bottom_up.stages.depth"
    depth = _lazy_depth(cfg)
    if depth is not None:
        check_resnet_checkpoint(weights, depth, "train.init_checkpoint", depth_key)
        _check_spelling(weights, "train.init_checkpoint", model)
    elif not os.path.isfile(weights):
        raise ValueError(f"train.init_checkpoint: there is no checkpoint {weights!r}")
    check_weights(model, weights, "train.init_checkpoint", whole=eval_only)


def _build_lazily(cfg: DictConfig) -> nn.Module:
    return build_once(lambda device: instantiate(cfg.model), lambda error: _explain(error, "model"))


def _lazy_reads(cfg: DictConfig, model: Any) -> Reads:
    heads = getattr(model, "roi_heads", None)
    masks = getattr(heads, "mask_head", None) is not None
    mask_format = OmegaConf.select(cfg, "dataloader.train.mapper.instance_mask_format")
    keeps_empty = OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty") is False
    use = Use(
        "train",
        (mask_format or "polygon") if masks else "",
        getattr(getattr(heads, "keypoint_head", None), "num_keypoints", 0),
        keeps_empty=len(_lazy_names(cfg, "train")) > 1 or keeps_empty,
        skips_unreadable=bool(OmegaConf.select(cfg, "dataloader.train.mapper.skip_bad_images")),
    )
    number = _number_of_classes(model)
    node = "model" if heads is None else "model.roi_heads"
    return Reads(use, heads=[] if number is None else [(f"{node}.num_classes", number)])


def _lazy_names(cfg: DictConfig, split: str) -> tuple[str, ...]:
    names = OmegaConf.select(cfg, f"dataloader.{split}.dataset.names") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _check_lazy_data(cfg: DictConfig, model: Any, *, eval_only: bool, resumed: str) -> None:
    """Check the files of a LazyConfig's datasets, and what the model reads of them."""
    train, test = (
        [(f"dataloader.{split}.dataset.names", name) for name in _lazy_names(cfg, split)]
        for split in ("train", "test")
    )
    weights = cfg.train.init_checkpoint if eval_only else ""
    classes = _known_classes(resumed, weights, _lazy_names(cfg, "train"))
    prepare([] if eval_only else train, test, _lazy_reads(cfg, model), classes)


def _lazy_depth(cfg: DictConfig) -> int | None:
    """Read the depth of a ResNet with the usual stages; None if the config lists the stages."""
    stages = OmegaConf.select(cfg, "model.backbone.bottom_up.stages")
    return stages.get("depth") if isinstance(stages, DictConfig) else None


def _check_lazy_plugins(cfg: DictConfig) -> None:
    bottom_up: Any = OmegaConf.select(cfg, "model.backbone.bottom_up")
    if not (bottom_up and bottom_up.get("plugins")):
        return
    target = bottom_up._target_
    if (locate(target) if isinstance(target, str) else target) is ResNet:
        raise ValueError(
            "model.backbone.bottom_up._target_: Detectron2's ResNet takes no plugins; "
            "use d2_plugins.backbones.build_resnet_with_plugins"
        )


def _default_config() -> Any:
    cfg = get_cfg()
    add_plugin_config(cfg)
    return cfg


def _check_meta_architecture(cfg: CfgNode) -> None:
    """Check that the nodes of the plugins are read."""
    name = cfg.MODEL.META_ARCHITECTURE
    if name in META_ARCH_REGISTRY and _is_users_own(META_ARCH_REGISTRY.get(name)):
        return  # a user's own class may read all nodes
    default = _default_config()
    if not is_amc(cfg) and cfg.MODEL.AMC != default.MODEL.AMC:
        hint = "use 'AMCRetinaNet'" if name == "RetinaNet" else "use 'AMCGeneralizedRCNN'"
        if is_bridge(cfg):
            hint = "a detector of MMDetection has AMC in its own config, MODEL.MMDET.CONFIG"
        raise ValueError(
            f"MODEL.AMC is set, but MODEL.META_ARCHITECTURE is {name!r}, which does not read it; "
            f"{hint}"
        )
    if not is_bridge(cfg):
        if cfg.MODEL.MMDET != default.MODEL.MMDET:
            raise ValueError(
                f"MODEL.MMDET is set, but MODEL.META_ARCHITECTURE is {name!r}, which does not read "
                "it; use 'MMDetDetector'"
            )
        return
    nodes = {"RESNETS": ("PLUGINS",), "ROI_BOX_HEAD": ("IDA", "BATCHFORMER")}
    for parent, plugins in nodes.items():
        for plugin in plugins:
            if cfg.MODEL[parent][plugin] != default.MODEL[parent][plugin]:
                raise ValueError(
                    f"MODEL.{parent}.{plugin} is set, but MODEL.META_ARCHITECTURE is "
                    f"{name!r}, which does not read it; what a detector of MMDetection is "
                    "made of is said in its own config, MODEL.MMDET.CONFIG"
                )


def _check_backbone(cfg: CfgNode) -> None:
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY:
        hint = did_you_mean(name, [known for known, _ in BACKBONE_REGISTRY])
        raise ValueError(f"MODEL.BACKBONE.NAME: no backbone is registered as {name!r}{hint}")
    if not _has_resnet(cfg):
        return  # a user's own builder may know other depths
    if cfg.MODEL.RESNETS.DEPTH not in RESNET_DEPTHS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH: no ResNet of depth {cfg.MODEL.RESNETS.DEPTH}; "
            f"there are {', '.join(map(str, RESNET_DEPTHS))}"
        )
    if cfg.MODEL.RESNETS.PLUGINS and name in _WITH_PLUGINS:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: {name!r} takes no plugins, but MODEL.RESNETS.PLUGINS is "
            f"{cfg.MODEL.RESNETS.PLUGINS}; use {_WITH_PLUGINS[name]!r}"
        )


def _check_roi_heads(cfg: CfgNode) -> None:
    """Check that something reads the settings of a box head's IDA and BatchFormer."""
    box_head, default = cfg.MODEL.ROI_BOX_HEAD, _default_config().MODEL.ROI_BOX_HEAD
    has_ida, has_batchformer = box_head.NAME == "IDABoxHead", box_head.BATCHFORMER.ENABLED
    if not has_ida and box_head.IDA != default.IDA:
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.IDA is set, but MODEL.ROI_BOX_HEAD.NAME is {box_head.NAME!r}, "
            "which does not read it; use 'IDABoxHead'"
        )
    if not has_batchformer and box_head.BATCHFORMER != default.BATCHFORMER:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.BATCHFORMER is set, but its ENABLED is False; set it to True"
        )
    if has_ida:
        _check_kind_of_roi_heads(
            cfg,
            "MODEL.ROI_BOX_HEAD.NAME 'IDABoxHead'",
            StandardPluginROIHeads,
            CascadePluginROIHeads,
        )
    if has_batchformer:
        _check_kind_of_roi_heads(
            cfg,
            "MODEL.ROI_BOX_HEAD.BATCHFORMER",
            StandardPluginROIHeads,
            CascadePluginROIHeads,
            Res5PluginROIHeads,
        )


def _check_model(cfg: CfgNode) -> nn.Module:
    """Build the model once without memory, and raise its parts' errors in one line."""

    def build(device: str) -> nn.Module:
        on_device = cfg.clone()
        on_device.defrost()
        on_device.MODEL.DEVICE = device
        return build_model(on_device)

    model = build_once(build, lambda error: _explain(error, "MODEL"))
    _check_plugins_are_read(model, cfg.MODEL.RESNETS.PLUGINS, "MODEL.RESNETS.PLUGINS", "NAME")
    return model


def _explain(error: Exception, setting: str) -> ValueError:
    """Say in a line what building the model raised; errors of d2_plugins name their setting."""
    if isinstance(error, ArgumentError):
        return ValueError(f"{setting}: {error}")
    if isinstance(error, ValueError) and "d2_plugins" in origin(error):
        return ValueError(" ".join(str(error).split()))
    return ValueError(in_a_line(error, setting))


def _check_plugins_are_read(model: nn.Module, plugins: Any, setting: str, key: str) -> None:
    built = {m.plugin_name for m in model.modules() if isinstance(m, BlockPlugin)}
    for i, plugin in enumerate(plugins):
        if plugin[key] not in built:
            raise ValueError(
                f"{setting}[{i}]: {plugin[key]!r} is in no block of the model; name stages in it, "
                "and take a backbone that reads the list, such as build_resnet_plugin_fpn_backbone"
            )


def _check_kind_of_roi_heads(cfg: CfgNode, setting: str, *kinds: type) -> None:
    """Check that the config's RoI heads exist and read a setting."""
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture in _WITHOUT_ROI_HEADS:
        article = "an" if architecture[0] in "AEIOU" else "a"
        raise ValueError(
            f"{setting}: {article} {architecture} has no RoI heads, which read it; it takes "
            "block plugins, MODEL.RESNETS.PLUGINS"
        )
    name = cfg.MODEL.ROI_HEADS.NAME
    if name not in ROI_HEADS_REGISTRY:
        return
    kind = ROI_HEADS_REGISTRY.get(name)
    if not issubclass(kind, kinds) and not _is_users_own(kind):
        wanted = name.replace("ROIHeads", "PluginROIHeads")
        if wanted not in [kind.__name__ for kind in kinds]:
            wanted = StandardPluginROIHeads.__name__
        raise ValueError(f"MODEL.ROI_HEADS.NAME: {name!r} takes no {setting}; use {wanted!r}")


def _is_users_own(kind: Any) -> bool:
    """Tell whether a registered class is the user's own, which may read any setting."""
    return not kind.__module__.startswith(("detectron2.", "d2_plugins."))


def _has_resnet(cfg: CfgNode) -> bool:
    named = cfg.MODEL.BACKBONE.NAME in {*_WITH_PLUGINS, *_WITH_PLUGINS.values()}
    return named and not is_bridge(cfg)


def _check_datasets(setting: str, names: tuple[str, ...], train: bool = False) -> None:
    for name in names:
        if name not in DatasetCatalog:
            hint = did_you_mean(name, DatasetCatalog.list())
            raise ValueError(
                f"{setting}: no dataset is registered as {name!r}{hint}. A COCO-format dataset is "
                f"registered by --register-coco {name} ANNOTATIONS.json IMAGES"
            )
        metadata = MetadataCatalog.get(name)
        kind = metadata.get("evaluator_type")
        if kind in _PACKAGES and not (train and kind == "coco_panoptic_seg"):
            package, install = _PACKAGES[kind]
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{setting} {name!r}: it needs the package {package}: {install}")
        json_file = metadata.get("json_file")
        where = describe(setting, name)
        if json_file and not os.path.isfile(json_file):
            raise ValueError(f"{where}: there is no annotation file {json_file!r}")
        for file in (json_file if kind == "lvis" else None, metadata.get("panoptic_json")):
            try:
                if file:
                    check_whole(file)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        for key, what in _FOLDERS.items():
            folder = metadata.get(key)
            if folder and not os.path.isdir(folder):
                raise ValueError(f"{where}: there is no {what} folder {folder!r}")
        if not train:
            try:
                check_evaluator(name)
            except ValueError as error:
                raise ValueError(f"{setting}: {error}") from error


def _check_weights(cfg: CfgNode, eval_only: bool, model: nn.Module) -> None:
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # the loader's options follow
    if not weights and eval_only:
        raise ValueError("MODEL.WEIGHTS: --eval-only needs the checkpoint that is to be evaluated")
    if not weights or "://" in weights:
        return  # random weights, or a download: Detectron2 reports its errors
    if _has_resnet(cfg):
        check_resnet_checkpoint(
            weights, cfg.MODEL.RESNETS.DEPTH, "MODEL.WEIGHTS", "MODEL.RESNETS.DEPTH"
        )
    elif not os.path.isfile(weights):
        raise ValueError(f"MODEL.WEIGHTS: there is no checkpoint {weights!r}")
    if _has_resnet(cfg):
        _check_spelling(weights, "MODEL.WEIGHTS", model)
    check_weights(model, weights, "MODEL.WEIGHTS", whole=eval_only)


def _check_spelling(weights: str, setting: str, model: nn.Module) -> None:
    """Check that Detectron2 will find the tensors in a file by their names.

    In a file with matching_heuristics, Detectron2 matches names by their ends. It does so before
    a block plugin can rename its other spellings.
    """
    command = f"tools/convert_checkpoint.py {weights} converted.pth --to d2"
    check_resnet_names(weights, "res", setting, command)
    with open(weights, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"matching_heuristics") < 0:
            return
        for name, module in model.named_modules():
            child = name.rpartition(".")[2]
            is_cold = isinstance(module, BlockPlugin) and module.alpha is None
            if is_cold and data.find(f".{child}.alpha".encode()) >= 0:
                raise ValueError(
                    f"{setting}: {weights!r} has a {child} that was trained with a warm start (its "
                    "alpha); the config's needs WARM_START True"
                )
        for name, kind in registered_block_plugins().items():
            for published in getattr(kind, "published_names", ()):
                if data.find(f".{name}.{published}".encode()) >= 0:
                    raise ValueError(
                        f"{setting}: {weights!r} spells its {name} {published.rstrip('.')}…, which "
                        "Detectron2 does not find in a file with matching_heuristics; convert it: "
                        f"{command}"
                    )
