"""Detectors of MMDetection whose gradients can be differentiated again.

mmcv's deformable operators and RoIAlign have first derivatives only, and so has PyTorch's hard
sigmoid, which GLIP's head has. For a loss on a gradient their results are replaced, meanwhile, by
the same numbers computed in a way that has second derivatives too
(:mod:`plugin_core.kernels.sampling`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmcv.ops import (
    DeformConv2d,
    DeformRoIPool,
    ModulatedDeformConv2d,
    MultiScaleDeformableAttention,
    RoIAlign,
    RoIPool,
)
from mmengine.dist import get_world_size
from torch import Tensor, nn

from plugin_core.kernels.sampling import (
    deformable_attention,
    deformable_convolution,
    linear_operator,
)

# What has first derivatives only: also RoIAlign of maxima, and what makes its offsets itself
_ONCE = (DeformConv2d, ModulatedDeformConv2d, RoIAlign, RoIPool, DeformRoIPool)


@contextmanager
def second_derivatives(
    model: nn.Module, wanted: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Let the model's forward passes have second derivatives; first ones stay as they are.

    Args:
        model: of MMDetection.
        wanted: asked before each operator, as those that a gradient does not pass can stay.

    Raises:
        ValueError: in the forward pass, by a wanted module that cannot be differentiated twice.
    """
    with ExitStack() as handles:

        def on(handle: Any) -> None:
            handles.callback(handle.remove)

        # Processes differ in how many phrases they have, and would wait for one another.
        refused = (*_ONCE, nn.SyncBatchNorm) if get_world_size() > 1 else _ONCE
        for name, module in model.named_modules():
            if isinstance(module, MultiScaleDeformableAttention):
                _Attention(module, wanted, on)
            elif type(module) in (DeformConv2d, ModulatedDeformConv2d):
                on(module.register_forward_hook(_convolve(wanted), with_kwargs=True))
            elif isinstance(module, nn.Hardsigmoid):
                _Hardsigmoid(module, wanted, on)
            elif isinstance(module, RoIAlign) and module.pool_mode == "avg":
                on(module.register_forward_hook(_extract(wanted)))
            elif isinstance(module, refused):
                on(module.register_forward_pre_hook(_refuse(name, wanted)))
        yield


class _Attention:
    """Replaces what a deformable attention projects by the same from twice differentiable parts."""

    def __init__(
        self,
        module: MultiScaleDeformableAttention,
        wanted: Callable[[], bool],
        on: Callable[[Any], None],
    ) -> None:
        self.wanted = wanted
        self.settings: dict[str, Any] = {}
        self.projected: dict[str, Tensor] = {}
        on(module.register_forward_pre_hook(self._note_call, with_kwargs=True))
        for name in ("value_proj", "sampling_offsets", "attention_weights"):
            on(getattr(module, name).register_forward_hook(self._note(name)))
        on(module.output_proj.register_forward_pre_hook(self._replace))
        self.module = module

    def _note_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.settings = kwargs  # detectors name what is after the query

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.projected[name] = output

        return hook

    def _replace(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not self.wanted():
            return None
        of = self.module
        value = self.projected["value_proj"]
        padding = self.settings.get("key_padding_mask")
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        shapes = self.settings["spatial_shapes"]
        reference = self.settings["reference_points"][:, :, None, :, None, :]
        points = (of.num_heads, of.num_levels, of.num_points)
        offsets = self.projected["sampling_offsets"].unflatten(2, (*points, 2))
        weights = self.projected["attention_weights"].unflatten(2, (of.num_heads, -1)).softmax(3)
        if reference.shape[-1] == 2:
            locations = reference + offsets / shapes.flip(1)[:, None]
        else:  # boxes: half of their size is as far as the points reach
            extent = reference[..., 2:] / (2 * of.num_points)
            locations = reference[..., :2] + offsets * extent
        sizes = [(height, width) for height, width in shapes.tolist()]
        heads = value.unflatten(2, (of.num_heads, -1))
        attended = deformable_attention(heads, sizes, locations, weights.unflatten(3, points[1:]))
        self.projected.clear()
        return (attended,)


class _Hardsigmoid:
    """The same of a clamp; it may be in place, so that its input is kept."""

    def __init__(
        self, module: nn.Hardsigmoid, wanted: Callable[[], bool], on: Callable[[Any], None]
    ) -> None:
        self.wanted = wanted
        self.x = torch.empty(0)
        on(module.register_forward_pre_hook(self._keep))
        on(module.register_forward_hook(self._replace))

    def _keep(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        self.x = args[0]
        return (args[0].clone(),)

    def _replace(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return ((self.x + 3).clamp(0, 6) / 6) if self.wanted() else None


def _convolve(wanted: Callable[[], bool]) -> Callable[..., Tensor | None]:
    def hook(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not wanted():
            return None
        bias = getattr(module, "bias", None)
        geometry = {
            name: _pair(getattr(module, name)) for name in ("stride", "padding", "dilation")
        }
        x, offset, *rest = inspect.signature(module.forward).bind(*args, **kwargs).args
        mask = rest[0] if rest else offset.new_ones(()).expand_as(offset)[:, : offset.shape[1] // 2]
        size = output.shape[2:]
        if offset.shape[2:] != size:
            # GLIP's head gives those of a larger level; the operator reads the first numbers of it.
            offset, mask = (_first(numbers, size) for numbers in (offset, mask))
        return deformable_convolution(
            x, offset, mask, module.weight, bias, groups=module.groups, **geometry
        )

    return hook


def _first(numbers: Tensor, size: torch.Size) -> Tensor:
    shape = (numbers.shape[1], *size)
    return numbers.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def _extract(wanted: Callable[[], bool]) -> Callable[..., Tensor | None]:
    def hook(module: RoIAlign, args: tuple[Tensor, Tensor], output: Tensor) -> Tensor | None:
        if not wanted():
            return None
        features, regions = args

        def align(levels: Sequence[Tensor]) -> Tensor:
            aligned: Tensor = module.forward(levels[0], regions)
            return aligned

        return linear_operator(align, output, [features])

    return hook


def _refuse(name: str, wanted: Callable[[], bool]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        if wanted():
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose gradient cannot be differentiated "
                "here, as attention mask consistency and functional entropy do it; name a "
                "model.heatmap.activation that comes after it, or take another layer"
            )

    return hook
