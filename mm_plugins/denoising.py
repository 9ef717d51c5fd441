"""Decodes a DINO's matching queries apart from its denoising ones.

Matching queries see no denoising query (DINO, ICLR 2023, arXiv:2203.03605, section 3.3). So no
score depends on a denoising query, but where both are rows of one tensor, zeros are differentiated
for them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.dense_heads import DINOHead, GroundingDINOHead
from mmdet.models.layers import DinoTransformerDecoder
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from torch import Tensor, nn

from plugin_core.stand_ins import acting_as

Outputs = dict[str, Any]


def has_denoising_queries(detector: Any) -> bool:
    """Tell whether :func:`decode_apart` knows the detector's decoder, and its head's scores."""
    decoder: Any = getattr(detector, "decoder", None)
    return (
        type(decoder) in (DinoTransformerDecoder, GroundingDinoTransformerDecoder)
        and type(detector.bbox_head) in (DINOHead, GroundingDINOHead)
        and all(type(layer.self_attn) is MultiheadAttention for layer in decoder.layers)
    )


def decode_apart(
    decode: Callable[..., Outputs], decoder: Any, inputs: dict[str, Any], matching: int
) -> tuple[Outputs, Tensor]:
    """Decode the matching queries, and then the denoising ones, which see both.

    Args:
        decode: MMDetection's ``forward_decoder`` of the detector.
        decoder: that it calls.
        inputs: of ``decode``, for all queries, the denoising ones first.
        matching: number of matching queries.

    Returns:
        What ``decode`` returns for all queries, and the matching queries' last hidden states
        (B, queries, C), which are in a graph without the others.
    """
    count = inputs["query"].shape[1] - matching

    def part(rows: slice, mask: Tensor | None) -> dict[str, Any]:
        own = {name: inputs[name][:, rows] for name in ("query", "reference_points")}
        return {**inputs, **own, "dn_mask": mask}

    with ExitStack() as stack:
        for layer in decoder.layers:
            stack.enter_context(acting_as(_Seen, layer.self_attn, seen=[]))
            values = layer.cross_attn.value_proj
            if type(values) is nn.Linear:
                stack.enter_context(acting_as(_Once, values, output=[]))
        found = decode(**part(slice(count, None), None))
        denoising = decode(**part(slice(count), inputs["dn_mask"][:count]))
    both = (denoising, found)
    joined = {
        "hidden_states": torch.cat([x["hidden_states"] for x in both], dim=2),
        "references": [
            torch.cat(pair, dim=1) for pair in zip(*(x["references"] for x in both), strict=True)
        ],
    }
    return joined, found["hidden_states"][-1]


class _Seen(MultiheadAttention):
    """Keeps the queries of its first call; those of its second see them, too."""

    seen: list[tuple[Tensor, Tensor]]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        if self.seen:
            keys, places = self.seen.pop()
            key = value = torch.cat((key, keys), dim=1)
            others["key_pos"] = torch.cat((others["key_pos"], places), dim=1)
        else:
            self.seen.append((key, others["key_pos"]))
        attended: Tensor = super().forward(query, key, value, **others)
        return attended


class _Once(nn.Linear):
    """Projects the values of both calls once, as they are the same."""

    output: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if not self.output:
            self.output.append(super().forward(x))
        return self.output[0]
