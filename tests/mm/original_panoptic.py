"""The original DETR with its mask head, small, with its parameters' names, losses and segments.

Written from the paper (arXiv:2005.12872, section 4.4) on ``original_detr``, for all queries.
"""

from __future__ import annotations

import numpy as np
import original_detr as original
import torch
import torch.nn.functional as F
from original_detr import HEADS, resized, tokens
from PIL import Image
from torch import Tensor, nn

WIDTH = 128  # the narrowest whose group norms have whole groups
IDS_OF_STUFF = [
    *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147),
    *(148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181),
    *range(184, 201),
]


class BoxAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_linear, self.k_linear = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """(B, Q, C), (B, L, C), (B, L) → (B, Q, heads, L)"""
        q = self.q_linear(query).unflatten(2, (HEADS, -1))
        k = self.k_linear(memory).unflatten(2, (HEADS, -1))
        scores = torch.einsum("bqhd,blhd->bqhl", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        e = scores.exp()
        return e / e.sum(dim=(2, 3), keepdim=True)


class MaskHead(nn.Module):
    def __init__(self, width: int, fpn: tuple[int, int, int]) -> None:
        super().__init__()
        widths = [width + HEADS, width + HEADS, width // 2, width // 4, width // 8, width // 16]
        for i in range(1, 6):
            self.add_module(f"lay{i}", nn.Conv2d(widths[i - 1], widths[i], 3, padding=1))
            self.add_module(f"gn{i}", nn.GroupNorm(8, widths[i]))
        self.out_lay = nn.Conv2d(widths[5], 1, 3, padding=1)
        for i in range(1, 4):
            self.add_module(f"adapter{i}", nn.Conv2d(fpn[i - 1], widths[i + 1], 1))

    def block(self, x: Tensor, i: int) -> Tensor:
        return self.get_submodule(f"gn{i}")(self.get_submodule(f"lay{i}")(x)).relu()

    def forward(self, x: Tensor, attention: Tensor, maps: list[Tensor]) -> Tensor:
        queries = attention.shape[1]
        x = torch.cat([x.repeat_interleave(queries, 0), attention.flatten(0, 1)], dim=1)
        x = self.block(self.block(x, 1), 2)
        for i, level in enumerate(maps, 1):
            lateral = self.get_submodule(f"adapter{i}")(level).repeat_interleave(queries, 0)
            rows = torch.arange(lateral.shape[2]) * x.shape[2] // lateral.shape[2]
            columns = torch.arange(lateral.shape[3]) * x.shape[3] // lateral.shape[3]
            x = self.block(lateral + x[:, :, rows][:, :, :, columns], i + 2)
        return self.out_lay(x).unflatten(0, (-1, queries))[:, :, 0]


class DETRsegm(nn.Module):
    """``insert_idx`` of one BatchFormer, which works in evaluation on one stream."""

    def __init__(self, num_outputs: int = 251, insert_idx: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.detr = original.DETR(num_outputs, WIDTH, insert_idx)
        self.detr.backbone = nn.Sequential(original.Body(4))
        self.bbox_attention = BoxAttention(WIDTH)
        self.mask_head = MaskHead(WIDTH, (256, 128, 64))
        original.randomize(self)
        self.balance()

    @torch.no_grad()
    def balance(self) -> None:
        """Let masks depend on queries, whose part in random weights is next to nothing."""
        head = self.mask_head
        projections = (head.adapter3, head.adapter2, head.adapter1, self.detr.input_proj)
        maps = self.detr.backbone[0](torch.randn(1, 3, 64, 64))
        for projection, level in zip(projections, maps, strict=True):
            projection.weight /= level.std() * (1 if projection is self.detr.input_proj else 10)
        self.detr.query_embed.weight *= 5
        head.lay1.weight[:, -HEADS:] *= 1000

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, Q, K), boxes (B, Q, 4) and masks' logits (B, Q, h, w)."""
        net = self.detr
        maps = net.backbone[0](images)
        x = net.input_proj(maps[-1])
        mask = resized(mask, x)
        position = original.position_of(mask, x.shape[1], offset=0)
        memory = net.transformer.encoder(tokens(x), position, mask.flatten(1))
        query = net.query_embed.weight.expand(len(x), -1, -1)
        hidden, _ = net.decode(memory, query, position, mask.flatten(1))
        attention = self.bbox_attention(hidden, memory, mask.flatten(1))
        attention = attention.unflatten(3, x.shape[-2:])
        masks = self.mask_head(x, attention, maps[2::-1])
        return net.class_embed(hidden), net.bbox_embed(hidden).sigmoid(), masks


def mask_losses(masks: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Focal and dice loss of N masks' logits (N, h, w) against (N, H, W) of 0 and 1."""
    masks = F.interpolate(masks[None], truth.shape[-2:], mode="bilinear")[0].flatten(1)
    truth = truth.flatten(1).float()
    p = masks.sigmoid()
    of_truth = torch.where(truth > 0, p, 1 - p)
    focal = -torch.where(truth > 0, 0.25, 0.75) * (1 - of_truth) ** 2 * of_truth.log()
    dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
    return {"loss_mask": focal.mean(1).sum() / len(truth), "loss_dice": dice.sum() / len(truth)}


def segments_of(
    logits: Tensor, masks: Tensor, processed: tuple[int, int], size: tuple[int, int]
) -> list[tuple[int, np.ndarray]]:
    """Category ids and pixels (size) of an unpadded image's segments.

    Args:
        logits: (Q, K).
        masks: (Q, h, w).
        processed: height and width that the detector saw.
        size: of the result.
    """
    scores, labels = logits.softmax(-1).max(-1)
    keep = (labels != logits.shape[-1] - 1) & (scores > 0.85)
    labels = labels[keep].tolist()
    masks = F.interpolate(masks[keep][None], processed, mode="bilinear")[0].softmax(0).numpy()
    merge, owner = True, np.zeros(processed, int)
    while labels:
        owner = masks.argmax(0)
        for i, label in enumerate(labels):
            if merge and label > 90:
                owner[owner == i] = labels.index(label)
        owner = np.asarray(Image.fromarray(owner.astype(np.uint8)).resize(size[::-1], 0))
        small = [i for i in range(len(labels)) if (owner == i).sum() <= 4]
        if not small:
            break
        masks = np.delete(masks, small, axis=0)
        labels = [label for i, label in enumerate(labels) if i not in small]
        merge = False
    return [(label, owner == i) for i, label in enumerate(labels)]
