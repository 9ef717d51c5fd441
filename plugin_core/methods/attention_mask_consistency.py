"""Attention mask consistency, AMC (Yang et al., CVPR 2023, arXiv:2206.15462, section 3).

A score s of a phrase or class, an activation A of shape (B, heads, tokens, H, W) that it depends
on, and a region mask M that is 1 where the phrase's object is::

    h = relu(mean over heads and tokens of A · relu(ds/dA))                  gradient heatmap
    h = (h - min h) / (max (h - min h) + 1e-7), resized to the mask          of each sample

    mean loss = relu(mean of h outside M - mean of h inside M + 0.1)         means over the batch
    max loss  = mean over the batch of relu(max of h outside M - max of h inside M + 0.5)

The gradient can be differentiated again. So the losses train the model to look at the object for
its score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plugin_core.errors import ArgumentError, check_one_of, check_positive_int
from plugin_core.kernels.precision import in_float32

_T = TypeVar("_T")
_EPSILON = 1e-7
# Smaller gradients count as 0: their reciprocals would overflow in a product.
_SMALLEST = 1e-20
# Sides in pixels, as in the authors' model. Resized bilinearly, a cell's heat reaches its
# neighbours, so that a box about as small as a cell could not have the margin.
_LARGEST_CELL = 16


def gradient_heatmap(
    activations: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    token_mask: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Show which cells of an activation raise a score (arXiv:2206.15462, section 3.1).

    Args:
        activations: cross-attention (B, heads, tokens, H, W), or a feature map (B, C, H, W). The
            levels of a pyramid, a sequence, are resized to the size of the first and averaged.
            Levels may differ in heads and tokens.
        gradients: of the score by the activations, in their shapes.
        token_mask: (B, tokens), 0 for tokens that count as zeros, such as padding.
        size: (H', W') to resize the heatmap to, bilinearly; None leaves it (H, W).

    Returns:
        (B, 1, H', W') in [0, 1]. In each sample the least is 0 and the greatest about 1.

    Raises:
        ValueError: if shapes do not fit.
    """
    levels = [activations] if isinstance(activations, Tensor) else list(activations)
    slopes = [gradients] if isinstance(gradients, Tensor) else list(gradients)
    if not levels or [x.shape for x in levels] != [g.shape for g in slopes]:
        raise ValueError(
            f"gradients must have the shapes of activations {[tuple(x.shape) for x in levels]}, "
            f"got {[tuple(g.shape) for g in slopes]}"
        )
    heat = torch.stack(
        [
            _fit(_useful(x, g, token_mask), levels[0].shape[-2:])
            for x, g in zip(levels, slopes, strict=True)
        ]
    ).mean(0)
    heat = heat.relu()
    heat = heat - heat.amin((2, 3), keepdim=True)
    heat = heat / (heat.amax((2, 3), keepdim=True) + _EPSILON)
    return _fit(heat, size)


def _useful(activation: Tensor, gradient: Tensor, token_mask: Tensor | None) -> Tensor:
    if activation.dim() not in (4, 5):
        raise ValueError(
            "activations must be (B, heads, tokens, H, W) or a feature map (B, C, H, W), got "
            f"{tuple(activation.shape)}"
        )
    product = in_float32(activation) * in_float32(gradient).relu()
    if token_mask is not None:
        tokens = activation.shape[2] if activation.dim() == 5 else None
        if token_mask.shape != (len(activation), tokens):
            raise ValueError(
                f"token_mask must be (B, tokens) of activations {tuple(activation.shape)}, got "
                f"{tuple(token_mask.shape)}"
            )
        product = product * token_mask[:, None, :, None, None]
    return product.flatten(1, -3).mean(1, keepdim=True)


def _fit(heat: Tensor, size: Sequence[int] | None) -> Tensor:
    if size is None or heat.shape[2:] == tuple(size):
        return heat
    return F.interpolate(heat, tuple(size), mode="bilinear", align_corners=False)


