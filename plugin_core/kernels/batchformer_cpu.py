"""BatchFormer's transformer layer on a CPU, by batchformer.c between PyTorch's matrix products.

What is apart in PyTorch's layer is one pass over memory here: attention reads the projections
where they lie, and biases, dropout, shortcut and norm are taken together. Dropout keeps no masks;
its seed is drawn from PyTorch's generator, so that it is as reproducible as PyTorch's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plugin_core.kernels import choice, has_hooks, is_autocast_on_cpu, is_plain_tensor
from plugin_core.kernels.library import library, pointer

_SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}
# As in the C code
_MAX_SAMPLES = 64
_MAX_SAMPLES_BY_CHANNELS = 8192

_Integer = ctypes.c_int64


def layer_function(
    layer: nn.TransformerEncoderLayer, x: Tensor
) -> Callable[[Tensor | None], Tensor] | None:
    """The post-norm ReLU layer over the batch of x (B, L, C), as a function of the keys.

    Args:
        layer: as PyTorch makes it.
        x: (B, L, C).

    Returns:
        A function of ``is_key`` (L, B), True for keys, or None for all; or None where the plain
        formula is to be used.

    Raises:
        RuntimeError: if ``PLUGIN_KERNELS=fast`` and the compiled code is missing.
        ValueError: if ``PLUGIN_KERNELS`` has an unknown value.
    """
    if choice() == "plain" or not is_plain_tensor(x) or x.device.type != "cpu" or not x.numel():
        return None
    batch, _, channels = x.shape
    fits = (
        x.dtype in _SUFFIXES
        and not is_autocast_on_cpu()
        and batch <= _MAX_SAMPLES
        and batch * channels // layer.self_attn.num_heads <= _MAX_SAMPLES_BY_CHANNELS
        and all(_is_untouched(module, x.dtype) for module in layer.modules() if module is not layer)
    )
    functions = library() if fits else None
    if functions is None:
        return None
    attention = layer.self_attn
    parameters = (
        *(attention.in_proj_weight, attention.in_proj_bias),
        *(attention.out_proj.weight, attention.out_proj.bias),
        *(layer.norm1.weight, layer.norm1.bias),
        *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias),
        *(layer.norm2.weight, layer.norm2.bias),
    )
    dropouts = (layer.dropout1, layer.dropout, layer.dropout2)
    rates = [dropout.p if dropout.training else 0.0 for dropout in dropouts]
    drops = [_Dropout.draw(r) for r in (attention.dropout if layer.training else 0.0, *rates)]
    epsilons = (layer.norm1.eps, layer.norm2.eps)
    code = _Code(functions, _SUFFIXES[x.dtype], attention.num_heads)

    def run(is_key: Tensor | None) -> Tensor:
        if is_key is not None:
            is_key = is_key.to(torch.uint8).contiguous()
        return _Layer.apply(code, drops, epsilons, is_key, x, *parameters)

    return run


def _is_untouched(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a part of the layer is PyTorch's own, with nothing that has to see it run."""
    own = isinstance(module, (nn.Linear, nn.LayerNorm, nn.Dropout, nn.MultiheadAttention))
    return (
        own
        and type(module).__module__.startswith("torch.nn.modules.")
        and not has_hooks(module)
        and all(parameter.dtype is dtype for parameter in module.parameters())
    )


class _Dropout(ctypes.Structure):
    _fields_ = [
        ("threshold", ctypes.c_int32),
        ("scale", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    ]

    @staticmethod
    def draw(rate: float) -> _Dropout:
        if not rate:
            return _Dropout(0, 1.0, 0)
        seed = int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))
        scale = 1 / (1 - rate) if rate < 1 else 0.0
        return _Dropout(max(1, min(2**31 - 1, round(rate * 2**31))), scale, seed)


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "heads", "channels")]


