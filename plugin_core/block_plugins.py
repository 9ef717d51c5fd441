"""Block plugins: modules in the residual blocks of a ResNet, each known by a name.

A block plugin is an ``nn.Module`` that is built from the block's channels, its first argument, and
keyword arguments of its own. It maps (B, C, H, W) to the same shape. Its name is one of

- ``triplet_attention``, ``ida``, …: a class registered by :func:`register_block_plugin`;
- ``timm:eca``, ``timm:cbam``, …: whatever ``timm.layers.create_attn`` makes;
- ``my_package.blocks:MyAttention``: a class of your own.

A module may offer more than its ``forward``:

- ``forward(x, warm_start=alpha)``, where the warm start costs it less than :class:`BlockPlugin`;
- ``maps(x)``: pictures of what it attends to in x, by name, each (B, h, w);
- ``published_names``: other spellings of its parameters' names, by their beginnings;
- ``arguments_in(state_dict)``: the constructor's arguments that its state dict tells.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plugin_core.errors import ArgumentError, check_arguments, did_you_mean

_REGISTRY: dict[str, type[nn.Module]] = {}
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
# For hints only: timm has no list of them.
_TIMM_NAMES = (
    *("se", "ese", "eca", "ecam", "ceca", "ge", "gc", "gca", "cbam", "lcbam", "coord", "scoord"),
    *("ela", "strip", "sk", "splat", "lambda", "bottleneck", "halo", "nl", "bat"),
)
_Class = TypeVar("_Class", bound="type[nn.Module]")


def register_block_plugin(name: str) -> Callable[[_Class], _Class]:
    """Make a class a block plugin that configs know by ``name``.

    Args:
        name: also of the block's child in state dicts; lower case, with underscores.

    Raises:
        ValueError: if the name is taken or cannot be a child's.
    """

    def register(kind: _Class) -> _Class:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"name must be lower case with underscores, got {name!r}")
        if _REGISTRY.get(name, kind) is not kind:
            raise ValueError(f"a block plugin is already registered as {name!r}: {_REGISTRY[name]}")
        _REGISTRY[name] = kind
        return kind

    return register


def registered_block_plugins() -> Mapping[str, type[nn.Module]]:
    """The registered classes by name."""
    importlib.import_module("plugin_core.methods")  # registers the collection's own
    return MappingProxyType(_REGISTRY)


def find_block_plugin(name: str) -> Callable[..., nn.Module]:
    """The class, or timm's function, that a name stands for.

    Raises:
        ArgumentError: of "name", if there is none; it names the likely one.
    """
    if not isinstance(name, str):
        raise ArgumentError("name", f"must be a text such as 'triplet_attention', got {name!r}")
    library, is_timm, attention = name.partition("timm:")
    if is_timm and not library:
        return _find_in_timm(attention)
    module, is_own, path = name.partition(":")
    if is_own:
        return _find_class(name, module, path)
    known = registered_block_plugins()
    if name in known:
        return known[name]
    names = [*known, *(f"timm:{one}" for one in _TIMM_NAMES)]
    hint = did_you_mean(name, names) or did_you_mean(f"timm:{name}", names)
    raise ArgumentError(
        "name",
        f"must be one of {', '.join(known)}, one of timm's such as 'timm:eca', or a class such as "
        f"'my_package.blocks:MyAttention', got {name!r}{hint}",
    )


def _find_in_timm(attention: str) -> Callable[..., nn.Module]:
    try:
        from timm.layers.create_attn import get_attn
    except ImportError as error:
        raise ArgumentError(
            "name", f"'timm:{attention}' needs timm: `pip install -e .[timm]` ({error})"
        ) from error
    try:
        found = get_attn(attention)
    except AssertionError:
        found = None
    if found is None:
        raise ArgumentError(
            "name",
            f"must be of timm.layers.create_attn, such as {', '.join(_TIMM_NAMES[:9])}, "
            f"got 'timm:{attention}'{did_you_mean(attention, _TIMM_NAMES)}",
        )
    return found


def _find_class(name: str, module: str, path: str) -> type[nn.Module]:
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ArgumentError("name", f"{name!r} cannot be imported: {error}") from error
    except AttributeError as error:
        hint = did_you_mean(path, vars(importlib.import_module(module)))
        raise ArgumentError("name", f"{name!r} does not exist: {error}{hint}") from error
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise ArgumentError("name", f"must be a class of nn.Module, got {name!r}, {found!r}")
    return found


def child_name(name: str) -> str:
    """Name of the block's child: 'timm:eca' → 'timm_eca', 'a.b:MyBlock' → 'my_block'."""
    library, is_own, path = name.partition(":")
    if is_own and library != "timm":
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", path)
        return words.replace(".", "_").lower()
    return name.replace(":", "_")


