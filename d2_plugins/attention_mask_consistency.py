"""Attention mask consistency (AMC) as an auxiliary loss of Detectron2's own detectors.

The losses push the gradient heatmap of a class's best score in an image into the class's boxes
(``plugin_core/methods/attention_mask_consistency.py``)::

    MODEL:
      META_ARCHITECTURE: "AMCGeneralizedRCNN"  # or "AMCRetinaNet"
      AMC:
        EVERY: 4

Training has two more losses, ``loss_amc_mean`` and ``loss_amc_max``. Weights, their names and
evaluation are the plain detector's, so that each reads the other's checkpoints.

Gradients are differentiated through everything between the feature map and the best scores. The
regions of interest that have these are computed once more for it, alone; where a head mixes
regions, all are differentiated. RoIAlign has no second derivative: there, a pooler with second
derivatives replaces it. Deformable convolutions and SyncBN have none either, and must come before
the feature map. Norms of batch statistics after the feature map mix the images: a heatmap then also
shows a little of the other images' scores.
"""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlign
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.utils.events import get_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from d2_plugins.backbones import last_stage
from d2_plugins.config import naming
from d2_plugins.differentiable_regions import TwiceDifferentiablePooler, is_row_wise, region_logits
from plugin_core import AttentionMaskConsistency, GradientHeatmap
from plugin_core.errors import did_you_mean
from plugin_core.inspection.recorder import Call, record_calls
from plugin_core.methods.attention_mask_consistency import ScoredRegion
from plugin_core.stand_ins import acting_as