class _Code:
    """The C functions for one type of elements."""

    def __init__(self, functions: ctypes.CDLL, suffix: str, num_heads: int) -> None:
        self._functions = functions
        self._suffix = suffix
        self._num_heads = num_heads

    def attend(
        self, qkv: Tensor, bias: Tensor, is_key: Tensor | None, dropout: _Dropout, shape: Any
    ) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        self._call("attend", qkv, bias, is_key, out, self._shape(shape), dropout)
        return out

    def attend_backward(
        self,
        g: Tensor,
        qkv: Tensor,
        bias: Tensor,
        is_key: Tensor | None,
        dropout: _Dropout,
        shape: Any,
    ) -> Tensor:
        dqkv = torch.empty_like(qkv)
        self._call("attend_backward", qkv, bias, is_key, g, dqkv, self._shape(shape), dropout)
        return dqkv

    def add_norm(
        self,
        x: Tensor,
        y: Tensor,
        y_bias: Tensor,
        norm: tuple[Tensor, Tensor, float],
        dropout: _Dropout,
        out: Tensor,
    ) -> Tensor:
        """Write the norm of x + dropout(y + y_bias), which y becomes; its statistics."""
        weight, bias, eps = norm
        statistics = x.new_empty(len(x), 2)
        sizes = (_Integer(len(x)), _Integer(x.shape[1]), ctypes.c_double(eps))
        self._call("add_norm", x, y, y_bias, weight, bias, out, statistics, *sizes, dropout)
        return statistics

    def add_norm_backward(
        self, g: Tensor, s: Tensor, weight: Tensor, statistics: Tensor, dropout: _Dropout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x and y, and (3, C) those of weight, bias and y_bias."""
        ds, dy = torch.empty_like(s), torch.empty_like(s)
        tasks = torch.get_num_threads()
        sums = s.new_zeros(tasks, 3, s.shape[1])
        sizes = [_Integer(size) for size in (*s.shape, tasks)]
        self._call("add_norm_backward", g, s, weight, statistics, ds, dy, sums, *sizes, dropout)
        return ds, dy, sums.sum(0)

    def relu(self, x: Tensor, bias: Tensor, dropout: _Dropout) -> None:
        """Make x dropout(relu(x + bias))."""
        self._call("relu", x, bias, *map(_Integer, x.shape), dropout)

    def relu_backward(self, g: Tensor, y: Tensor, dropout: _Dropout) -> Tensor:
        """Make g, of y, that of what the bias was added to; the bias's gradient."""
        tasks = torch.get_num_threads()
        sums = g.new_zeros(tasks, g.shape[1])
        self._call("relu_backward", g, y, sums, *map(_Integer, (*g.shape, tasks)), dropout)
        return sums.sum(0)

    def _shape(self, shape: tuple[int, int, int]) -> _Shape:
        batch, length, channels = shape
        return _Shape(batch, length, self._num_heads, channels // self._num_heads)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._functions, f"{name}_{self._suffix}")
        converted = [self._pointer(a) if isinstance(a, Tensor) else a for a in arguments]
        function(*converted, ctypes.c_int(torch.get_num_threads()))

    def _pointer(self, tensor: Tensor) -> ctypes.c_void_p:
        # As elements of another size C would read and write beyond the tensor's end.
        if tensor.dtype is not torch.uint8 and _SUFFIXES.get(tensor.dtype) != self._suffix:
            raise TypeError(f"expected {self._suffix} like the layer, got {tensor.dtype}")
        return pointer(tensor)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        code: _Code,
        drops: list[_Dropout],
        epsilons: tuple[float, float],
        is_key: Tensor | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        parameters = tuple(p.contiguous() for p in parameters)
        w_in, b_in, w_out, b_out, w_n1, b_n1, w_1, b_1, w_2, b_2, w_n2, b_n2 = parameters
        tokens = x.reshape(-1, x.shape[2]).contiguous()
        qkv = tokens @ w_in.T
        attended = code.attend(qkv, b_in, is_key, drops[0], x.shape)
        sum1 = attended @ w_out.T
        middle = torch.empty_like(tokens)
        norm = (w_n1, b_n1, epsilons[0])
        statistics1 = code.add_norm(tokens, sum1, b_out, norm, drops[1], middle)
        hidden = middle @ w_1.T
        code.relu(hidden, b_1, drops[2])
        sum2 = hidden @ w_2.T
        out = x.new_empty(x.shape)  # and not a view, which others might not write to
        norm = (w_n2, b_n2, epsilons[1])
        statistics2 = code.add_norm(middle, sum2, b_2, norm, drops[3], out)
        ctx.code, ctx.drops, ctx.shape = code, drops, x.shape
        ctx.save_for_backward(
            *(is_key, tokens, qkv, attended, sum1, statistics1, middle),
            *(hidden, sum2, statistics2, *parameters),
        )
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            grads = _Layer._gradients(ctx, g)
        if torch.is_grad_enabled():  # with create_graph
            grads = _NotTwice.apply(g.new_ones(()).requires_grad_(), *grads)
        return None, None, None, None, *grads

    @staticmethod
    def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        is_key, tokens, qkv, attended, sum1, statistics1, middle, *rest = ctx.saved_tensors
        hidden, sum2, statistics2, w_in, b_in, w_out, _, w_n1, _, w_1, _, w_2, _, w_n2, _ = rest
        code, drops = ctx.code, ctx.drops
        g = g.reshape(tokens.shape).contiguous()
        d_middle, d_y, sums2 = code.add_norm_backward(g, sum2, w_n2, statistics2, drops[3])
        d_hidden = d_y @ w_2
        d_w_2 = d_y.T @ hidden
        d_b_1 = code.relu_backward(d_hidden, hidden, drops[2])
        d_w_1 = d_hidden.T @ middle
        d_middle.addmm_(d_hidden, w_1)
        d_tokens, d_y, sums1 = code.add_norm_backward(d_middle, sum1, w_n1, statistics1, drops[1])
        del d_middle, d_hidden
        d_w_out = d_y.T @ attended
        d_qkv = code.attend_backward(d_y @ w_out, qkv, b_in, is_key, drops[0], ctx.shape)
        d_w_in, d_b_in = d_qkv.T @ tokens, d_qkv.sum(0)
        d_tokens.addmm_(d_qkv, w_in)
        of_parameters = (
            *(d_w_in, d_b_in, d_w_out, sums1[2], sums1[0], sums1[1]),
            *(d_w_1, d_b_1, d_w_2, sums2[2], sums2[0], sums2[1]),
        )
        return d_tokens.view(ctx.shape), *of_parameters


class _NotTwice(torch.autograd.Function):
    """Hands gradients on, and is an error where they are differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.clone() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            "BatchFormer's fast path cannot be differentiated twice; set the environment variable "
            "PLUGIN_KERNELS=plain"
        )
