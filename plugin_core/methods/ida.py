"""Interventional dual attention, IDA (Liu et al., ICLR 2023, openreview 8XqDnrmZQNF).

For x of shape (B, C, H, W), cut along its channels into N heads x_n of D = C / N, with weights w_nk
of each head n for each class k, and positions p::

    s_nk(p) = <w_nk, x_n(p)> / (|w_nk| + beta)      score
    E_nk    = sum_p softmax_p(s_nk) x_n(p)          first attention: over positions, for each class
    Ê_nk                                            second attention: over a class's N samples E_nk
    l_k     = sum_n <Ê_nk, w_nk> / (|w_nk| + beta)  logit

The heads of a class are samples of it, and attending over them averages over the contexts that the
class was seen in, instead of trusting one that occurs often. The light form attends once; the heavy
one has two transformer layers and a projection of all samples.

The authors' code is not public. A public reproduction
(https://github.com/yu-gi-oh-leilei/IDA_2023ICLR) departs from these formulas in up to two places.
It reads the (D, N) values of a class as N rows of D, so that each row of the second attention is
made of pieces of all heads, and Ê comes back in this order. Its earlier version
(``lib_new_attention``) also divides every head's part of l_k by ``|w_Nk| + beta``, the norm of the
last head. Its checkpoints load here under the same names and need the same places:
``sample_order="interleaved"``, and for the earlier version ``last_head_norm=True``.

In the middle of a network nothing is decided. There the classes are K learned queries, and what
they gathered is handed back to the positions that asked for it::

    y_n(p) = sum_k softmax_k(s_nk(p)) Ê_nk,   out = x + P y

P scales each channel, or projects the channels of a head or all of them, with a bias. With the warm
start of :class:`plugin_core.BlockPlugin` the sum is x + alpha * P y, alpha = 0 at first. This
second form is ours, so it has the order of the formulas alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core.block_plugins import register_block_plugin
from plugin_core.errors import (
    ArgumentError,
    StateDictError,
    check_bool,
    check_one_of,
    check_positive_int,
)
from plugin_core.kernels import has_hooks
from plugin_core.kernels.precision import in_float32

SAMPLE_ORDERS = ("heads", "interleaved")
PROJECTIONS = ("scale", "grouped", "full")


class _DualAttention(nn.Module):
    """Both attentions, which the classifier and the block share.

    Parameters are named as in the public reproduction.
    """

    sample_order = "heads"  # the block's

    def __init__(
        self, in_channels: int, num_classes: int, num_heads: int, beta: float, heavy: bool
    ) -> None:
        super().__init__()
        check_positive_int(in_channels=in_channels, num_heads=num_heads)
        if not isinstance(beta, (int, float)) or not beta > 0:
            raise ArgumentError("beta", f"must be positive, got {beta!r}")
        check_bool(heavy=heavy)
        if in_channels % num_heads:
            raise ArgumentError(
                "num_heads", f"must divide the {in_channels} channels, got {num_heads}"
            )
        channels = in_channels // num_heads
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_heads = num_heads
        self.beta = beta
        self.head = nn.ModuleList(
            nn.Conv2d(channels, num_classes, 1, bias=False) for _ in range(num_heads)
        )
        self.att_layers = _SampleAttention(channels, heavy)
        self.out_proj = nn.Linear(in_channels, in_channels) if heavy else None

    def _class_weights(self, last_head_norm: bool = False) -> Tensor:
        """w_nk / (|w_nk| + beta), or w_nk / (|w_Nk| + beta), of shape (N, K, D)."""
        weights = in_float32(
            torch.stack([conv.get_parameter("weight").flatten(1) for conv in self.head])
        )
        norms = torch.linalg.vector_norm(weights, dim=2, keepdim=True)
        return weights / ((norms[-1:] if last_head_norm else norms) + self.beta)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__} takes an input (B, {self.in_channels}, H, W), got "
                f"{tuple(x.shape)}"
            )

    def _attend(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and spatial attention (B, N, K, H·W), and the samples Ê (B, N, K, D)."""
        # In channels_last each product would copy them anew.
        heads = x.contiguous().flatten(2).unflatten(1, (self.num_heads, -1))  # (B, N, D, H·W)
        scores = weights.to(x.dtype).expand(len(x), -1, -1, -1) @ heads
        attention = _softmax(scores, dim=3)
        # In this order gradients arrive as the features lie in memory.
        samples = (heads @ attention.to(x.dtype).transpose(2, 3)).permute(0, 3, 1, 2)
        batch, classes, samples_of_class, channels = samples.shape
        if self.sample_order == "interleaved":
            samples = samples.transpose(2, 3)
        attended = self.att_layers(samples.reshape(batch * classes, samples_of_class, channels))
        if self.out_proj is not None:
            attended = self.out_proj(attended.flatten(1))
        attended = attended.reshape(batch, classes, samples_of_class, channels).transpose(1, 2)
        return scores, attention, attended

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, num_classes={self.num_classes}, "
            f"num_heads={self.num_heads}, beta={self.beta:g}, heavy={self.out_proj is not None}"
        )


