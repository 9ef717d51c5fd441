"""Block plugins as attention layers of timm's models.

    timm.create_model("resnet50", block_args=dict(attn_layer=timm_layer("triplet_attention")))

timm's ResNets call an attention layer ``se``, whatever it is, and apply it after a block's last
norm. timm itself is imported by nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from plugin_core.block_plugins import BlockPlugin, check_arguments_of, make_module
from plugin_core.errors import ArgumentError


def timm_layer(
    name: str, /, *, warm_start: bool = False, **arguments: Any
) -> Callable[..., BlockPlugin]:
    """Give what timm's models take as their attention layer.

    Args:
        name: of a block plugin; "triplet_attention", "timm:eca", "my_package.blocks:MyAttention".
        warm_start: start as the identity.
        **arguments: of the module's constructor.

    Returns:
        A function that timm calls with a block's channels, and maybe ``device`` and ``dtype``. It
        can be pickled.

    Raises:
        ArgumentError: names the argument that is unknown or wrong. What is wrong for some numbers
            of channels alone, such as ``num_heads``, is told when timm builds the model.
    """
    _, arguments = check_arguments_of(name, arguments)
    # Values are checked by building one, for channels that any of them divides.
    numbers = [value for value in arguments.values() if type(value) is int and value > 0]
    try:
        with torch.device("meta"):
            _TimmLayer(name, warm_start, arguments, math.lcm(64, *numbers))
    except ArgumentError as error:
        if error.argument in (*arguments, "warm_start"):
            raise
    return partial(_TimmLayer, name, warm_start, arguments)


class _TimmLayer(BlockPlugin):
    """A block plugin as timm builds and initializes its layers.

    Args:
        name: of the block plugin.
        warm_start: start as the identity.
        arguments: of the module's constructor.
        channels: C, which timm gives.
        device: that timm builds the model on.
        dtype: of the model's parameters.
        act_layer: the model's activation, for timm's own layers.
        **others: what timm's own layers take; none is ours.

    Raises:
        TypeError: if timm passes anything else. Its EfficientNets ask in this way whether a layer
            takes ``rd_ratio``.
    """

    def __init__(
        self,
        name: str,
        warm_start: bool,
        arguments: Mapping[str, Any],
        channels: int,
        device: Any = None,
        dtype: torch.dtype | None = None,
        act_layer: Any = None,
        **others: Any,
    ) -> None:
        if others:
            raise TypeError(
                f"timm_layer({name!r}) was given {', '.join(others)} by timm's model; pass "
                "attn_kwargs={} to create_model, and the module's arguments to timm_layer"
            )
        made_of = name, channels, arguments, warm_start
        super().__init__(make_module(*made_of), name, warm_start)
        self._made_of = made_of
        self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the initial weights as the constructor does.

        A model of timm draws the weights of all convolutions below it when it is complete, and
        then lets its modules draw theirs. It does so by this name or by one of the two below.
        """
        if self.alpha is not None:
            nn.init.zeros_(self.alpha)
        if not any(tensor.is_meta for tensor in self.module.state_dict().values()):
            self.module.load_state_dict(make_module(*self._made_of).state_dict())

    def zero_init_last(self) -> None:
        """Draw the initial weights, in a ResNet with ``zero_init_last=True``."""
        self.reset_parameters()

    def init_weights(self, zero_init_last: bool = False) -> None:
        """Draw the initial weights, in an EfficientNet or a ByobNet."""
        self.reset_parameters()

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"torch.jit.script cannot compile the block plugin {self.plugin_name!r}; use "
            "torch.compile (--torchcompile instead of --torchscript in timm's train.py), or "
            "torch.jit.trace"
        )
