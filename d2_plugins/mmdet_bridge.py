"""MMDetection's detectors under Detectron2's trainer and evaluators.

    MODEL:
      META_ARCHITECTURE: "MMDetDetector"
      MMDET:
        CONFIG: "mmdet::detr/detr_r50_8xb2-150e_coco.py"    # or the path of a file
        OVERRIDES: ["model.bbox_head.num_classes=20"]

Detectron2 reads and augments the images, optimizes, saves and evaluates. The detector normalizes
pixels and computes losses and detections. Only ``model`` is read from MMDetection's config. Its
data, optimizer, schedule and hooks take no part. A detector gets

- the number of the iteration, but no epoch: TOOD evaluates and does not train;
- a semantic map only if the detector is panoptic: HTC and SCNet with a semantic branch evaluate and
  do not train;
- no text: Grounding DINO and GLIP neither train nor evaluate.

Only this module of the package may import MMDetection, and only inside functions.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from plugin_core.inspection.cost import Report

_VOID = 255  # in semantic maps of both frameworks


@META_ARCH_REGISTRY.register()
class MMDetDetector(nn.Module):
    """A detector of MMDetection with the inputs and outputs of Detectron2's models.

    State dicts have the detector's own names. MMDetection's checkpoints are read as they are
    (:class:`d2_plugins.checkpointer.PluginCheckpointer`). Detectron2 writes the same tensors under
    "model"; MMDetection looks for them under "state_dict".

    Args:
        detector: of MMDetection, with its data preprocessor. From a config,
            :func:`build_detector` makes it by ``MODEL.MMDET``. Without ``MODEL.WEIGHTS`` it starts
            as in MMDetection, its backbone pretrained where its config says so.
        input_format: order of the images' channels, "BGR" or "RGB". The pixel settings of the
            detector's config hold for images in BGR. ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD`` are
            not read.

    Raises:
        ValueError: if ``input_format`` is neither.
    """

    @configurable
    def __init__(self, *, detector: nn.Module, input_format: str = "BGR") -> None:
        super().__init__()
        if input_format not in ("BGR", "RGB"):
            raise ValueError(
                f"INPUT.FORMAT: expected 'BGR' or 'RGB' for a detector of MMDetection, "
                f"got {input_format!r}"
            )
        self.detector: Any = detector
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node: Any = cfg.MODEL.MMDET
        config = load_config(node.CONFIG, node.OVERRIDES)
        detector = build_detector(config, pretrained=not cfg.MODEL.WEIGHTS)
        return {"detector": detector, "input_format": cfg.INPUT.FORMAT}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def __getattr__(self, name: str) -> Any:
        # Modules and parameters are found by their names in the state dict.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "detector":
                raise
            return getattr(self.detector, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.detector.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.detector.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A parent, such as DDP or an average of weights, saves by the state_dict above, but does
        # not load by the load_state_dict above.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}detector.{name[len(prefix) :]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Compute the losses or detections of a batch.

        Args:
            batched_inputs: of ``DatasetMapper``: "image" (C, H, W), 0 … 255, and, where the image
                was resized, "height" and "width" of its file in pixels. For training "instances"
                with ``gt_boxes``, ``gt_classes`` and, if the detector learns masks, ``gt_masks``.
                For training a panoptic detector also "sem_seg" (H, W) of Detectron2's separated
                panoptic datasets: 0 for all things, then the stuff classes from 1 on, 255 for none.

        Returns:
            In training the losses by name, whose sum is MMDetection's loss. MMDetection's other
            reports go to Detectron2's event storage, which must exist. Otherwise a dict for each
            image: "instances", on the image of the file, and from a panoptic detector
            "panoptic_seg" in the form of ``PanopticFPN``.

        Raises:
            ValueError: if "sem_seg" is missing where a panoptic detector trains.
        """
        from mmengine.logging import MessageHub

        if self.training:
            MessageHub.get_current_instance().update_info("iter", get_event_storage().iter)
        preprocessor = self.detector.data_preprocessor
        # nn.Module.to does not tell it the device. The `to` of MMDetection's models does.
        preprocessor.to(self.device)
        packed = [self._pack(one) for one in batched_inputs]
        data = preprocessor(
            {"inputs": [image for image, _ in packed], "data_samples": [s for _, s in packed]},
            self.training,
        )
        if not self.training:
            return [self._unpack(sample) for sample in self.detector(**data, mode="predict")]
        losses = self.detector(**data, mode="loss")
        _, values = self.detector.parse_losses(losses)
        for name in losses:
            if "loss" not in name:  # MMDetection tells losses from reports by this
                get_event_storage().put_scalar(name, float(values[name]))
        return {name: values[name] for name in losses if "loss" in name}

    def _pack(self, one: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Give MMDetection an image in BGR, and all that Detectron2 knows of it."""
        from mmdet.structures import DetDataSample
        from mmengine.structures import PixelData

        image = one["image"]
        height, width = image.shape[-2:]
        ori_shape = (one.get("height", height), one.get("width", width))
        sample = DetDataSample(
            metainfo={
                "img_id": one.get("image_id", 0),
                "img_path": one.get("file_name"),
                "ori_shape": ori_shape,
                "img_shape": (height, width),
                "scale_factor": (width / ori_shape[1], height / ori_shape[0]),
                "flip": False,
                "flip_direction": None,
            }
        )
        if self.training:
            sample.gt_instances = _pack_instances(one["instances"])
            if getattr(self.detector, "num_stuff_classes", 0):
                sample.gt_sem_seg = PixelData(sem_seg=self._pack_semantic(one)[None])
        return image.flip(0) if self.input_format == "RGB" else image, sample

    def _pack_semantic(self, one: Mapping[str, Any]) -> Tensor:
        """Number the classes of "sem_seg" (H, W) as MMDetection does: things, then stuff."""
        if "sem_seg" not in one:
            raise ValueError(
                f"image {one.get('file_name')!r} has no 'sem_seg', and the detector learns "
                f"{self.detector.num_stuff_classes} stuff classes; train on a dataset as "
                "register_coco_panoptic_separated registers it"
            )
        semantic = one["sem_seg"]
        fixed = (semantic == 0) | (semantic == _VOID)  # 0 is a thing's class in MMDetection as well
        return torch.where(fixed, semantic, semantic + self.detector.num_things_classes - 1)

    def _unpack(self, sample: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        if "pred_instances" in sample:
            found = sample.pred_instances
            boxes = Boxes(found.bboxes)
            boxes.clip(sample.ori_shape)
            masks = {"pred_masks": found.masks} if "masks" in found else {}
            outputs["instances"] = Instances(
                sample.ori_shape,
                pred_boxes=boxes,
                scores=found.scores,
                pred_classes=found.labels,
                **masks,
            )
        if "pred_panoptic_seg" in sample:
            outputs["panoptic_seg"] = self._unpack_panoptic(sample.pred_panoptic_seg.sem_seg[0])
        return outputs

    def _unpack_panoptic(self, labels: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Turn a map (H, W) of class + instance · INSTANCE_OFFSET into Detectron2's segments."""
        from mmdet.evaluation.functional import INSTANCE_OFFSET

        num_things = self.detector.num_things_classes
        num_classes = num_things + self.detector.num_stuff_classes
        segments = torch.zeros_like(labels, dtype=torch.int32)
        infos: list[dict[str, Any]] = []
        for label in labels.unique().tolist():
            category = label % INSTANCE_OFFSET
            if category >= num_classes:
                continue  # a pixel of no segment is 0
            mask, isthing = labels == label, category < num_things
            segments[mask] = len(infos) + 1
            infos.append(
                {
                    "id": len(infos) + 1,
                    "isthing": isthing,
                    # Stuff classes are counted from 1 on, as in "sem_seg".
                    "category_id": category if isthing else category - num_things + 1,
                    "area": int(mask.sum()),
                }
            )
        return segments, infos


def is_bridge(cfg: CfgNode) -> bool:
    """Tell whether a config's meta-architecture is :class:`MMDetDetector` or a subclass."""
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return inspect.isclass(kind) and issubclass(kind, MMDetDetector)


def load_config(config: str, overrides: Sequence[str] = ()) -> Any:
    """Read a config of MMDetection.

    Args:
        config: ``mmdet::`` and the name of one of MMDetection's own, or a path.
        overrides: each as "model.bbox_head.num_classes=20", in the syntax of ``--cfg-options`` of
            MMDetection's scripts.

    Returns:
        mmengine's ``Config``.

    Raises:
        ImportError: if MMDetection is not installed, with what to install.
        ValueError: if the config cannot be read or has no model, or an override is wrong.
    """
    import mm_plugins.analysis  # registers the plugins too

    setting = f"MODEL.MMDET.CONFIG {config!r}"
    if not config:
        raise ValueError(
            "MODEL.MMDET.CONFIG: names no config; expected a path, or one of MMDetection's own, "
            "such as 'mmdet::detr/detr_r50_8xb2-150e_coco.py'"
        )
    try:
        cfg = mm_plugins.analysis.load_config(config)
    except Exception as error:  # of mmengine's reader, or of the config's own code
        raise ValueError(f"{setting}: {_in_a_line(error)}") from error
    for override in overrides:
        _override(cfg, override)
    return cfg


def build_detector(config: Any, *, pretrained: bool) -> nn.Module:
    """Build and initialize a detector of MMDetection.

    Args:
        config: mmengine's; only ``model`` and ``default_scope`` are read.
        pretrained: load the weights that ``init_cfg``s name; otherwise leave them random.

    Raises:
        ValueError: if the config's model cannot be built.
    """
    model_config = copy.deepcopy(config.model)
    if not pretrained:
        _leave_random(model_config)
    detector: Any = _build(model_config, config.get("default_scope") or "mmdet")
    with _without_reports():
        detector.init_weights()
    return detector


def check_detector(cfg: CfgNode, *, eval_only: bool, resumed: bool) -> nn.Module:
    """Find mistakes in a config for :class:`MMDetDetector` before training or evaluation.

    Args:
        cfg: the whole config.
        eval_only: whether the detector is not trained.
        resumed: whether ``MODEL.WEIGHTS`` is not read.

    Returns:
        The model, built once, without memory for its parameters where that is possible.

    Raises:
        ValueError: names the setting, its value and the right ones.
    """
    try:
        from mm_plugins.preflight import check_config, check_weights
    except ImportError as error:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE: {cfg.MODEL.META_ARCHITECTURE!r}: {error}"
        ) from error
    from mmengine.config import Config

    node: Any = cfg.MODEL.MMDET
    config = load_config(node.CONFIG, node.OVERRIDES)
    weights = "" if resumed else cfg.MODEL.WEIGHTS.partition("?")[0]
    if weights.startswith(("detectron2://", "catalog://")):
        raise ValueError(
            f"MODEL.WEIGHTS: {weights!r} has Detectron2's names, of which a detector of "
            'MMDetection would load none; set MODEL.WEIGHTS to "", to start from the backbone that '
            "the detector's config names, or to a checkpoint of the detector"
        )
    if "language_model" in config.model:
        raise ValueError(
            f"MODEL.MMDET.CONFIG: the detector of {node.CONFIG!r} reads texts, as Grounding DINO "
            "and GLIP do, and Detectron2's data has none; use tools/train_mmdet.py"
        )
    scope = config.get("default_scope") or "mmdet"
    # MMDetection's checks run without data. The weights are checked below.
    alone = {"model": config.model, "default_scope": scope, "load_from": cfg.MODEL.WEIGHTS}
    try:
        detector: Any = check_config(Config(alone), train=False, resumes=True)
    except ValueError as error:
        raise ValueError(f"MODEL.MMDET.CONFIG/OVERRIDES: {error}") from error
    if weights:
        check_weights(config.model, weights, "MODEL.WEIGHTS")
    bridge = MMDetDetector(detector=detector, input_format=cfg.INPUT.FORMAT)
    if not eval_only:
        _check_training(detector, cfg)
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED: Detectron2 has test-time augmentation for its own R-CNNs only; set "
            "it to False"
        )
    for setting in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[setting]:
            _check_classes(detector, node.CONFIG, f"DATASETS.{setting}", name)
    return bridge


