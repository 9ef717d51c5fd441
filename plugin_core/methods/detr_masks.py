"""DETR's masks (Carion et al., ECCV 2020, arXiv:2005.12872, section 4.4 and appendix A.5).

Each query q of the decoder attends to the encoder's map m. The attention a itself is the first,
coarse mask; convolutions with the backbone's maps as laterals refine it. With H heads of D = C/H
channels, and the softmax over all heads and positions p together:

    a(h, p) = softmax over (h, p) of ⟨(W_q q)_h, (W_k m(p))_h⟩ / √D
    y       = [x, a], with x the map that the encoder got          C + H channels
    y       ← relu(GN(conv(y)))  twice, then three times: upsample, + lateral, relu(GN(conv(·)))
    logits  = conv(y), of a quarter of the image's height and width

A query's mask depends on no other query. So only masks that are used need to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.errors import ArgumentError

_GROUPS = 8  # of the group norms


class DETRMasks(nn.Module):
    """The mask head.

    Args:
        embed_dims: channels C of queries and encoder, a multiple of 128.
        num_heads: H, a multiple of 8 by which C can be divided.
        in_channels: of the backbone's maps, from the finest to the coarsest.

    Raises:
        ArgumentError: if an argument is wrong.
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        in_channels: Sequence[int] = (256, 512, 1024),
    ) -> None:
        super().__init__()
        # The last group norm has C/16 channels, the first C + H.
        if embed_dims < 1 or embed_dims % (16 * _GROUPS):
            raise ArgumentError("embed_dims", f"must be a multiple of 128, got {embed_dims!r}")
        if num_heads < 1 or num_heads % _GROUPS or embed_dims % num_heads:
            raise ArgumentError(
                "num_heads",
                f"must be a multiple of {_GROUPS} by which {embed_dims} can be divided, got "
                f"{num_heads!r}",
            )
        if len(in_channels) != 3:
            raise ArgumentError(
                "in_channels", f"must be the channels of 3 maps, got {tuple(in_channels)!r}"
            )
        self.num_heads = num_heads
        self.query_proj = nn.Linear(embed_dims, embed_dims)
        self.key_proj = nn.Linear(embed_dims, embed_dims)
        first = embed_dims + num_heads
        widths = [first, *(embed_dims // 2**i for i in range(1, 5))]
        self.convs = nn.ModuleList(
            nn.Conv2d(wide, narrow, 3, padding=1)
            for wide, narrow in zip([first, *widths], widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for width in widths)
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels, width, 1)
            for channels, width in zip(reversed(in_channels), widths[1:], strict=False)
        )
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the authors do."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        queries: Tensor,
        images: Tensor,
        memory: Tensor,
        source: Tensor,
        maps: Sequence[Tensor],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Compute the masks of N queries.

        Args:
            queries: decoder's output, (N, C).
            images: for each query the place of its image in the batch, (N,) of long.
            memory: encoder's output, (B, C, h, w).
            source: encoder's input, (B', C, h, w). B' divides B: in memory the batch may be
                repeated, as BatchFormer does.
            maps: of the backbone, from the finest to the coarsest, (B', channels, h_i, w_i).
            padding: True where there is none of an image, (B, h, w); None without padding.

        Returns:
            Logits, (N, h_0, w_0) of the finest map.
        """
        once = images % len(source)
        x = torch.cat([source[once], self.attention(queries, images, memory, padding)], dim=1)
        laterals = iter(zip(self.laterals, reversed(maps), strict=True))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if i >= 2:
                project, level = next(laterals)
                lateral = project(level)
                x = F.interpolate(x, size=lateral.shape[-2:], mode="nearest") + lateral[once]
            x = F.relu(norm(conv(x)))
        return self.output(x)[:, 0]

    def attention(
        self, queries: Tensor, images: Tensor, memory: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Compute the attention (N, H, h, w) of queries, as in :meth:`forward`."""
        q = self.query_proj(queries).unflatten(1, (self.num_heads, -1))
        k = F.conv2d(memory, self.key_proj.weight[:, :, None, None], self.key_proj.bias)
        k = k.unflatten(1, (self.num_heads, -1))
        scores = torch.einsum("nhd,nhdyx->nhyx", q * q.shape[-1] ** -0.5, k[images])
        if padding is not None:
            scores = scores.masked_fill(padding[images][:, None], float("-inf"))
        return scores.flatten(1).softmax(dim=1).view_as(scores)


@torch.no_grad()
def panoptic_segments(
    logits: Tensor, labels: Tensor, is_thing: Tensor, size: tuple[int, int], min_area: int = 4
) -> tuple[Tensor, Tensor]:
    """Give each pixel to one of the masks, without those that get next to nothing.

    Each pixel is the mask's of the largest logit. Masks of the same stuff class count as the first
    of them; the others so lose all their pixels, and are left out. Then pixels are given out anew
    among the masks that are left, until none of them is too small. This is how DETR's published
    numbers were computed.

    Args:
        logits: masks of the image, (N, H, W).
        labels: their classes, (N,) of long.
        is_thing: for each mask whether its class is one of things, (N,) of bool.
        size: height and width of the result.
        min_area: masks of at most so many pixels of the result are left out.

    Returns:
        For each pixel the place of its mask in the second result, -1 if there is none, (size) of
        long; the masks that are left, as places in ``logits``, (S,) of long.
    """
    kept = torch.arange(len(labels), device=logits.device)
    same = (labels[:, None] == labels) & ~is_thing
    first = torch.where(is_thing, kept, same.int().argmax(dim=1)) if len(kept) else kept
    while len(kept):
        owner = first[logits[kept].argmax(dim=0)]
        rows, columns = (_nearest(old, new) for old, new in zip(owner.shape, size, strict=True))
        places = owner[rows][:, columns]
        large = torch.bincount(places.flatten(), minlength=len(kept)) > min_area
        if large.all():
            return places, kept
        kept = kept[large]
        first = torch.arange(len(kept), device=logits.device)
    return torch.full(size, -1, device=logits.device), kept


def _nearest(old: int, new: int) -> Tensor:
    """For each of ``new`` pixels in a row the nearest of ``old`` ones, as in the authors' Pillow.

    Pillow adds up steps, so its rounding decides where two are equally near.
    """
    steps = torch.full((new,), old / new, dtype=torch.double)
    steps[:1] /= 2
    return steps.cumsum(0).long().clamp(max=old - 1)