class BlockPlugin(nn.Module):
    """A block plugin in its place: checked, and if it is asked for with a warm start.

    With ``warm_start`` it computes x + α (module(x) − x), where α is a learnable scalar that is 0
    at first. Any pretrained detector then starts as it was, to the last bit, whichever module it
    gets. α = 1 is the module alone: a state dict that has the module and no ``alpha`` loads with
    α = 1. A state dict with ``alpha`` loads only with ``warm_start``.

    In state dicts the module's parameters have the names that they have without this class, and α
    is ``alpha`` beside them.

    Args:
        module: (B, C, H, W) → (B, C, H, W).
        name: by which configs know it; for errors and pictures.
        warm_start: start as the identity.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype.

    Raises:
        ValueError: if the module changes the shape.
        RuntimeError: if a state dict with ``alpha`` is loaded without ``warm_start``.
    """

    def __init__(self, module: nn.Module, name: str, warm_start: bool = False) -> None:
        super().__init__()
        if not isinstance(warm_start, bool):
            raise ArgumentError("warm_start", f"must be True or False, got {warm_start!r}")
        self.module = module
        self.plugin_name = name
        self.alpha = nn.Parameter(torch.zeros(())) if warm_start else None
        self._blends_itself = "warm_start" in inspect.signature(type(module).forward).parameters
        self._register_state_dict_hook(_hide_module)

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha is not None and self._blends_itself:
            y = self.module(x, warm_start=self.alpha)
        else:
            y = self.module(x)
        if not torch.jit.is_tracing() and y.shape != x.shape:
            raise ValueError(
                f"block plugin {self.plugin_name!r} must keep the shape (B, C, H, W) of its "
                f"input, got {tuple(y.shape)} from {tuple(x.shape)}"
            )
        if self.alpha is not None and not self._blends_itself:
            y = x + self.alpha * (y - x)
        return y.to(x.dtype)

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (B, h, w) of what the module attends to in x; empty where it offers none."""
        offers = getattr(self.module, "maps", None)
        return {} if offers is None else offers(x)

    def extra_repr(self) -> str:
        return f"{self.plugin_name}, warm_start={self.alpha is not None}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        rename_published(state_dict, prefix, getattr(self.module, "published_names", _NO_NAMES))
        own = "module.alpha" if "alpha" in _members(self.module) else None
        names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
        if self.alpha is None and "alpha" in names and own is None:
            # Frameworks load what fits and log the rest: without alpha the result would be wrong.
            raise RuntimeError(
                f"{prefix}alpha: this state dict was trained with warm_start=True, and the module "
                "was built with warm_start=False; build it with warm_start=True"
            )
        for name in names:
            if name not in ("alpha", own):
                state_dict[f"{prefix}module.{name}"] = state_dict.pop(prefix + name)
        if self.alpha is not None and names:
            state_dict.setdefault(f"{prefix}alpha", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _members(module: nn.Module) -> Iterator[str]:
    yield from module._parameters
    yield from module._buffers


def _hide_module(plugin: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Give the module's tensors in a state dict the names that they have by themselves."""
    hidden = f"{prefix}module."
    for key in [k for k in state if k.startswith(hidden) and k != f"{hidden}alpha"]:
        state[prefix + key.removeprefix(hidden)] = state.pop(key)


def rename_published(
    state_dict: dict[str, Any], prefix: str, published_names: Mapping[str, str]
) -> None:
    """Rename the tensors below ``prefix`` that have a published spelling, in place.

    Args:
        state_dict: of a model.
        prefix: of the module's names.
        published_names: ours by the published ones, as names begin.
    """
    for published, ours in published_names.items():
        for key in [k for k in state_dict if k.startswith(prefix + published)]:
            state_dict[prefix + ours + key.removeprefix(prefix + published)] = state_dict.pop(key)


def make_module(name: str, channels: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the bare module of a block plugin.

    Args:
        name: of the block plugin.
        channels: C of the block's output.
        arguments: the module's own.

    Raises:
        ArgumentError: names the argument that is unknown or wrong; "name" where that is unclear.
    """
    kind = find_block_plugin(name)
    first = next(iter(inspect.signature(kind).parameters), None)
    check_arguments(kind, arguments, reserved=() if first is None else (first,))
    try:
        return kind(channels, **arguments)
    except ArgumentError:
        raise
    except Exception as error:  # whatever a constructor raises
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ArgumentError(
            "name",
            f"{name!r} cannot be built for {channels} channels"
            + (f" with {given}" if given else "")
            + f": {type(error).__name__}: {error}",
        ) from error


def build_block_plugin(
    name: str, channels: int, warm_start: bool = False, /, **arguments: Any
) -> BlockPlugin:
    """Build a block plugin.

    Args:
        name: see the top of this file.
        channels: C of the block's output.
        warm_start: start as the identity.
        **arguments: of the module's constructor.

    Raises:
        ArgumentError: names the argument that is unknown or wrong.
    """
    return BlockPlugin(make_module(name, channels, arguments), name, warm_start)


class ApplyChildren:
    """Applies the children ``names`` of ``block`` in turn, where a block calls an activation.

    Not an ``nn.Module``: the plugins are children of the block and must not be registered twice.
    They are looked up by name, so that replacing a child (FSDP, quantization) takes effect.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.names: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self.block, name)(x)
        return x