def attention_mask_consistency_loss(
    heatmap: Tensor,
    region_mask: Tensor,
    mean_margin: float = 0.1,
    max_margin: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Punish heat outside of the region (arXiv:2206.15462, section 3.2).

    A sample counts only if its region is neither empty nor everything: other regions do not say
    where to look.

    Args:
        heatmap: (B, 1, H, W) in [0, 1].
        region_mask: (B, 1, H, W), 1 inside of the region and 0 outside.
        mean_margin: in [0, 1]; the mean inside should exceed the mean outside by it.
        max_margin: in [0, 1]; the maximum inside should exceed the maximum outside by it.

    Returns:
        The mean loss and the max loss, scalars ≥ 0; both 0 if no sample counts.

    Raises:
        ArgumentError: if a margin is out of its range.
        ValueError: if the shapes differ, or the mask has other values.
    """
    check_margins(mean_margin, max_margin)
    if heatmap.dim() != 4 or heatmap.shape[1] != 1 or heatmap.shape != region_mask.shape:
        raise ValueError(
            f"heatmap and region_mask must both be (B, 1, H, W), got {tuple(heatmap.shape)} and "
            f"{tuple(region_mask.shape)}"
        )
    inside = region_mask.to(torch.bool)
    if not torch.equal(inside.to(region_mask.dtype), region_mask):
        raise ValueError("region_mask must be 1 inside of the region and 0 outside, nothing else")
    area = inside.flatten(1).sum(1)
    counts = (area > 0) & (area < inside[0].numel()) if len(inside) else area > 0
    if not counts.any():
        nothing = heatmap.sum() * 0
        return nothing, nothing
    heat, inside = heatmap[counts], inside[counts]
    mean_loss = (heat[~inside].mean() - heat[inside].mean() + mean_margin).relu()
    lowest = heat.new_tensor(-torch.inf)
    max_outside = heat.where(~inside, lowest).amax((1, 2, 3))
    max_inside = heat.where(inside, lowest).amax((1, 2, 3))
    return mean_loss, (max_outside - max_inside + max_margin).relu().mean()


def check_margins(mean_margin: float, max_margin: float) -> None:
    """Raise ArgumentError if a margin is out of [0, 1], the range of the heat."""
    for name, margin in (("mean_margin", mean_margin), ("max_margin", max_margin)):
        if not 0 <= margin <= 1:
            raise ArgumentError(name, f"must be from 0 to 1, as the heat is, got {margin!r}")


class GradientHeatmap:
    """Differentiate a score by an activation and make the heatmap.

    The gradient of each sample is first scaled to at most 1, which leaves the heatmap as it is. A
    fusion layer that starts nearly closed has gradients below the 1e-7 of the formula.

    Args:
        create_graph: make a heatmap that can be differentiated, as a loss needs.
    """

    def __init__(self, create_graph: bool = True) -> None:
        self.create_graph = create_graph

    def __call__(
        self,
        score: Tensor,
        activations: Tensor | Sequence[Tensor],
        token_mask: Tensor | None = None,
        size: tuple[int, int] | None = None,
        layout: Callable[[Tensor], Tensor | list[Tensor]] | None = None,
    ) -> Tensor:
        """Make the heatmap of a score, and keep the score's graph.

        Args:
            score: scalar, or (B,). A sample's score depends on no other sample.
            activations: see :func:`gradient_heatmap`; the score is computed from them.
            token_mask: see :func:`gradient_heatmap`.
            size: see :func:`gradient_heatmap`.
            layout: reshapes an activation, and its gradient, to what :func:`gradient_heatmap`
                takes, a tensor or a list; None where the network has them so.

        Returns:
            (B, 1, H', W') in [0, 1].

        Raises:
            ValueError: if the score does not depend on the activations, or a shape does not fit.
        """
        levels = [activations] if isinstance(activations, Tensor) else list(activations)
        if not score.requires_grad or not all(level.requires_grad for level in levels):
            raise ValueError(
                "score and activations must be parts of one graph, got "
                f"score.requires_grad={score.requires_grad} and activations "
                f"{[level.requires_grad for level in levels]}; was the forward without gradients?"
            )
        gradients = torch.autograd.grad(
            score.sum(),
            levels,
            retain_graph=True,
            create_graph=self.create_graph,
            allow_unused=True,
        )
        if all(gradient is None for gradient in gradients):
            raise ValueError("the score does not depend on the activations")
        slopes = [
            torch.zeros_like(level) if gradient is None else in_float32(gradient)
            for level, gradient in zip(levels, gradients, strict=True)
        ]
        if layout is not None:
            levels, slopes = _laid_out(layout, levels), _laid_out(layout, slopes)
        largest = torch.stack([slope.detach().abs().flatten(1).amax(1) for slope in slopes]).amax(0)
        scale = largest.clamp(min=_SMALLEST).reciprocal()
        slopes = [slope * scale.view(-1, *[1] * (slope.dim() - 1)) for slope in slopes]
        return gradient_heatmap(levels, slopes, token_mask, size)


def _laid_out(
    layout: Callable[[Tensor], Tensor | list[Tensor]], levels: Sequence[Tensor]
) -> list[Tensor]:
    shaped = [layout(level) for level in levels]
    return [map_ for maps in shaped for map_ in ([maps] if isinstance(maps, Tensor) else maps)]


@dataclass(frozen=True, eq=False)
class ScoredRegion:
    """An image's score of a phrase or class, and the boxes of its objects.

    Args:
        score: scalar in the network's graph.
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the network's input.
    """

    score: Tensor
    boxes: Tensor


class AttentionMaskConsistency:
    """Compute the losses of a batch whose images have any number of phrases or classes.

    Args:
        mean_weight: of the mean loss, finite and ≥ 0. The default is the authors'.
        max_weight: of the max loss, finite and ≥ 0. The default is the authors'.
        mean_margin: in [0, 1], see :func:`attention_mask_consistency_loss`.
        max_margin: in [0, 1], see :func:`attention_mask_consistency_loss`.
        every: take the losses in every n-th step only, n ≥ 1; the second derivative is slow.
        phrases: take at most so many of each image, at random; None for all. Each further phrase of
            an image costs another differentiation.
        boxes: region of a phrase: "all" for the union of its boxes, or "random" for one of them,
            drawn in each step.
        resolution: "image" to resize heatmaps to the network's input before the losses, as the
            authors do, or "activation" to leave them as they are. "auto" is "image" where a cell
            of the heatmap has sides of at most 16 pixels, as theirs. "image" keeps 11 bytes of
            each pixel and phrase for the backward pass.

    Raises:
        ArgumentError: if an argument is out of its range.
    """

    def __init__(
        self,
        mean_weight: float = 0.2,
        max_weight: float = 0.8,
        mean_margin: float = 0.1,
        max_margin: float = 0.5,
        every: int = 1,
        phrases: int | None = 1,
        boxes: str = "all",
        resolution: str = "auto",
    ) -> None:
        check_margins(mean_margin, max_margin)
        for name, weight in (("mean_weight", mean_weight), ("max_weight", max_weight)):
            if not 0 <= weight < float("inf"):
                raise ArgumentError(name, f"must be at least 0 and finite, got {weight!r}")
        check_positive_int(every=every)
        if phrases is not None and (type(phrases) is not int or phrases < 1):
            raise ArgumentError("phrases", f"must be at least 1, or None for all, got {phrases!r}")
        check_one_of("boxes", boxes, ("all", "random"))
        check_one_of("resolution", resolution, ("auto", "image", "activation"))
        self.mean_weight, self.max_weight = mean_weight, max_weight
        self.mean_margin, self.max_margin = mean_margin, max_margin
        self.every, self.phrases = every, phrases
        self.boxes, self.resolution = boxes, resolution

    def __call__(
        self,
        images: Sequence[Sequence[ScoredRegion]],
        heatmaps: Callable[[Tensor], Tensor],
        input_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Compute the weighted losses.

        Images without phrases do not count. If none has phrases, the losses are 0.

        Args:
            images: the phrases or classes of each of the B images.
            heatmaps: makes heatmaps (B, 1, H, W) of a sum of scores, at most one score an image.
            input_size: (height, width) in pixels of the network's input. Heatmaps cover all of it.

        Returns:
            ``loss_amc_mean`` and ``loss_amc_max``, scalars ≥ 0.
        """
        chosen = [self.choose(regions) for regions in images]
        heats: list[Tensor] = []
        masks: list[Tensor] = []
        for turn in range(max(map(len, chosen), default=0)):
            rows = [i for i, regions in enumerate(chosen) if turn < len(regions)]
            heat = heatmaps(torch.stack([chosen[i][turn].score for i in rows]).sum())[rows]
            if self._is_resized(heat, input_size):
                heat = _fit(heat, input_size)
            heats.append(heat)
            boxes = [self._choose_boxes(chosen[i][turn].boxes) for i in rows]
            masks.append(region_mask(boxes, input_size, (heat.shape[2], heat.shape[3])))
        if heats:
            mean_loss, max_loss = attention_mask_consistency_loss(
                torch.cat(heats), torch.cat(masks), self.mean_margin, self.max_margin
            )
        else:
            mean_loss = max_loss = torch.zeros(())
        return {
            "loss_amc_mean": self.mean_weight * mean_loss,
            "loss_amc_max": self.max_weight * max_loss,
        }

    def choose(self, of_image: Sequence[_T]) -> list[_T]:
        """Draw the phrases of an image that count, in any form; of so few all count."""
        if self.phrases is None or len(of_image) <= self.phrases:
            return list(of_image)
        return [of_image[i] for i in torch.randperm(len(of_image))[: self.phrases].tolist()]

    def _is_resized(self, heat: Tensor, input_size: tuple[int, int]) -> bool:
        if self.resolution != "auto":
            return self.resolution == "image"
        sizes = zip(input_size, heat.shape[2:], strict=True)
        return all(pixels <= _LARGEST_CELL * cells for pixels, cells in sizes)

    def _choose_boxes(self, boxes: Tensor) -> Tensor:
        if self.boxes == "all":
            return boxes
        drawn = int(torch.randint(len(boxes), ()))
        return boxes[drawn : drawn + 1]


def region_mask(
    boxes: Sequence[Tensor], input_size: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Mark the cells whose centres are in a box. A box without a centre marks the cell around it.

    Args:
        boxes: (N, 4) of each of B images: x1, y1, x2, y2 in pixels of the input. They may reach
            beyond the input.
        input_size: (height, width) of the input in pixels.
        size: (H, W) of the masks. They cover the input.

    Returns:
        (B, 1, H, W), 1.0 inside and 0.0 outside.
    """
    masks = []
    for of_image in boxes:
        cells = of_image.new_tensor([size[1] / input_size[1], size[0] / input_size[0]]).repeat(2)
        scaled = of_image * cells  # in cells
        limit = of_image.new_tensor([size[1], size[0]])
        empty = (scaled[:, 2:].minimum(limit) <= scaled[:, :2].clamp(min=0)).any(1)
        centre = ((scaled[:, :2] + scaled[:, 2:]) / 2).floor()
        within = []
        for axis in (0, 1):
            at = torch.arange(size[1 - axis], device=of_image.device)
            low, high = scaled[:, axis, None], scaled[:, 2 + axis, None]
            inside = (at + 0.5 >= low) & (at + 0.5 < high)
            within.append(inside | (~inside.any(1, keepdim=True) & (at == centre[:, axis, None])))
        mask = within[1][:, :, None] & within[0][:, None, :] & ~empty[:, None, None]
        masks.append(mask.any(0).float())
    return torch.stack(masks)[:, None]
