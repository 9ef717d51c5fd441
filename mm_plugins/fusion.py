"""The attention of image and text to each other, in which the image's projections cost little."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.utils.vlfuse_helper import MAX_CLAMP_VALUE, BiMultiHeadAttention
from torch import Tensor, nn


class FusionAttention(BiMultiHeadAttention):
    """MMDetection's attention of grounding detectors, multiplied in another order.

    With queries q of V positions of the image and keys k of T tokens, in each head::

        s = clamp(q·kᵀ · scale)                              (V, T)
        image gets softmax over tokens of s · text values
        text  gets softmax over positions of sᵀ · image values

    The image's queries, values and outputs are projections of V rows to heads · D channels. Texts
    are short: where their T rows are multiplied by the projections' weights first, as in
    q·kᵀ = x·(Wᵀ·kᵀ), no such row is computed, or kept for derivatives.
    """

    def forward(
        self,
        vision: Tensor,
        lang: Tensor,
        attention_mask_v: Tensor | None = None,
        attention_mask_l: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        heads = self.num_heads
        key = self._heads(self.l_proj(lang)) * self.scale
        weight, bias = self._of_heads(self.v_proj, vision.shape[2])
        logits = vision @ (key @ weight).flatten(1, 2).transpose(1, 2)
        logits = logits.unflatten(2, (heads, -1)) + (key @ bias[..., None]).squeeze(3)[:, None]
        if self.stable_softmax_2d:
            logits = logits - logits.max()
        logits = self._clamp(logits)  # (B, V, heads, T)

        of_text = logits.permute(0, 2, 3, 1)
        of_text = self._clamp(of_text - of_text.amax(3, keepdim=True))
        if attention_mask_v is not None:  # True for padding
            of_text = of_text.masked_fill(attention_mask_v[:, None, None], -torch.inf)
        of_text = self._note(of_text.softmax(3))

        # MMDetection's masks of booleans have no effect, those of numbers are 0 for padding.
        if attention_mask_l is not None and attention_mask_l.dtype != torch.bool:
            logits = logits.masked_fill(attention_mask_l[:, None, None] == 0, -9e15)
        of_image = self._dropped(logits.softmax(3))

        weight, bias = _affine(self.out_v_proj, heads * self.head_dim)
        weight = weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
        to_image = (self._heads(self.values_l_proj(lang)) @ weight).flatten(1, 2)
        to_image = of_image.flatten(2) @ to_image + bias

        of_text = self._dropped(of_text)
        weight, bias = self._of_heads(self.values_v_proj, vision.shape[2])
        seen = (of_text.flatten(1, 2) @ vision).unflatten(1, (heads, -1))
        to_text = seen @ weight.transpose(1, 2) + of_text.sum(3, keepdim=True) * bias[:, None]
        return to_image, self.out_l_proj(to_text.transpose(1, 2).flatten(2))

    def _note(self, attention: Tensor) -> Tensor:
        """Get the text's attention (B, heads, T, V), and give what is used in its place."""
        return attention

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, heads · D) → (B, heads, N, D)."""
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _of_heads(self, projection: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
        """Weight (heads, D, C) and bias (heads, D)."""
        weight, bias = _affine(projection, channels)
        return weight.unflatten(0, (self.num_heads, -1)), bias.unflatten(0, (self.num_heads, -1))

    def _clamp(self, logits: Tensor) -> Tensor:
        low = -MAX_CLAMP_VALUE if self.clamp_min_for_underflow else None
        high = MAX_CLAMP_VALUE if self.clamp_max_for_overflow else None
        return logits if low is high is None else logits.clamp(low, high)

    def _dropped(self, attention: Tensor) -> Tensor:
        return F.dropout(attention, self.dropout, self.training)


def _affine(projection: Any, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer; of another one, such as with LoRA, by calling it."""
    if type(projection) is nn.Linear:
        return projection.weight, projection.bias
    first = next(projection.parameters())
    unit = torch.eye(channels, dtype=first.dtype, device=first.device)
    bias = projection(unit.new_zeros(1, channels))
    return (projection(unit) - bias).T, bias[0]
