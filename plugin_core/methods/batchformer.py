"""BatchFormer (Hou et al., CVPR 2022, arXiv:2203.01522) and V2 (arXiv:2204.01254), section 3 each.

A post-norm transformer encoder layer whose sequence is the batch. With B images of L positions and
C channels, position p of an image attends to position p of all B images, and all positions share
the layer's weights. So the network learns from how samples relate.

V2 takes the positions of a feature map. V1 takes M pooled features as M samples of one position:
(M, 1, C).

In training the output is a second stream beside the input, with the same heads and targets. In
evaluation the network works without it. The frameworks' plugins make the two streams.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from plugin_core.errors import ArgumentError, check_bool, check_positive_int


class BatchFormer(nn.Module):
    """Let every position attend to the same position of the batch's other samples.

    It loads state dicts of :class:`torch.nn.TransformerEncoderLayer`, and with several layers those
    of :class:`torch.nn.TransformerEncoder`. It can be differentiated twice.

    Args:
        embed_dims: C.
        num_heads: of the attention, a divisor of C; 4 in the papers.
        feedforward_channels: width of the feed-forward network; None for C, as in the papers.
        dropout: rate in [0, 1), in the attention and after each part; 0.5 in the papers.
        num_layers: layers one after the other; 1 in the papers.
        gather: in distributed training, attend to the samples of all processes and send gradients
            back to them. All processes must call the module equally often. They may have different
            numbers of samples and positions.

    Shape: (B, L, C) → (B, L, C). B = 1 leaves nothing to relate; the first such batch is warned of.

    Raises:
        ArgumentError: if an argument is out of its range, or ``num_heads`` does not divide
            ``embed_dims``.
        ValueError: if an input has another shape.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int = 4,
        feedforward_channels: int | None = None,
        dropout: float = 0.5,
        num_layers: int = 1,
        gather: bool = False,
    ) -> None:
        super().__init__()
        if feedforward_channels is None:
            feedforward_channels = embed_dims
        check_positive_int(
            embed_dims=embed_dims,
            num_heads=num_heads,
            feedforward_channels=feedforward_channels,
            num_layers=num_layers,
        )
        if embed_dims % num_heads:
            raise ArgumentError(
                "num_heads",
                f"must divide embed_dims, got num_heads={num_heads} and embed_dims={embed_dims}",
            )
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ArgumentError("dropout", f"must be in [0, 1), got {dropout!r}")
        check_bool(gather=gather)
        self.embed_dims = embed_dims
        self.gather = gather
        self.layers = nn.ModuleList(
            _Layer(embed_dims, num_heads, feedforward_channels, dropout) for _ in range(num_layers)
        )
        self._has_warned = False

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        spatial_shapes: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend over the batch.

        Args:
            x: (B, L, C).
            key_padding_mask: (B, L), True for padding, which is no key. Where all samples are
                padding, all are keys.
            spatial_shapes: (H, W) of each level of the feature maps, whose cells row by row are the
                L positions; None for a single row. With ``gather`` it matches the positions of maps
                of different sizes. A process gives no key for cells that its maps lack.

        Raises:
            ValueError: if a shape does not fit.
        """
        if x.dim() != 3 or x.shape[2] != self.embed_dims:
            raise ValueError(
                f"BatchFormer takes an input (B, L, {self.embed_dims}), got {tuple(x.shape)}"
            )
        if key_padding_mask is not None and key_padding_mask.shape != x.shape[:2]:
            raise ValueError(
                f"key_padding_mask must be of the input's shape (B, L) = {tuple(x.shape[:2])}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        if spatial_shapes is None:
            spatial_shapes = [(1, x.shape[1])]
        if sum(height * width for height, width in spatial_shapes) != x.shape[1]:
            raise ValueError(
                f"spatial_shapes must have the input's {x.shape[1]} positions together, "
                f"got {list(spatial_shapes)}"
            )
        peers = None
        if self.gather and self.training and _num_processes() > 1:
            peers = _Peers(x, key_padding_mask, spatial_shapes)
            key_padding_mask = peers.key_padding_mask
        if self.training and x.shape[0] == 1 and peers is None:
            self._warn()
        is_key = None if key_padding_mask is None else _where_to_attend(key_padding_mask)
        for layer in self.layers:
            x = layer(x, is_key, peers)
        return x

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor does."""
        for module in reversed(list(self.modules())):  # an attention after its output projection
            for name in ("reset_parameters", "_reset_parameters"):
                if module is not self and hasattr(module, name):
                    getattr(module, name)()

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "BatchFormer: the batch is a single sample, so there are no relations between "
                "samples to learn; raise the batch size of each process to at least 2, or set "
                "gather=True in a distributed run",
                stacklevel=3,
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if not name.startswith("layers."):  # a single layer's state dict
                state_dict[f"{prefix}layers.0.{name}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Layer(nn.TransformerEncoderLayer):
    """PyTorch's layer and parameters, attending over the first axis of (B, L, C)."""

    def forward(  # type: ignore[override]
        self, x: Tensor, is_key: Tensor | None, peers: _Peers | None
    ) -> Tensor:
        x = self.norm1(x + self.dropout1(self._attend(x, is_key, peers)))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout2(y))

    def _attend(self, x: Tensor, is_key: Tensor | None, peers: _Peers | None) -> Tensor:
        attention = self.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        q, kv = qkv.split([x.shape[2], 2 * x.shape[2]], dim=2)
        if peers is not None:
            kv = peers.gather(kv)
        k, v = kv.chunk(2, dim=2)
        heads = (attention.num_heads, -1)
        # (B, L, C) → (L, heads, B, D)
        q, k, v = (part.unflatten(2, heads).permute(1, 2, 0, 3) for part in (q, k, v))
        # PyTorch's fused attention has no second derivative. It is slower, too, as a batch is a
        # short sequence.
        scores = (q * q.shape[3] ** -0.5) @ k.mT
        if is_key is not None:
            scores = scores.masked_fill(~is_key, -torch.inf)
        weights = F.dropout(scores.softmax(3), attention.dropout, self.training)
        return attention.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))