def _check_training(detector: Any, cfg: CfgNode) -> None:
    """Check that Detectron2 can give the detector everything that its losses need."""
    config = cfg.MODEL.MMDET.CONFIG
    learns_masks = (
        getattr(detector, "with_mask", False)
        or getattr(detector.data_preprocessor, "pad_mask", False)
        or any(hasattr(module, "loss_mask") for module in detector.modules())
    )
    if learns_masks and not cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MASK_ON: False, but the detector of {config!r} learns masks; set it to True"
        )
    has_semantic_branch = getattr(getattr(detector, "roi_head", None), "with_semantic", False)
    if has_semantic_branch and not getattr(detector, "num_stuff_classes", 0):
        raise ValueError(
            f"MODEL.MMDET.CONFIG: the RoI head of {config!r} learns a semantic map, which only "
            "panoptic detectors are given here; use one without a semantic branch, such as "
            "'mmdet::htc/htc-without-semantic_r50_fpn_1x_coco.py', or tools/train_mmdet.py"
        )
    if any(hasattr(module, "initial_epoch") for module in detector.modules()):
        raise ValueError(
            f"MODEL.MMDET.CONFIG: the detector of {config!r} trains by the number of the epoch, as "
            "TOOD does, and Detectron2 counts none; use tools/train_mmdet.py"
        )