class _AMCDetector(nn.Module):
    """Adds AMC's losses to a detector.

    Modules are kept by their names: as attributes they would be registered once more, and the
    state dict would have their weights twice.
    """

    backbone: nn.Module
    device: torch.device

    @abstractmethod
    def _scored_modules(self) -> list[nn.Module]:
        """List the modules for :meth:`_scores`, which reads their calls."""

    @abstractmethod
    def _scores(self, labels: Sequence[Sequence[int]], calls: Sequence[Call]) -> list[list[Tensor]]:
        """Find the best scores of each image's classes by the calls; none if there are no logits.

        Gradients of the scores can be differentiated.
        """

    def _differentiable_twice(self) -> AbstractContextManager[None]:
        """Give the detector's modules second derivatives inside the context."""
        return nullcontext()

    def _set_up_amc(
        self, *, activation: str = "", levels: Sequence[str] = (), **settings: Any
    ) -> None:
        self.amc = amc_losses(**settings)
        self.amc_activation = activation or _last_stage(self.backbone)
        self.amc_levels = tuple(levels)
        self._amc_step = 0  # where there is no storage that counts
        modules = dict(self.named_modules())
        if self.amc_activation not in modules:
            hint = did_you_mean(self.amc_activation, modules)
            raise ValueError(
                f"MODEL.AMC.ACTIVATION: the detector has no module {self.amc_activation!r}{hint}"
            )
        module = modules[self.amc_activation]
        if isinstance(module, Backbone):
            self._check_levels(tuple(module.output_shape()))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Run the plain detector; in training add AMC's losses in the steps that take them."""
        if not (self.training and torch.is_grad_enabled() and self._is_due()):
            return super().forward(batched_inputs)
        activation = self.get_submodule(self.amc_activation)
        deformable = [m for m in self.backbone.modules() if isinstance(m, _DEFORMABLE)]
        handle = activation.register_forward_hook(_require_gradients)
        recorded = [self.backbone, activation, *deformable, *self._scored_modules()]
        try:
            with record_calls(recorded) as calls, self._differentiable_twice():
                losses = super().forward(batched_inputs)
        finally:
            handle.remove()
        return {**losses, **self._amc_losses(batched_inputs, calls)}

    def _is_due(self) -> bool:
        try:
            step = get_event_storage().iter
        except AssertionError:  # there is none
            step = self._amc_step
            self._amc_step += 1
        return step % self.amc.every == 0

    def _amc_losses(
        self, batched_inputs: list[dict[str, Any]], calls: Sequence[Call]
    ) -> dict[str, Tensor]:
        pixels = next(call.args[0] for call in calls if call.module is self.backbone)
        maps = self._activation_maps(calls, len(pixels))
        chosen = [
            self.amc.choose(annotated_classes(image, self.device, f"number {i} of the batch"))
            for i, image in enumerate(batched_inputs)
        ]
        scores = self._scores([[label for label, _ in of_image] for of_image in chosen], calls)
        images = [
            [ScoredRegion(score, boxes) for score, (_, boxes) in zip(found, of_image, strict=False)]
            for found, of_image in zip(scores, chosen, strict=True)
        ]
        heatmap = GradientHeatmap()
        try:
            losses = self.amc(images, lambda score: heatmap(score, maps), tuple(pixels.shape[2:]))
        except ValueError as error:
            raise self._wrong_activation(str(error)) from error
        return {name: loss.to(self.device) for name, loss in losses.items()}

    def _activation_maps(self, calls: Sequence[Call], batch_size: int) -> list[Tensor]:
        """Find the feature maps whose heat counts, each of all images."""
        activation = self.get_submodule(self.amc_activation)
        places = [i for i, call in enumerate(calls) if call.module is activation]
        if not places:
            raise self._wrong_activation("it is not called in training")
        names = {module: name for name, module in self.named_modules()}
        for call in calls[places[0] :]:
            if isinstance(call.module, _DEFORMABLE):
                raise self._wrong_activation(
                    f"{names[call.module]} comes after it, a deformable convolution, which cannot "
                    f"be differentiated twice; use {_last_stage(self.backbone)!r}"
                )
        maps = []
        for output in (calls[i].output for i in places):
            if isinstance(output, Mapping):
                self._check_levels(tuple(output))
                maps += [output[name] for name in self.amc_levels or output]
            else:
                self._check_levels(())
                maps.append(output)
        for x in maps:
            if not isinstance(x, Tensor) or x.dim() != 4 or len(x) != batch_size:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise self._wrong_activation(
                    f"it puts out {got}, expected a feature map of shape ({batch_size}, C, H, W), "
                    "or a dict of these"
                )
        return maps

    def _check_levels(self, known: tuple[str, ...]) -> None:
        unknown = [name for name in self.amc_levels if name not in known]
        if unknown:
            raise ValueError(
                f"MODEL.AMC.LEVELS: {unknown[0]!r} is no feature map of {self.amc_activation!r}, "
                f"which has {', '.join(known) or 'only one, without a name'}"
            )

    def _wrong_activation(self, reason: str) -> ValueError:
        return ValueError(f"MODEL.AMC.ACTIVATION {self.amc_activation!r}: {reason}")