class _Mixer(nn.Module):
    """Mixes first the positions of each channel, then the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positions = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.channels = nn.Conv2d(channels, channels, 1)
        nn.init.kaiming_normal_(self.channels.weight, nonlinearity="relu")
        nn.init.zeros_(self.channels.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.channels(x + self.positions(x)))


class IDAClassifier(_DualAttention):
    """Classifies a feature map by what each class attends to in it.

    Args:
        in_channels: C.
        num_classes: K.
        num_heads: N, by which C can be divided.
        beta: added to the norm of a class's weights, > 0.
        heavy: attend over the samples with two transformer layers and a projection.
        sample_order: "heads" takes a head as a sample, as in the paper; "interleaved" reads (D, N)
            as (N, D), as the public reproduction does.
        last_head_norm: divide all heads' parts of a logit by the last head's norm, as an earlier
            version of the reproduction does.
        num_mixers: number of layers before the attention, which mix the positions of each channel,
            by a 7×7 kernel with a shortcut, then the channels of each position: ConvMixer's
            (Trockman and Kolter, arXiv:2201.09792, section 2) without norms, with one ReLU in the
            place of two GELUs. Attention alone does not see where in the map something lies, which
            tells how well a region's box fits.

    Checkpoints of the reproduction load either way, but have their own logits only with its order.

    Shape: (B, C, H, W) → (B, K); B may be 0. Memory grows with B·K·(N·H·W + C), and with
    B·K·N·2048 if heavy: with many regions and classes that is what counts.

    Raises:
        ArgumentError: if an argument is out of its range, or ``num_heads`` does not divide
            ``in_channels``.
        ValueError: if the input is of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_heads: int = 4,
        beta: float = 1 / 32,
        heavy: bool = False,
        sample_order: str = "heads",
        last_head_norm: bool = False,
        num_mixers: int = 0,
    ) -> None:
        check_positive_int(num_classes=num_classes)
        if type(num_mixers) is not int or num_mixers < 0:
            raise ArgumentError(
                "num_mixers", f"must be 0 or a positive integer, got {num_mixers!r}"
            )
        check_one_of("sample_order", sample_order, SAMPLE_ORDERS)
        check_bool(last_head_norm=last_head_norm)
        super().__init__(in_channels, num_classes, num_heads, beta, heavy)
        self.sample_order = sample_order
        self.last_head_norm = last_head_norm
        self.mixers = nn.Sequential(*(_Mixer(in_channels) for _ in range(num_mixers)))

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, and where it is asked for the spatial attention (B, N, K, H, W)."""
        self._check_input(x)
        weights = self._class_weights()
        _, attention, attended = self._attend(self.mixers(x), weights)
        if self.last_head_norm:
            weights = self._class_weights(last_head_norm=True)
        logits = torch.einsum("bnkd,nkd->bk", attended, weights.to(attended.dtype))
        if return_attention:
            return logits, attention.unflatten(3, x.shape[2:])
        return logits

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        if any(name.startswith("fcs.") for name in given):
            raise StateDictError(
                f"{prefix}fcs: this state dict was trained with linear layers before the attention "
                "(NUM_FC, num_cls_fcs), which version 0.2.0 has and later ones have not"
            )
        mixers = sum(re.fullmatch(r"mixers\.\d+\.channels\.weight", n) is not None for n in given)
        if "head.0.weight" in given and mixers != len(self.mixers):
            raise StateDictError(
                f"{prefix}mixers: this state dict was trained with {mixers} mixers before the "
                f"attention, and the module was built with {len(self.mixers)}; build it with "
                f"{mixers} (num_mixers)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        order = f"sample_order={self.sample_order!r}, last_head_norm={self.last_head_norm}"
        return f"{super().extra_repr()}, {order}"


@register_block_plugin("ida")
class IDABlock(_DualAttention):
    """Adds to each position what the learned queries that it resembles have gathered.

    Args:
        channels: C.
        num_queries: K.
        num_heads: N, by which C can be divided. The light form has 4 (C / N)² weights of the second
            attention: many heads make it lean.
        beta: added to the norm of a query, > 0.
        heavy: attend over the samples with two transformer layers and a projection.
        projection: P: "scale" has one weight a channel and starts as the identity, "grouped"
            projects the C / N channels of each head, "full" all C.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype; B may be 0. Memory grows with N·K·H·W.

    Raises:
        ArgumentError: if an argument is out of its range, or ``num_heads`` does not divide C.
        ValueError: if the input is of another shape.
    """

    # What a stage has gathered is at its end, and every further block costs as much again.
    default_blocks = "last"
    # The learnable scalar had its own name before it became every block plugin's.
    published_names: Mapping[str, str] = MappingProxyType({"gamma": "alpha"})

    def __init__(
        self,
        channels: int,
        num_queries: int = 80,
        num_heads: int = 16,
        beta: float = 1 / 32,
        heavy: bool = False,
        projection: str = "scale",
    ) -> None:
        check_positive_int(num_queries=num_queries)
        check_one_of("projection", projection, PROJECTIONS)
        super().__init__(channels, num_queries, num_heads, beta, heavy)
        groups = {"scale": channels, "grouped": num_heads, "full": 1}[projection]
        self.proj = nn.Conv2d(channels, channels, 1, groups=groups)
        if projection == "scale":
            nn.init.ones_(self.proj.weight)
            nn.init.zeros_(self.proj.get_parameter("bias"))

    def forward(self, x: Tensor, warm_start: Tensor | None = None) -> Tensor:
        """Add P y to x, or with a scalar alpha alpha * P y."""
        self._check_input(x)
        scores, _, attended = self._attend(x, self._class_weights())
        share = _softmax(scores, dim=2).to(attended.dtype)
        return x + self._hand_back(attended, share, x, warm_start).to(x.dtype)

    @staticmethod
    def arguments_in(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """The constructor's arguments that a state dict tells."""
        num_heads = sum(name.startswith("head.") for name in state_dict)
        channels, of_group = state_dict["proj.weight"].shape[:2]
        groups = channels // of_group
        return {
            "num_queries": len(state_dict["head.0.weight"]),
            "num_heads": num_heads,
            "heavy": "out_proj.weight" in state_dict,
            "projection": {1: "full", channels: "scale"}.get(groups, "grouped"),
        }

    def spatial_attention(self, x: Tensor) -> Tensor:
        """Where the queries of each head attend in x (B, C, H, W): (B, N, K, H, W)."""
        _, attention, _ = self._attend(x, self._class_weights())
        return attention.unflatten(3, x.shape[2:])

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """The spatial attention of each query, mean over the heads: (B, H, W)."""
        attention = self.spatial_attention(x).mean(1)
        return {f"query {k}": attention[:, k] for k in range(self.num_classes)}

    def _hand_back(
        self, attended: Tensor, share: Tensor, x: Tensor, alpha: Tensor | None
    ) -> Tensor:
        """Give alpha * P y, in the shape of x.

        P is linear, so instead of the H·W positions it can be applied to the samples Ê, before they
        are handed back: that is less to do where there are more positions than queries, for a full
        projection many more. The shares of a head add up to 1, so the samples bring the bias.
        """
        batch, heads, queries, channels = attended.shape
        positions = share.shape[3]
        width = self.in_channels // self.proj.groups  # channels that P mixes
        copies = heads if width > channels else 1  # of all channels, as a full P mixes the heads
        of_samples = queries * self.in_channels * (width + copies * positions)
        of_positions = positions * self.in_channels * (width + queries)
        # What traces a model to count its work hooks every module, and wants it as it is.
        is_hooked = has_hooks(self.proj) and not torch.jit.is_tracing()
        if of_samples >= of_positions or type(self.proj) is not nn.Conv2d or is_hooked:
            gathered = attended.mT @ share
            handed = self.proj(gathered.reshape(x.shape))
            return handed if alpha is None else alpha * handed
        bias: Tensor = self.proj.get_parameter("bias")
        if alpha is not None:  # the samples are the smallest tensor on the way
            attended, bias = alpha * attended, alpha * bias
        if copies == 1:
            weight = self.proj.weight.to(attended.dtype)
            if width == 1:
                attended = attended * weight.view(heads, 1, channels)
            else:
                attended = attended @ weight.view(heads, channels, channels).mT
            attended = (attended + bias.view(heads, 1, channels)).to(share.dtype)
            return (attended.mT @ share).reshape(x.shape)
        weight = self.proj.weight.flatten(1).unflatten(1, (heads, channels)).transpose(0, 1)
        samples = weight.to(attended.dtype) @ attended.transpose(0, 1).flatten(1, 2).mT
        samples = samples.unflatten(2, (batch, queries)).permute(2, 1, 0, 3).flatten(2)
        # Each of the N samples that a position gets brings a part of the bias.
        samples = (samples + bias[:, None] / heads).to(share.dtype)  # (B, C, N·K)
        share = share.flatten(1, 2)  # (B, N·K, H·W)
        # y comes to lie in memory as x does.
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            y = (share.mT @ samples.mT).mT
        else:
            y = samples @ share
        return y.unflatten(2, x.shape[2:])


class _SampleAttention(nn.Module):
    """The second attention, over the N samples of a class: (B·K, N, D) → (B·K, N, D)."""

    def __init__(self, channels: int, heavy: bool) -> None:
        super().__init__()
        layers = [_HeavyLayer(channels), _HeavyLayer(channels)] if heavy else [_Layer(channels)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.att = _SelfAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.att(x)


class _HeavyLayer(_Layer):
    """A post-norm transformer layer."""

    def __init__(self, channels: int, feedforward_channels: int = 2048) -> None:
        super().__init__(channels)
        self.linear1 = nn.Linear(channels, feedforward_channels)
        self.linear2 = nn.Linear(feedforward_channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(super().forward(x))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class _SelfAttention(nn.Module):
    """One head of attention, with the scale 1 / sqrt(D)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).transpose(1, 2) / x.shape[2] ** 0.5
        value = self.v_proj(x)
        return self.out_proj(in_float32(scores).softmax(dim=2).to(value.dtype) @ value)


def _softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax in float32, whose least values are no denormal numbers: CPUs are slow with those."""
    scores = in_float32(scores)
    least = scores.detach().amax(dim, keepdim=True) - 60  # e^-60 of the largest adds nothing
    return scores.maximum(least).softmax(dim)