def _where_to_attend(key_padding_mask: Tensor) -> Tensor:
    """(B, L) → (L, 1, 1, B), True for keys."""
    is_key = ~key_padding_mask
    # Without any key the softmax, and with it all gradients of the weights, would be NaN.
    is_key = is_key | ~is_key.any(dim=0)
    return is_key.T[:, None, None]


class _Peers:
    """The batches of all processes as one batch with the positions of this process.

    Args:
        x: (B, L, C) of this process.
        key_padding_mask: (B, L) of this process.
        spatial_shapes: (H, W) of the levels of its L positions.

    Attributes:
        key_padding_mask: (sum of all B, L), True also for cells that a process lacks.
    """

    def __init__(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> None:
        self._shapes = [(int(height), int(width)) for height, width in spatial_shapes]
        here = torch.tensor([len(x), *sum(self._shapes, ())], device=x.device)
        sizes = [torch.empty_like(here) for _ in range(_num_processes())]
        distributed.all_gather(sizes, here)
        # B and the (H, W) of the levels, process by process
        self._peers = [
            (batch, list(zip(rest[::2], rest[1::2], strict=True)))
            for batch, *rest in (size.tolist() for size in sizes)
        ]
        self._max_batch = max(batch for batch, _ in self._peers)
        self._max_length = max(sum(h * w for h, w in shapes) for _, shapes in self._peers)
        if key_padding_mask is None:
            key_padding_mask = x.new_zeros(x.shape[:2], dtype=torch.bool)
        # Gloo cannot gather booleans.
        is_token = self.gather((~key_padding_mask).unsqueeze(2).to(torch.uint8))
        self.key_padding_mask = is_token.squeeze(2) == 0

    def gather(self, tokens: Tensor) -> Tensor:
        """(B, L, C) of every process → (sum of all B, L, C), zeros for cells that one lacks."""
        batch, length = tokens.shape[:2]
        missing = (self._max_length - length, self._max_batch - batch)
        gathered = _AllGather.apply(F.pad(tokens, (0, 0, 0, missing[0], 0, missing[1])))
        return torch.cat(
            [
                self._as_here(part[:peers_batch], shapes)
                for part, (peers_batch, shapes) in zip(gathered, self._peers, strict=True)
            ]
        )

    def _as_here(self, tokens: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Crop and pad the maps of another process to the sizes of this one."""
        if shapes == self._shapes:
            return tokens[:, : sum(height * width for height, width in shapes)]
        levels, first = [], 0
        for (height, width), (own_height, own_width) in zip(shapes, self._shapes, strict=True):
            level = tokens[:, first : first + height * width].unflatten(1, (height, width))
            crop = (0, 0, 0, own_width - width, 0, own_height - height)
            levels.append(F.pad(level, crop).flatten(1, 2))
            first += height * width
        return torch.cat(levels, dim=1)


class _AllGather(torch.autograd.Function):
    """Give every process the tensors of all; gradients return to where the tensors came from.

    ``torch.distributed.nn.functional.all_gather`` needs an all-to-all to go back. Gloo lacks it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(x) for _ in range(_num_processes())]
        distributed.all_gather(parts, x.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _ReduceScatter.apply(*grads)


class _ReduceScatter(torch.autograd.Function):
    """Sum over the processes, and keep the part of this process: the adjoint of ``_AllGather``."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        total = torch.stack(parts)
        distributed.all_reduce(total)
        return total[distributed.get_rank()]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllGather.apply(grad)


def _num_processes() -> int:
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()
