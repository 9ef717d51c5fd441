"""Block plugins as MMDetection's plugin layers.

``ResNet(plugins=[dict(cfg=dict(type=…), stages=(…), position="after_conv3")])`` takes them. The
``type`` is the class of a registered block plugin, such as "TripletAttention" or "IDABlock", or
"BlockPlugin" with the ``name`` of any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mmdet.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import plugin_core
from plugin_core.block_plugins import blocks_of, make_module, registered_block_plugins


@MODELS.register_module()
class BlockPlugin(plugin_core.BlockPlugin):
    """:class:`plugin_core.BlockPlugin` as a plugin layer.

    Its norms keep training where a backbone's ``norm_eval`` puts all norms below it into
    evaluation mode. That is for pretrained norms; fresh ones would never gather statistics.

    Args:
        in_channels: which the backbone passes to every plugin layer.
        name: "timm:eca", "my_package.blocks:MyAttention" or a registered name.
        warm_start: start as the identity.
        **arguments: of the module's constructor.

    Raises:
        ArgumentError: names the argument that is unknown or wrong.
    """

    _abbr_ = "block_plugin"

    def __init__(
        self, in_channels: int, name: str, warm_start: bool = False, **arguments: Any
    ) -> None:
        made_of = name, in_channels, arguments, warm_start
        super().__init__(make_module(*made_of), name, warm_start)
        self._made_of = made_of

    def init_weights(self) -> None:
        """Draw the module's initial weights as its constructor does.

        mmengine asks for it after it has drawn those of all convolutions below a backbone its own
        way. A module's own may be another, such as zeros, and is so in other frameworks.
        """
        self.module.load_state_dict(make_module(*self._made_of).state_dict())

    def forward(self, x: Tensor) -> Tensor:
        # Here and not in train(), as the backbone's train() goes over its norms afterwards.
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.training != self.training:
                module.training = self.training
        return super().forward(x)


class _Registered(BlockPlugin):
    """A plugin layer that is of one registered name."""

    registered_name: ClassVar[str]

    def __init__(self, in_channels: int, warm_start: bool = False, **arguments: Any) -> None:
        super().__init__(in_channels, self.registered_name, warm_start, **arguments)


def is_for_last_block(plugin: Mapping[str, Any]) -> bool:
    """Tell whether an entry of a backbone's ``plugins`` is for the last block of its stages alone.

    Args:
        plugin: with ``cfg``, and maybe ``blocks``, "all" or "last". By default the class says it.

    Raises:
        ArgumentError: of "blocks", or of an unknown "name".
    """
    blocks, cfg = plugin.get("blocks"), plugin["cfg"]
    kind = MODELS.get(cfg["type"]) if isinstance(cfg["type"], str) else cfg["type"]
    if kind is BlockPlugin:
        return blocks_of(cfg["name"], blocks) == "last"
    name = getattr(kind, "registered_name", None)
    return blocks_of(name or "", blocks if name or blocks else "all") == "last"


# A type for each registered name: a new method is its own file and nothing here.
LAYERS: list[type[BlockPlugin]] = [BlockPlugin]
for _name, _kind in registered_block_plugins().items():
    LAYERS.append(
        MODELS.register_module(
            module=type(
                _kind.__name__,
                (_Registered,),
                {
                    "__module__": __name__,
                    "__doc__": f":class:`{_kind.__module__}.{_kind.__name__}` as a plugin layer.",
                    "_abbr_": _name,
                    "registered_name": _name,
                },
            )
        )
    )
    globals()[_kind.__name__] = LAYERS[-1]
