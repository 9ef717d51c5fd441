"""Block plugins: modules in the residual blocks of a ResNet, each known by a name.

A block plugin is an ``nn.Module`` that is built from the block's channels, its first argument, and
keyword arguments of its own. It maps (B, C, H, W) to the same shape. Its name is one of

- ``triplet_attention``, ``ida``, …: a class registered by :func:`register_block_plugin`;
- ``timm:eca``, ``timm:cbam``, …: whatever ``timm.layers.create_attn`` makes;
- ``my_package.blocks:MyAttention``: a class of your own.

A module may offer more than its ``forward``:

- ``forward(x, warm_start=alpha)``, where the warm start costs it less than :class:`BlockPlugin`;
- ``warm_start_arguments``: defaults of its constructor that are others with a warm start;
- ``maps(x)``: pictures of what it attends to in x, by name, each (B, h, w);
- ``published_names``: other spellings of its parameters' names, by their beginnings;
- ``published_children``: other names of the block's child in published files;
- ``arguments_in(state_dict)``: the constructor's arguments that its state dict tells;
- ``default_blocks``: "last" where by default the last block of a stage gets it, not all.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plugin_core.errors import (
    ArgumentError,
    StateDictError,
    check_bool,
    check_one_of,
    did_you_mean,
    origin,
    unknown_argument,
)
from plugin_core.kernels import is_compiling

_REGISTRY: dict[str, type[nn.Module]] = {}
BLOCKS = ("all", "last")  # of a stage
_NO_NAMES: Mapping[str, str] = MappingProxyType({})
# For hints only: timm has no list of them.
_TIMM_NAMES = (
    *("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "coord", "scoord"),
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
        with torch.device("cpu"):  # a model may be being built without memory
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
        with torch.device("cpu"):  # tensors of the user's module need memory
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "name", f"{name!r} cannot be imported: {error}; its folder must be in PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the module's code raises
        raise ArgumentError(
            "name", f"{name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ArgumentError(
                "name",
                f"{name!r} does not exist: {module!r} has no {part!r}"
                f"{did_you_mean(part, vars(found))}",
            )
        found = getattr(found, part)
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


def blocks_of(name: str, blocks: Any = None) -> str:
    """Tell which blocks of its stages a block plugin is in.

    Args:
        name: of the block plugin.
        blocks: "all" or "last", as a config says; by default the class's ``default_blocks``, or
            "all".

    Raises:
        ArgumentError: of "name" or "blocks".
    """
    if blocks is None:
        blocks = getattr(find_block_plugin(name), "default_blocks", "all")
    check_one_of("blocks", blocks, BLOCKS)
    return blocks


def is_known_child(child: str) -> bool:
    """Tell whether a block's child is called as a registered block plugin or one of timm's."""
    return child in registered_block_plugins() or child.startswith("timm_")


class BlockPlugin(nn.Module):
    """A block plugin in its place: checked, and if it is asked for with a warm start.

    With ``warm_start`` it computes x + α (module(x) − x), where α is a learnable scalar that is 0
    at first. Any pretrained detector then starts as it was, to the last bit, whichever module it
    gets, as long as the module's output is finite. α = 1 is the module alone: a state dict that has
    the whole module and no ``alpha`` loads with α = 1. A state dict with ``alpha`` loads only with
    ``warm_start``.

    In state dicts the module's parameters have the names that they have without this class, and α
    is ``alpha`` beside them. Attributes of the module are found here, too.

    Args:
        module: (B, C, H, W) → (B, C, H, W).
        name: by which configs know it; for errors and pictures.
        warm_start: start as the identity.

    Shape: (B, C, H, W) → (B, C, H, W), same dtype.

    Raises:
        ValueError: if the module changes the shape, or with ``warm_start`` its input.
        StateDictError: if a state dict with ``alpha`` is loaded without ``warm_start``.
    """

    def __init__(self, module: nn.Module, name: str, warm_start: bool = False) -> None:
        super().__init__()
        check_bool(warm_start=warm_start)
        self.plugin_name = name
        self.alpha = nn.Parameter(torch.zeros(())) if warm_start else None
        self.module = module
        self._blends_itself = "warm_start" in inspect.signature(type(module).forward).parameters
        self._register_state_dict_hook(_hide_module)

    def __getattr__(self, name: str) -> Any:
        # So that a tensor is found by the name that it has in a state dict
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def forward(self, x: Tensor) -> Tensor:
        if self.alpha is not None and self._blends_itself:
            return self.module(x, warm_start=self.alpha).to(x.dtype)
        if x.shape[0] == 0:
            return x  # not every module takes an empty batch
        is_eager = not (torch.jit.is_tracing() or is_compiling() or x.is_inference())
        version = x._version if is_eager else 0
        y = self.module(x)
        if not isinstance(y, Tensor) or (not torch.jit.is_tracing() and y.shape != x.shape):
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"block plugin {self.plugin_name!r} must keep the shape (B, C, H, W) of its "
                f"input, got {got} from {tuple(x.shape)}"
            )
        if self.alpha is None:
            return y.to(x.dtype)
        if is_eager and x._version != version:
            raise ValueError(
                f"block plugin {self.plugin_name!r} must leave its input as it is, which a warm "
                "start needs; it has changed x in place"
            )
        return (x + self.alpha * (y - x)).to(x.dtype)

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
        module = self.module.state_dict()
        given = {k.removeprefix(prefix): k for k in state_dict if k.startswith(prefix)}
        # A module may have an `alpha` of its own. Here that is written as "module.alpha".
        is_modules = "alpha" in module and "module.alpha" not in given
        if self.alpha is None and "alpha" in given and not is_modules:
            raise StateDictError(
                f"{prefix}alpha: this state dict was trained with warm_start=True, and the module "
                "was built with warm_start=False; build it with warm_start=True"
            )
        for name in given:
            if name != "module.alpha" and (name != "alpha" or is_modules):
                state_dict[f"{prefix}module.{name}"] = state_dict.pop(prefix + name)
        is_whole = module and all(
            tensor.shape == getattr(state_dict.get(f"{prefix}module.{name}"), "shape", None)
            for name, tensor in module.items()
            if not name.endswith("num_batches_tracked")
        )
        if self.alpha is not None and is_whole:
            state_dict.setdefault(f"{prefix}alpha", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _hide_module(plugin: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Give the module's tensors in a state dict the names that they have by themselves."""
    hidden = f"{prefix}module."
    for key in [k for k in state if k.startswith(hidden) and k != f"{hidden}alpha"]:
        state[prefix + key.removeprefix(hidden)] = state.pop(key)


