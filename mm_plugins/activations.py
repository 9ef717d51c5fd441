"""Records an activation of a detector, so that scores can be differentiated with respect to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from torch import Tensor, nn

from mm_plugins.fusion import FusionAttention
from plugin_core import GradientHeatmap
from plugin_core.errors import ArgumentError
from plugin_core.inspection.recorder import record_calls
from plugin_core.stand_ins import acting_as

_ACTIVATION = "heatmap.activation"


class Activation:
    """An image–text cross-attention, or a feature map, of a detector.

    A fusion layer's activation is the attention of the text's tokens over the positions of all
    feature levels, as AMC has it.

    Args:
        detector: with a ``neck``, where the activation is an attention.
        name: of the module: a fusion layer or its attention, such as ``encoder.fusion_layers.5`` of
            Grounding DINO, or one that gives feature maps, such as ``backbone.layer4`` or
            ``neck``. None for the last fusion layer, or the last stage of the backbone where there
            is none.
        levels: which of the feature levels, from 0 on; None for all.

    Raises:
        ArgumentError: if there is no such module or level.
    """

    def __init__(
        self, detector: BaseDetector, name: str | None = None, levels: Sequence[int] | None = None
    ) -> None:
        self.detector = detector
        self.name = _last_fusion_layer(detector) if name is None else name
        modules = dict(detector.named_modules())
        if self.name not in modules or not self.name:
            likely = difflib.get_close_matches(self.name, modules, n=3, cutoff=0.4)
            raise ArgumentError(
                _ACTIVATION,
                f"must be a module of the detector, got {self.name!r}; similar names: "
                f"{', '.join(likely) or 'none'}",
            )
        attentions = [m for m in self.module.modules() if _is_fusion(m)]
        if len(attentions) > 1:
            raise ArgumentError(
                _ACTIVATION,
                f"must name one fusion layer, got {self.name!r} with {len(attentions)}",
            )
        self.attention = attentions[0] if attentions else None
        if levels is not None and (
            not isinstance(levels, Sequence)
            or isinstance(levels, str)
            or not levels
            or any(type(level) is not int or level < 0 for level in levels)
        ):
            raise ArgumentError(
                "heatmap.levels",
                "must be a tuple of feature levels such as (0, 1), or None for all, "
                f"got {levels!r}",
            )
        self.levels = levels

    @property
    def module(self) -> nn.Module:
        return self.detector.get_submodule(self.name)

    def check_checkpoints(self) -> None:
        """Refuse a backbone with activation checkpoints behind the activation.

        Raises:
            ArgumentError: names the setting.
        """
        if not self.name.startswith("backbone."):
            return
        modules = list(self.detector.named_modules())
        last = max(i for i, (n, _) in enumerate(modules) if f"{n}.".startswith(f"{self.name}."))
        for name, module in modules[last + 1 :]:
            if name.startswith("backbone.") and getattr(module, "with_cp", False):
                raise ArgumentError(
                    "backbone.with_cp",
                    f"must be False behind heatmap.activation {self.name!r}, got True; gradients "
                    "are taken there, which activation checkpoints do not allow",
                )

    @contextmanager
    def record(self, images: int) -> Iterator[Recorded]:
        """Record it in a forward pass of so many images inside the context."""
        recorded = Recorded(self, images)
        if self.attention is not None:
            noting: Any = nullcontext()
            if isinstance(self.attention, _NotingAttention):  # someone records it around this
                recorded.attentions = self.attention.noted
            else:
                noting = acting_as(_NotingAttention, self.attention, noted=recorded.attentions)
            with noting, record_calls([self.detector.get_submodule("neck")]) as recorded.calls:
                yield recorded
            return
        handle = self.module.register_forward_hook(lambda m, args, y: _in_a_graph(y))
        try:
            with record_calls([self.module]) as recorded.calls:
                yield recorded
        finally:
            handle.remove()


class _NotingAttention(FusionAttention):
    """Notes the text's attention over the image.

    Attributes:
        noted: gets each call's attention (B, heads, T, V).
    """

    noted: list[Tensor]

    def _note(self, attention: Tensor) -> Tensor:
        _in_a_graph(attention)
        self.noted.append(attention)
        return attention


def _in_a_graph(output: Any) -> None:
    """Let gradients be taken of an activation that is made of frozen parameters only."""
    for x in [output] if isinstance(output, Tensor) else output:
        if isinstance(x, Tensor) and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()


class Recorded:
    """An activation in a forward pass."""

    def __init__(self, activation: Activation, images: int) -> None:
        self.of = activation
        self.images = images
        self.calls: list[Any] = []  # of the module that gives the feature maps
        self.attentions: list[Tensor] = []
        self.differentiate = GradientHeatmap()

    def __bool__(self) -> bool:
        """Whether the activation has been reached."""
        return bool(self.calls if self.of.attention is None else self.attentions)

    def heatmaps(self, score: Tensor) -> Tensor:
        """Heatmaps (B, 1, H, W) of a sum of scores, one at most of each image.

        Raises:
            ArgumentError: if the score does not depend on the activation, or a level is missing.
        """
        try:
            if self.of.attention is not None:
                attention = self._attention()
                return self.differentiate(score, attention, layout=self._in_space)
            return self.differentiate(score, self._chosen(self._features()))
        except ArgumentError:
            raise
        except ValueError as error:
            raise ArgumentError(
                _ACTIVATION,
                f"must name a module between the image and the scores, got {self.of.name!r}: "
                f"{error}; let its layers and those behind it run without activation checkpoints "
                "(model.encoder.num_cp=0, use_checkpoint=False)",
            ) from error

    def _features(self) -> list[Tensor]:
        output = self.calls[-1].output
        maps = list(output) if isinstance(output, (tuple, list)) else [output]
        if not all(isinstance(map_, Tensor) and map_.dim() == 4 for map_ in maps):
            raise ArgumentError(
                _ACTIVATION,
                f"must name a module that gives feature maps (B, C, H, W), got {self.of.name!r}",
            )
        if any(len(map_) != self.images for map_ in maps):
            raise ArgumentError(
                _ACTIVATION,
                f"must name a module that gives each image's feature maps, got {self.of.name!r}, "
                f"which gives {len(maps[0])} for {self.images} images",
            )
        return maps

    def _attention(self) -> Tensor:
        """The attention (B, heads, tokens, positions of all levels); of two streams 2B."""
        positions = sum(map_.shape[2:].numel() for map_ in self._features())
        for attention in self.attentions:
            if attention.shape[3] == positions:
                return attention
        raise ArgumentError(
            _ACTIVATION,
            f"must name a layer that attends to the {positions} positions of the feature levels, "
            f"got {self.of.name!r}",
        )

    def _in_space(self, attention: Tensor) -> list[Tensor]:
        """(B, heads, tokens, positions) → (B, heads, tokens, H, W) of each chosen level."""
        sizes = [map_.shape[2:] for map_ in self._features()]
        levels = attention[: self.images].split([size.numel() for size in sizes], dim=3)
        return self._chosen([x.unflatten(3, size) for x, size in zip(levels, sizes, strict=True)])

    def _chosen(self, maps: list[Tensor]) -> list[Tensor]:
        levels = range(len(maps)) if self.of.levels is None else self.of.levels
        if max(levels) >= len(maps):
            raise ArgumentError(
                "heatmap.levels",
                f"must be among the levels 0 to {len(maps) - 1} of {self.of.name!r}, "
                f"got {tuple(levels)}",
            )
        return [maps[level] for level in levels]


def _is_fusion(module: nn.Module) -> bool:
    # Another subclass may compute something else.
    return type(module) in (BiMultiHeadAttention, _NotingAttention)


def _last_fusion_layer(detector: BaseDetector) -> str:
    fusion = [n for n, m in detector.named_modules() if _is_fusion(m)]
    if fusion:
        return fusion[-1]
    try:
        return last_stage(detector)
    except ValueError as error:
        raise ArgumentError(
            _ACTIVATION, f"must name a module that gives feature maps, as the {error}"
        ) from error


def last_stage(detector: nn.Module) -> str:
    """Name of the backbone's last stage; raises ValueError if the backbone has no stages."""
    backbone: Any = detector.get_submodule("backbone")
    for attribute in ("res_layers", "layers"):  # ResNet, MobileNetV2
        stages = getattr(backbone, attribute, None)
        if isinstance(stages, list):
            return f"backbone.{stages[max(backbone.out_indices)]}"
    raise ValueError(
        f"backbone is a {type(backbone).__name__}, which has no stages as a ResNet has"
    )