def count_cost(cfg: CfgNode, image_size: tuple[int, int], *, activations: bool) -> Report:
    """Count the cost of a config's detector by :func:`mm_plugins.analysis.analyze`."""
    from mm_plugins.analysis import analyze

    node: Any = cfg.MODEL.MMDET
    config = load_config(node.CONFIG, node.OVERRIDES)
    return analyze(config, image_size, activations=activations)


def find_detector_mismatches(cfg: CfgNode) -> list[str]:
    """List the pixel settings that disagree with the weights, by :mod:`mm_plugins.pixels`."""
    from mm_plugins.pixels import find_mismatches

    node: Any = cfg.MODEL.MMDET
    config = load_config(node.CONFIG, node.OVERRIDES)
    config.load_from = cfg.MODEL.WEIGHTS or None
    return find_mismatches(config)


def _override(config: Any, override: str) -> None:
    from mmengine.config import DictAction

    setting = f"MODEL.MMDET.OVERRIDES: {override!r}"
    if not isinstance(override, str) or not override.startswith("model.") or "=" not in override:
        raise ValueError(
            f"{setting} is no override such as 'model.bbox_head.num_classes=20'; of the config "
            "nothing but its model is read"
        )
    parsed = SimpleNamespace()
    try:
        DictAction((), dest="options")(None, parsed, [override])
        config.merge_from_dict(parsed.options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{setting}: {_in_a_line(error)}") from error


def _pack_instances(instances: Instances) -> Any:
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    packed = InstanceData(bboxes=instances.gt_boxes.tensor, labels=instances.gt_classes)
    if instances.has("gt_masks"):
        height, width = instances.image_size
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width)
        # MMDetection's bitmaps are arrays, on every device.
        bitmaps = masks.tensor.cpu().numpy().astype("uint8")
        packed.masks = BitmapMasks(bitmaps, height, width)
    elif not len(instances):
        # MMDetection reads masks of every image, also of one without annotations.
        packed.masks = BitmapMasks([], *instances.image_size)
    return packed


