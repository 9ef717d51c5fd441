"""Lets the gradients of a detector of MMDetection be differentiated again.

mmcv's deformable operators and RoIAlign have first derivatives only, and so has PyTorch's hard
sigmoid, which GLIP's head has. For the time of a step modules of these classes act as subclasses
that compute the same numbers from parts with second derivatives
(:mod:`plugin_core.kernels.sampling`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmcv.ops import (
    DeformConv2d,
    DeformRoIPool,
    ModulatedDeformConv2d,
    MultiScaleDeformableAttention,
    RoIAlign,
    RoIPool,
)
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from mmengine.dist import get_world_size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm_plugins.fusion import FusionAttention
from plugin_core.kernels.sampling import (
    deformable_attention,
    deformable_convolution,
    linear_operator,
)
from plugin_core.stand_ins import acting_as

# Classes with first derivatives only; their subclasses may compute something else.
_ONCE = (
    MultiScaleDeformableAttention,
    DeformConv2d,
    ModulatedDeformConv2d,
    RoIAlign,
    RoIPool,
    DeformRoIPool,
)


@contextmanager
def second_derivatives(
    model: nn.Module,
    wanted: Callable[[], bool] = lambda: True,
    without: nn.Module | None = None,
) -> Iterator[None]:
    """Let the model's forward passes have second derivatives; first ones stay as they are.

    Attention takes PyTorch's mathematical path, as the fused ones have first derivatives only.
    Contexts can be nested: a module can be differentiated twice where any of them wants it.

    Args:
        model: of MMDetection.
        wanted: asked before each operator, as an operator that no gradient passes can stay.
        without: a part of the model that stays as it is.

    Raises:
        ValueError: in the forward pass, by a wanted module that cannot be differentiated twice.
    """
    # Processes differ in how many phrases they have, and would wait for one another.
    refused = (*_ONCE, nn.SyncBatchNorm) if get_world_size() > 1 else _ONCE
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        memo = set() if without is None else set(without.modules())  # which it leaves out
        for name, module in model.named_modules(memo):
            twice = _TWICE.get(type(module))
            if type(module) in _ACTING:
                either = _either(module.wanted, wanted)
                stack.enter_context(acting_as(type(module), module, wanted=either))
            elif twice is not None and getattr(module, "pool_mode", "avg") == "avg":
                stack.enter_context(acting_as(twice, module, wanted=wanted))
            elif isinstance(module, refused):
                stack.callback(module.register_forward_pre_hook(_refuse(name, wanted)).remove)
        yield


class _Attention(MultiScaleDeformableAttention):
    wanted: Callable[[], bool]

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.wanted():
            return super().forward(
                query,
                key,
                value,
                identity,
                query_pos,
                key_padding_mask,
                reference_points,
                spatial_shapes,
                level_start_index,
                **kwargs,
            )
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        points = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(2, (*points, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(3)
        reference = reference_points[:, :, None, :, None]
        if reference.shape[-1] == 2:
            locations = reference + offsets / spatial_shapes.flip(1)[:, None]
        else:  # boxes: half of their size is as far as the points reach
            extent = reference[..., 2:] / (2 * self.num_points)
            locations = reference[..., :2] + offsets * extent
        sizes = [(height, width) for height, width in spatial_shapes.tolist()]
        heads = value.unflatten(2, (self.num_heads, -1))
        attended = deformable_attention(heads, sizes, locations, weights.unflatten(3, points[1:]))
        attended = self.output_proj(attended)
        if not self.batch_first:
            attended = attended.transpose(0, 1)
        return self.dropout(attended) + identity


class _Fusion(FusionAttention):
    """It has second derivatives anyway; these are cheaper."""

    wanted: Callable[[], bool]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kind = FusionAttention if self.wanted() else BiMultiHeadAttention
        fused: tuple[Tensor, Tensor] = kind.forward(self, *args, **kwargs)
        return fused


class _DeformConv2d(DeformConv2d):
    wanted: Callable[[], bool]

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        if not self.wanted():
            return super().forward(x, offset)
        mask = offset.new_ones(()).expand_as(offset)[:, : offset.shape[1] // 2]
        return _convolve(self, x, offset, mask)


class _ModulatedDeformConv2d(ModulatedDeformConv2d):
    wanted: Callable[[], bool]

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        if not self.wanted():
            return super().forward(x, offset, mask)
        return _convolve(self, x, offset, mask)


class _Hardsigmoid(nn.Hardsigmoid):
    wanted: Callable[[], bool]

    def forward(self, x: Tensor) -> Tensor:
        return (x + 3).clamp(0, 6) / 6 if self.wanted() else super().forward(x)


class _RoIAlign(RoIAlign):
    wanted: Callable[[], bool]

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        aligned = super().forward(x, regions)
        if not self.wanted():
            return aligned
        # The backward pass comes when this is a RoIAlign again.
        return linear_operator(lambda maps: RoIAlign.forward(self, maps[0], regions), aligned, [x])


_TWICE: dict[type[nn.Module], type[nn.Module]] = {
    BiMultiHeadAttention: _Fusion,
    MultiScaleDeformableAttention: _Attention,
    DeformConv2d: _DeformConv2d,
    ModulatedDeformConv2d: _ModulatedDeformConv2d,
    nn.Hardsigmoid: _Hardsigmoid,
    RoIAlign: _RoIAlign,
}
_ACTING = frozenset(_TWICE.values())


def _either(first: Callable[[], bool], second: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: first() or second()


def _convolve(module: Any, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    stride, padding, dilation, kernel = (
        _pair(getattr(module, name)) for name in ("stride", "padding", "dilation", "kernel_size")
    )
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    if list(offset.shape[2:]) != size:
        # GLIP's head gives those of a larger level; the operator reads the first numbers of it.
        offset, mask = (_first(numbers, size) for numbers in (offset, mask))
    bias = getattr(module, "bias", None)
    return deformable_convolution(
        x, offset, mask, module.weight, bias, stride, padding, dilation, groups=module.groups
    )


def _first(numbers: Tensor, size: list[int]) -> Tensor:
    shape = (numbers.shape[1], *size)
    return numbers.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def _refuse(name: str, wanted: Callable[[], bool]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        if wanted():
            raise ValueError(
                f"{name} is a {type(module).__name__}, whose gradient cannot be differentiated "
                "here, as attention mask consistency and functional entropy do it; name a "
                "model.heatmap.activation that comes after it, or take another layer"
            )

    return hook