def our_name(parameter: str, published_names: Mapping[str, str]) -> str:
    """Give a parameter in a published spelling our name; any other keeps its own."""
    for published, ours in published_names.items():
        if parameter.startswith(published):
            return ours + parameter.removeprefix(published)
    return parameter


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


def check_arguments_of(
    name: str, arguments: Mapping[str, Any]
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Check that a block plugin takes arguments of these names.

    Args:
        name: of the block plugin.
        arguments: the module's own.

    Returns:
        The class, or timm's function, and the arguments as it spells them.

    Raises:
        ArgumentError: of "name", or names the argument that is unknown.
    """
    kind = find_block_plugin(name)
    parameters = list(inspect.signature(kind).parameters.values())
    if not parameters:
        raise ArgumentError("name", f"{name!r} must take the channels as its first argument")
    first = parameters.pop(0).name
    if first in arguments:
        raise ArgumentError(first, "is given by the block; leave it out")
    # A config in capitals tells no upper from lower case.
    spelled = {p.name.lower(): p.name for p in parameters}
    arguments = {spelled.get(key.lower(), key): value for key, value in arguments.items()}
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in arguments:
        # timm's modules drop arguments that they do not know.
        if key not in named and (not takes_any or name.startswith("timm:")):
            raise unknown_argument(key, [*named, "warm_start"])
    return kind, arguments


def make_module(
    name: str, channels: int, arguments: Mapping[str, Any], warm_start: bool = False
) -> nn.Module:
    """Build the bare module of a block plugin.

    Args:
        name: of the block plugin.
        channels: C of the block's output.
        arguments: the module's own.
        warm_start: whether it is to start as the identity.

    Raises:
        ArgumentError: names the argument that is unknown or wrong; "name" where that is unclear.
    """
    kind, arguments = check_arguments_of(name, arguments)
    if warm_start:
        arguments = {**getattr(kind, "warm_start_arguments", {}), **arguments}
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
            + f": {type(error).__name__}: {error} ({origin(error)})",
        ) from error


def build_block_plugin(
    name: str, channels: int, warm_start: bool = False, /, **arguments: Any
) -> BlockPlugin:
    """Build a block plugin.

    Args:
        name: registered, "timm:eca" or "my_package.blocks:MyAttention".
        channels: C of the block's output.
        warm_start: start as the identity.
        **arguments: of the module's constructor.

    Raises:
        ArgumentError: names the argument that is unknown or wrong.
    """
    return BlockPlugin(make_module(name, channels, arguments, warm_start), name, warm_start)


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
