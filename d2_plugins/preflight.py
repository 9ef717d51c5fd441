"""Checks of a config and of the files that it names, before a run writes anything."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from torch import nn

from d2_plugins.attention_mask_consistency import is_amc
from d2_plugins.checkpointer import check_weights, find_resumable
from d2_plugins.config import add_plugin_config, load_lazy_config, merge_config
from d2_plugins.datasets import prepare
from d2_plugins.lazy_preflight import build_lazily, lazy_reads
from d2_plugins.mmdet_bridge import check_detector, is_bridge
from d2_plugins.model_checks import (
    check_plugins_are_read,
    check_spelling,
    explain,
    known_classes,
    number_of_classes,
)
from d2_plugins.registered_datasets import check_datasets
from d2_plugins.roi_heads import (
    CascadePluginROIHeads,
    Res5PluginROIHeads,
    StandardPluginROIHeads,
)
from d2_plugins.training_settings import check_settings, try_builders
from plugin_core.checkpoints.resnet_names import (
    RESNET_DEPTHS,
    check_resnet_checkpoint,
)
from plugin_core.datasets.check import Reads, Use
from plugin_core.errors import did_you_mean
from plugin_core.inspection.building import build_once
from plugin_core.training.checkpoint_files import check_readable

# Detectron2's builders of ResNets, and the same with plugins
WITH_PLUGINS = {
    "build_resnet_backbone": "build_resnet_plugin_backbone",
    "build_resnet_fpn_backbone": "build_resnet_plugin_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_plugin_fpn_backbone",
}
# Detectron2's meta-architectures that build no RoI heads
_WITHOUT_ROI_HEADS = ("RetinaNet", "AMCRetinaNet", "ProposalNetwork", "SemanticSegmentor")


def check_config(cfg: CfgNode, *, eval_only: bool, resume: bool) -> nn.Module:
    """Find mistakes in a config before the run.

    Args:
        cfg: the whole config.
        eval_only: whether only the test sets and the weights will be used.
        resume: whether weights come from ``cfg.OUTPUT_DIR`` where it has a checkpoint.

    Returns:
        The model, built once, without memory for its parameters where that is possible.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    _check_meta_architecture(cfg)
    if not is_bridge(cfg):
        _check_backbone(cfg)
        _check_roi_heads(cfg)
    check_settings(cfg, eval_only=eval_only)
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    if not eval_only:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN: names no dataset to train on")
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN, train=True)
    resumed = (find_resumable(cfg.OUTPUT_DIR) if resume else None) or ""
    if is_bridge(cfg):
        model = check_detector(cfg, eval_only=eval_only, resumed=bool(resumed))
    else:
        model = _check_model(cfg)
    if not resumed:
        _check_weights(cfg, eval_only, model)
    _check_data(cfg, model, eval_only=eval_only, resumed=resumed)
    try_builders(cfg, model, eval_only=eval_only)
    return model


def reads_of(config: str) -> Reads:
    """Tell what a config of either kind reads of its training data; raises ValueError."""
    if config.endswith(".py"):
        lazy = load_lazy_config(config, [])
        return lazy_reads(lazy, build_lazily(lazy))
    cfg = _default_config()
    merge_config(cfg, config, ["MODEL.DEVICE", "cpu"])
    return _reads(cfg, None if is_bridge(cfg) else _check_model(cfg))


def _reads(cfg: CfgNode, model: nn.Module | None) -> Reads:
    number = None if is_bridge(cfg) else number_of_classes(model)
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
        known_classes(resumed, cfg.MODEL.WEIGHTS if eval_only else "", cfg.DATASETS.TRAIN),
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
    if cfg.MODEL.RESNETS.PLUGINS and name in WITH_PLUGINS:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: {name!r} takes no plugins, but MODEL.RESNETS.PLUGINS is "
            f"{cfg.MODEL.RESNETS.PLUGINS}; use {WITH_PLUGINS[name]!r}"
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

    model = build_once(build, lambda error: explain(error, "MODEL"))
    check_plugins_are_read(model, cfg.MODEL.RESNETS.PLUGINS, "MODEL.RESNETS.PLUGINS", "NAME")
    return model


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
    named = cfg.MODEL.BACKBONE.NAME in {*WITH_PLUGINS, *WITH_PLUGINS.values()}
    return named and not is_bridge(cfg)


def _check_weights(cfg: CfgNode, eval_only: bool, model: nn.Module) -> None:
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # the loader's options follow
    if not weights and eval_only:
        raise ValueError("MODEL.WEIGHTS: --eval-only needs the checkpoint that is to be evaluated")
    if not weights or "://" in weights:
        return  # random weights, or a download: Detectron2 reports its errors
    check_readable(weights, "MODEL.WEIGHTS")
    if _has_resnet(cfg):
        check_resnet_checkpoint(
            weights, cfg.MODEL.RESNETS.DEPTH, "MODEL.WEIGHTS", "MODEL.RESNETS.DEPTH"
        )
        check_spelling(weights, "MODEL.WEIGHTS", model)
    check_weights(model, weights, "MODEL.WEIGHTS", whole=eval_only)
