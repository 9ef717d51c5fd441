"""The methods as in their papers, to compare their speed with plugin_core's.

They take the state dicts of plugin_core's modules and compute the same, step by step.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from plugin_core import IDABlock


class TextbookTripletAttention(nn.Module):
    """Triplet attention (arXiv:2010.03045, figure 3): rotate, gate and rotate back, three times."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.cw = _Branch(kernel_size)
        self.hc = _Branch(kernel_size)
        self.hw = _Branch(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        cw = self.cw(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3).contiguous()
        hc = self.hc(x.permute(0, 3, 2, 1).contiguous()).permute(0, 3, 2, 1).contiguous()
        return (self.hw(x) + cw + hc) / 3


class _Branch(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False),
                bn=nn.BatchNorm2d(1, eps=1e-5, momentum=0.01),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.max(1, keepdim=True).values, x.mean(1, keepdim=True)), 1)
        return x * torch.sigmoid(self.conv(pooled))


class TextbookIDABlock(IDABlock):
    """IDA's block with every step at every position, also the projection."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.flatten(2).unflatten(1, (self.num_heads, -1))  # (B, N, D, H·W)
        weights = torch.stack([conv.weight.flatten(1) for conv in self.head])  # (N, K, D)
        weights = weights / (weights.norm(dim=2, keepdim=True) + self.beta)
        scores = torch.einsum("nkd,bndp->bnkp", weights, heads)
        samples = torch.einsum("bnkp,bndp->bknd", scores.softmax(dim=3), heads)
        attended = self.att_layers(samples.flatten(0, 1))  # over the N samples of a class
        if self.out_proj is not None:
            attended = self.out_proj(attended.flatten(1))
        attended = attended.reshape(samples.shape)
        gathered = torch.einsum("bnkp,bknd->bndp", scores.softmax(dim=2), attended)
        return x + self.proj(gathered.reshape(x.shape))