@META_ARCH_REGISTRY.register()
class AMCGeneralizedRCNN(_AMCDetector, GeneralizedRCNN):
    """``GeneralizedRCNN`` that trains with AMC too: Faster, Mask, Keypoint and Cascade R-CNN.

    A class's score in an image is its greatest logit in a region of interest. In a cascade the last
    box predictor gives the logits.

    Args:
        amc: settings of ``MODEL.AMC`` in lower case; see ``d2_plugins/config.py``.
        detector: arguments of ``GeneralizedRCNN``.

    Raises:
        ValueError: if a setting of AMC is wrong, or the RoI heads do not pool boxes by RoIAlign.
    """

    roi_heads: nn.Module

    @configurable
    def __init__(self, *, amc: Mapping[str, Any] | None = None, **detector: Any) -> None:
        super().__init__(**detector)
        self._set_up_amc(**(amc or {}))
        pooler, predictor = self._scored_modules()
        levels = list(getattr(pooler, "level_poolers", ()))
        is_known = isinstance(pooler, ROIPooler) and type(pooler).forward is ROIPooler.forward
        if not is_known or not all(isinstance(level, ROIAlign) for level in levels):
            kind = type(levels[0]).__name__ if levels else type(pooler).__name__
            raise ValueError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE: AMC differentiates twice through RoIAlign, not "
                f"through {kind}; use 'ROIAlignV2'"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "amc": amc_arguments(cfg)}

    def _scored_modules(self) -> list[nn.Module]:
        heads = self.roi_heads
        pooler = getattr(heads, "box_pooler", getattr(heads, "pooler", None))  # a C4 has "pooler"
        predictor = getattr(heads, "box_predictor", None)
        if isinstance(predictor, nn.ModuleList):  # of a cascade
            predictor = predictor[-1]
        if not isinstance(pooler, nn.Module) or not isinstance(predictor, nn.Module):
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME: {type(heads).__name__} has no box_pooler or no "
                "box_predictor, which AMC reads"
            )
        return [pooler, predictor]

    def _scores(self, labels: Sequence[Sequence[int]], calls: Sequence[Call]) -> list[list[Tensor]]:
        pooler, predictor = self._scored_modules()
        maps, boxes = [call.args for call in calls if call.module is pooler][-1]
        call = [call for call in calls if call.module is predictor][-1]
        counts = [len(of_image) for of_image in boxes]
        # Without the logits of a BatchFormer's second stream
        logits = call.output[0][: sum(counts)].split(counts)
        best = [
            x.detach()[:, of_image].argmax(0).tolist() if len(x) else []
            for x, of_image in zip(logits, labels, strict=True)
        ]
        if any(best) and self._is_row_wise:
            regions = [x[rows] for x, rows in zip(boxes, best, strict=True)]
            with self._pooling_twice():
                again = region_logits(self.roi_heads, maps, regions)
            logits = again.split([len(rows) for rows in best])
            best = [list(range(len(rows))) for rows in best]
        return [
            [x[row, label] for row, label in zip(rows, of_image, strict=bool(rows))]
            for x, rows, of_image in zip(logits, best, labels, strict=True)
        ]

    @property
    def _is_row_wise(self) -> bool:
        return is_row_wise(self.roi_heads)

    def _differentiable_twice(self) -> AbstractContextManager[None]:
        return nullcontext() if self._is_row_wise else self._pooling_twice()

    def _pooling_twice(self) -> AbstractContextManager[None]:
        return acting_as(TwiceDifferentiablePooler, self._scored_modules()[0])


@META_ARCH_REGISTRY.register()
class AMCRetinaNet(_AMCDetector, RetinaNet):
    """``RetinaNet`` that trains with AMC too.

    A class's score in an image is its greatest logit of all levels, positions and anchors.

    Args:
        amc: settings of ``MODEL.AMC`` in lower case; see ``d2_plugins/config.py``.
        detector: arguments of ``RetinaNet``.

    Raises:
        ValueError: if a setting of AMC is wrong.
    """

    head: nn.Module
    num_classes: int

    @configurable
    def __init__(self, *, amc: Mapping[str, Any] | None = None, **detector: Any) -> None:
        super().__init__(**detector)
        self._set_up_amc(**(amc or {}))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "amc": amc_arguments(cfg)}

    def _scored_modules(self) -> list[nn.Module]:
        return [self.head]

    def _scores(self, labels: Sequence[Sequence[int]], calls: Sequence[Call]) -> list[list[Tensor]]:
        call = next(call for call in calls if call.module is self.head)
        levels = [level.unflatten(1, (-1, self.num_classes)) for level in call.output[0]]
        head: Any = self.head
        reach = None if self.amc_activation.startswith("head.") else _reach(head)

        def score(image: int, label: int) -> Tensor:
            of_class = [level[image, :, label] for level in levels]  # (anchors, H, W)
            best = int(torch.stack([x.detach().amax() for x in of_class]).argmax())
            if reach is None:
                return of_class[best].amax()
            height, width = of_class[best].shape[1:]
            anchor, cell = divmod(int(of_class[best].detach().argmax()), height * width)
            y, x = divmod(cell, width)
            top, left = max(y - reach, 0), max(x - reach, 0)
            maps = call.args[0][best][image, None]
            seen = maps[:, :, top : y + reach + 1, left : x + reach + 1]
            logits = head.cls_score(head.cls_subnet(seen))
            return logits[0, anchor * self.num_classes + label, y - top, x - left]

        return [[score(i, label) for label in of_image] for i, of_image in enumerate(labels)]


