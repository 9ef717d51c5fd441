"""Where a detector of MMDetection looks: an activation, recorded to be differentiated."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.detectors import BaseDetector
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from plugin_core import GradientHeatmap
from plugin_core.inspection.recorder import record_calls


class Activation:
    """An image–text cross-attention, or a feature map, of a detector.

    Of a fusion layer it is the attention of the text's tokens over the positions of all feature
    levels, as AMC has it.

    Args:
        detector: with a ``neck``, where the activation is an attention.
        name: of the module: a fusion layer or its attention, such as ``encoder.fusion_layers.5`` of
            Grounding DINO, or one that gives feature maps, such as ``backbone.layer4`` or
            ``neck``. None for the last fusion layer, or the last stage of the backbone where there
            is none.
        levels: which of the feature levels, from 0 on; None for all.

    Raises:
        ValueError: if there is no such module or level.
    """

    def __init__(
        self, detector: BaseDetector, name: str | None = None, levels: Sequence[int] | None = None
    ) -> None:
        self.detector = detector
        self.name = _last_fusion_layer(detector) if name is None else name
        modules = dict(detector.named_modules())
        if self.name not in modules or not self.name:
            likely = difflib.get_close_matches(self.name, modules, n=3, cutoff=0.4)
            raise ValueError(
                f"heatmap.activation: the detector has no module {self.name!r}; similar names: "
                f"{', '.join(likely) or 'none'}"
            )
        attentions = [m for m in self.module.modules() if isinstance(m, BiMultiHeadAttention)]
        self.is_attention = len(attentions) == 1
        if len(attentions) > 1:
            raise ValueError(
                f"heatmap.activation: {self.name!r} has {len(attentions)} fusion layers, name one"
            )
        if levels is not None and (
            not isinstance(levels, Sequence)
            or isinstance(levels, str)
            or not levels
            or any(type(level) is not int or level < 0 for level in levels)
        ):
            raise ValueError(
                f"heatmap.levels: expected a tuple of feature levels such as (0, 1), or None for "
                f"all, got {levels!r}"
            )
        self.levels = levels

    @property
    def module(self) -> nn.Module:
        return self.detector.get_submodule(self.name)

    @contextmanager
    def record(self, images: int) -> Iterator[Recorded]:
        """Record it in a forward pass of so many images inside the context."""
        recorded = Recorded(self, images)
        if not self.is_attention:
            handle = self.module.register_forward_hook(lambda m, args, y: _in_a_graph(y))
            try:
                with record_calls([self.module]) as recorded.calls:
                    yield recorded
            finally:
                handle.remove()
            return
        attention = next(m for m in self.module.modules() if isinstance(m, BiMultiHeadAttention))
        softmax = _SoftmaxRecorder(recorded.softmax)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            softmax.__enter__()

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            softmax.__exit__(None, None, None)

        handles = [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(leave, always_call=True),
        ]
        try:
            with record_calls([self.detector.get_submodule("neck")]) as recorded.calls:
                yield recorded
        finally:
            for handle in handles:
                handle.remove()


class _SoftmaxRecorder(TorchFunctionMode):
    """Notes what softmax gives: an attention that its module does not return."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            _in_a_graph(output)
            self.found.append(output)
        return output


def _in_a_graph(output: Any) -> None:
    """Let gradients be taken of an activation also where all that it is made of is frozen."""
    for x in [output] if isinstance(output, Tensor) else output:
        if isinstance(x, Tensor) and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()


class Recorded:
    """What was recorded of a forward pass."""

    def __init__(self, activation: Activation, images: int) -> None:
        self.of = activation
        self.images = images
        self.calls: list[Any] = []
        self.softmax: list[Tensor] = []
        self.differentiate = GradientHeatmap()

    def __bool__(self) -> bool:
        """Whether the activation has been reached."""
        return bool(self.softmax if self.of.is_attention else self.calls)

    def heatmaps(self, score: Tensor) -> Tensor:
        """Heatmaps (B, 1, H, W) of a sum of scores, one at most of each image.

        Raises:
            ValueError: if the score does not depend on the activation, or there are other levels.
        """
        try:
            if self.of.is_attention:
                attention = self._attention()
                return self.differentiate(score, attention, layout=self._in_space)
            return self.differentiate(score, self._chosen(self._features()))
        except ValueError as error:
            raise ValueError(
                f"heatmap.activation {self.of.name!r}: {error}; name a module between the image "
                "and the scores, and let its layers run without activation checkpoints "
                "(model.encoder.num_cp=0, use_checkpoint=False)"
            ) from error

    def _features(self) -> list[Tensor]:
        output = self.calls[-1].output
        maps = list(output) if isinstance(output, (tuple, list)) else [output]
        if not all(isinstance(map_, Tensor) and map_.dim() == 4 for map_ in maps):
            raise ValueError("it gives no feature maps (B, C, H, W)")
        if any(len(map_) != self.images for map_ in maps):
            raise ValueError(f"it gives {len(maps[0])} feature maps for {self.images} images")
        return maps

    def _attention(self) -> Tensor:
        """The attention (B · heads, tokens, positions of all levels)."""
        positions = sum(map_.shape[2:].numel() for map_ in self._features())
        for attention in self.softmax:
            if attention.shape[-1] == positions:
                return attention
        raise ValueError(f"it does not attend to the {positions} positions of the feature levels")

    def _in_space(self, attention: Tensor) -> list[Tensor]:
        """(B · heads, tokens, positions) → (B, heads, tokens, H, W) of each chosen level."""
        maps = self._features()
        of_images = attention.unflatten(0, (len(maps[0]), -1))
        levels = of_images.split([map_.shape[2:].numel() for map_ in maps], dim=3)
        return self._chosen(
            [x.unflatten(3, map_.shape[2:]) for x, map_ in zip(levels, maps, strict=True)]
        )

    def _chosen(self, maps: list[Tensor]) -> list[Tensor]:
        levels = range(len(maps)) if self.of.levels is None else self.of.levels
        if max(levels) >= len(maps):
            raise ValueError(f"levels {tuple(levels)}: there are levels 0 to {len(maps) - 1}")
        return [maps[level] for level in levels]


def _last_fusion_layer(detector: BaseDetector) -> str:
    fusion = [n for n, m in detector.named_modules() if isinstance(m, BiMultiHeadAttention)]
    if fusion:
        return fusion[-1]
    try:
        return last_stage(detector)
    except ValueError as error:
        raise ValueError(
            f"heatmap.activation: {error}; name a module that gives feature maps"
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