def _build(model_config: Any, scope: str) -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import init_default_scope

    register_all_modules(init_default_scope=False)
    init_default_scope(scope)  # for good, as mmengine's runner does: heads build parts later on
    try:
        return MODELS.build(model_config)
    except Exception as error:  # whatever the constructors raise
        raise ValueError(f"MODEL.MMDET: no detector can be built: {_in_a_line(error)}") from error


def _leave_random(node: Any) -> None:
    """Take pretrained weights out of a model's config, as a checkpoint will overwrite them."""
    from mm_plugins.init_cfgs import pretrained

    if isinstance(node, (list, tuple)):
        for part in node:
            _leave_random(part)
    if isinstance(node, dict):
        init_cfg = node.get("init_cfg")
        if loading := pretrained(init_cfg):
            parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
            node["init_cfg"] = [part for part in parts if part not in loading] or None
        for part in node.values():
            _leave_random(part)


@contextlib.contextmanager
def _without_reports() -> Iterator[None]:
    """Keep mmengine from printing a paragraph on how each parameter was initialized."""
    from mmengine.logging import MMLogger

    mm_logger = MMLogger.get_current_instance()
    level = mm_logger.level
    mm_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        mm_logger.setLevel(level)


def _check_classes(detector: nn.Module, config: str, setting: str, dataset: str) -> None:
    """Compare numbers of classes, where the dataset's metadata and the detector tell them."""
    from mm_plugins.datasets import number_of_classes

    metadata = MetadataCatalog.get(dataset)
    known = {"thing": number_of_classes(detector)}
    stuff = getattr(detector, "num_stuff_classes", 0)
    if stuff:
        known["stuff"] = stuff + 1  # Detectron2 counts all things as one of them
    for kind, number in known.items():
        names = metadata.get(f"{kind}_classes")
        if names is not None and number not in (None, len(names)):
            raise ValueError(
                f"{setting}: {dataset!r} has {len(names)} {kind} classes, but the detector of "
                f"{config!r} has {number}; set its number of classes by MODEL.MMDET.OVERRIDES, "
                "such as ['model.bbox_head.num_classes=20']"
            )


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