def amc_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Read ``MODEL.AMC`` as arguments of the detectors."""
    node: Any = cfg.MODEL.AMC
    return {key.lower(): value for key, value in node.items()}


def is_amc(cfg: CfgNode) -> bool:
    """Tell whether a config's meta-architecture reads ``MODEL.AMC``."""
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return inspect.isclass(kind) and issubclass(kind, _AMCDetector)


def amc_losses(*, classes: int = 1, **settings: Any) -> AttentionMaskConsistency:
    """Make the losses from a detector's settings.

    Args:
        classes: number of an image's classes to take, at random; 0 for all.
        settings: the other arguments of :class:`plugin_core.AttentionMaskConsistency`.

    Raises:
        ValueError: if a setting is out of range; it names the setting.
    """
    if type(classes) is not int or classes < 0:
        raise ValueError(
            f"MODEL.AMC.CLASSES: must be how many classes of an image, 0 for all, got {classes!r}"
        )
    with naming("MODEL.AMC"):
        return AttentionMaskConsistency(phrases=classes or None, **settings)


def annotated_classes(
    image: Mapping[str, Any], device: torch.device, otherwise: str
) -> list[tuple[int, Tensor]]:
    """Find the classes that an image is annotated with, and their boxes (N, 4).

    Boxes outside of the image are left out, and so is a class without other boxes. The first such
    box is warned of.

    Args:
        image: with "instances", as the detector takes it.
        device: of the boxes.
        otherwise: name of an image without "file_name".
    """
    instances = image["instances"]
    boxes = instances.gt_boxes.tensor
    height, width = instances.image_size
    inside = torch.stack(
        [side.clamp(0, size) for side, size in zip(boxes.T, (width, height) * 2, strict=True)], 1
    )
    visible = (inside[:, 2:] > inside[:, :2]).all(1)
    if not visible.all():
        log_first_n(
            logging.WARNING,
            f"AMC leaves out boxes that have no part in their image, such as "
            f"{boxes[~visible][0].tolist()} in {image.get('file_name', otherwise)} "
            f"({width}x{height} pixels)",
        )
    return [
        (label, inside[visible & (instances.gt_classes == label)].to(device))
        for label in instances.gt_classes[visible].unique().tolist()
    ]


def _reach(head: Any) -> int | None:
    """How many cells around a position its class logits depend on, None for all that there are."""
    layers = [*head.cls_subnet, head.cls_score]
    convs = [layer for layer in layers if type(layer) is nn.Conv2d]
    is_known = type(head) is RetinaNetHead and all(
        type(layer) is nn.ReLU or layer in convs for layer in layers
    )
    return len(convs) if is_known else None  # all are of 3x3


_DEFORMABLE = (DeformConv, ModulatedDeformConv)


def _last_stage(backbone: nn.Module) -> str:
    try:
        return last_stage(backbone)
    except ValueError as error:
        raise ValueError(
            f"MODEL.AMC.ACTIVATION: names no module, and {error}; set the name of a module"
        ) from error


def _require_gradients(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    """Let the output of frozen layers have gradients."""
    for x in output.values() if isinstance(output, Mapping) else [output]:
        if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad:
            x.requires_grad_()
