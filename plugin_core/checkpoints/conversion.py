"""Backbones in state dicts: find one in any spelling, and convert its tensors for another model.

Every spelling is translated into a common one: torchvision's for a ResNet, MMDetection's for a
MobileNetV2, and our names of block plugins' parameters. Equal names then mean the same tensor.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugin_core.block_plugins import (
    is_known_child,
    make_module,
    our_name,
    registered_block_plugins,
)
from plugin_core.checkpoints.resnet_names import RESNET_DEPTHS, resnet_depth
from plugin_core.errors import few

_NAME = re.compile(r"(conv[12]|bn1|fc|layer\d\.\d+)\.")
_BLOCK = re.compile(r"layer\d\.\d+\.")
_PLUGIN = re.compile(  # a child of a block, other than the parts of a ResNet or MobileNetV2
    r"(layer(\d)\.\d+)\."
    r"((?!(?:(?:conv|bn|gn|norm)\d(?:_offset)?|conv\d_\w+|convs|bns|downsample|"
    r"expand_conv|depthwise_conv|linear_conv)\.)[^.]+)\.(.+)"
)
_BLOCK_CONVOLUTION = re.compile(r"layer([1-4])\.(\d+)\.conv([123])\.weight")
# A C4 detector of Detectron2 or MMDetection has its last stage in its RoI head.
_STAGE_OF_ROI_HEAD = re.compile(r"(?:roi_heads|roi_head\.shared_head)\.((?:res5|layer4)\..+)")
# Caffe2 joins these parts of names with underscores.
_CAFFE2_PARTS = {
    **{"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"},
    **{"bn": "norm", "gn": "norm", "fc1000": "linear"},
    **{"w": "weight", "b": "bias", "s": "weight", "rm": "running_mean", "riv": "running_var"},
}
TIMM_CHILD = "se"  # whatever attention a block of timm's ResNets has
# The encoders that MoCo v2 and v3 train and evaluate. The others are moving averages of them.
MOCO_ENCODERS = ("encoder_q", "base_encoder")
# Children of a torchvision ResNet in an nn.Sequential, as IDA's public reproduction has them
_SEQUENTIAL = {"0": "conv1", "1": "bn1", **{f"{i + 3}": f"layer{i}" for i in (1, 2, 3, 4)}}
# torchvision numbers MobileNetV2's blocks and a block's parts. The first block has no expansion.
_INVERTED_RESIDUALS = [
    f"layer{stage}.{block}"
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1)
    for block in range(blocks)
]
_FIRST_BLOCK_PARTS = {
    **{"0.0": "depthwise_conv.conv", "0.1": "depthwise_conv.bn"},
    **{"1": "linear_conv.conv", "2": "linear_conv.bn", "3": "triplet_attention"},
}
_BLOCK_PARTS = {
    **{"0.0": "expand_conv.conv", "0.1": "expand_conv.bn"},
    **{"1.0": "depthwise_conv.conv", "1.1": "depthwise_conv.bn"},
    **{"2": "linear_conv.conv", "3": "linear_conv.bn", "4": "triplet_attention"},
}


@dataclass(frozen=True)
class Backbone:
    """A backbone that was found in a state dict.

    Attributes:
        depth: of a ResNet; None for MobileNetV2.
        spelling: "torchvision", "Detectron2", "Caffe2" or "MMDetection", the origin of its names.
        prefix: beginning of all its names.
        names: common name → name in the state dict; the classifier is ``fc``.
    """

    depth: int | None
    spelling: str
    prefix: str
    names: dict[str, str]

    @property
    def architecture(self) -> str:
        """Name the architecture, such as "ResNet-50" or "MobileNetV2"."""
        return "MobileNetV2" if self.depth is None else f"ResNet-{self.depth}"

    def __str__(self) -> str:
        plugins = [
            f"{child.replace('_', ' ')} in {len(blocks)} block{'s' * (len(blocks) > 1)}"
            for child, blocks in self.plugins().items()
        ]
        has = f" with {' and '.join(plugins)}" if plugins else ""
        below = f" below {self.prefix!r}" if self.prefix else ""
        return f"{self.architecture}{has}, {self.spelling}'s names{below}"

    def plugins(self) -> dict[str, dict[str, dict[str, str]]]:
        """List the block plugins.

        Returns:
            Child of a block → block → the plugin's own name of a parameter → name in the state
            dict.
        """
        found: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        for common, name in self.names.items():
            if match := _PLUGIN.fullmatch(common):
                block, _, child, parameter = match.groups()
                found[child][block][parameter] = name
        return found


@dataclass(frozen=True)
class FoundPlugin:
    """A block plugin that was found in a state dict.

    Attributes:
        name: its name in configs.
        stages: stages with the plugin in their blocks, counted from 1.
        warm_start: whether it was trained with a warm start.
        arguments: arguments of its constructor that its tensors tell.
        blocks: "all" blocks of the stages have it, or the "last" one of each.
    """

    name: str
    stages: tuple[int, ...]
    warm_start: bool
    arguments: dict[str, Any]
    blocks: str = "all"


@dataclass(frozen=True)
class Conversion:
    """A backbone's tensors for a target.

    Attributes:
        tensors: the target's names and data types, with the source's values.
        matched: names of the target that the source has too.
        implied: names of the target with values that follow from the source's tensors.
        fresh: names of the target that keep their initial values.
        unused: names of the source without a place in the target.
    """

    tensors: dict[str, Tensor]
    matched: list[str]
    implied: list[str]
    fresh: list[str]
    unused: list[str]


def find_backbone(names: Iterable[str]) -> Backbone:
    """Find the backbone that a state dict holds, alone or in a whole detector.

    Args:
        names: of the state dict's tensors.

    Raises:
        ValueError: if there is no known backbone, or several.
    """
    known = dict.fromkeys(names)
    found: list[tuple[_Spelling, str]] = []
    for spelling in _SPELLINGS:
        for name in known:
            prefix = name.removesuffix(spelling.stem)
            is_stem = prefix != name and prefix[-1:] in ("", ".")
            if is_stem and prefix + spelling.block in known:
                found.append((spelling, prefix))
    if not found:
        raise ValueError(
            "no ResNet and no MobileNetV2 in torchvision's, Detectron2's, Caffe2's or "
            f"MMDetection's names; it holds {', '.join([*known][:3]) or 'no tensors'} …"
        )
    if len(found) > 1:
        prefixes = " and ".join(repr(prefix) for _, prefix in found)
        raise ValueError(f"more than one backbone, below {prefixes}; expected a file with one")
    spelling, prefix = found[0]
    if spelling.translate is None:
        raise ValueError(
            "a ResNet-D, whose stem is three convolutions; only ResNets whose stem is one 7×7 "
            "convolution can be converted"
        )
    common_names: dict[str, str] = {}
    for name in known:
        elsewhere = _STAGE_OF_ROI_HEAD.fullmatch(name)
        if elsewhere or name.startswith(prefix):
            relative = elsewhere[1] if elsewhere else name.removeprefix(prefix)
            common = spelling.translate(relative)
            if _NAME.match(common):
                common_names.setdefault(_ours(common), name)
    is_mobilenet = "conv1.conv.weight" in common_names
    depth = None if is_mobilenet else _resnet_depth(common_names)
    return Backbone(depth, spelling.owner, prefix, common_names)


def branch_of(state_dict: Mapping[str, Tensor], branch: str | None = None) -> dict[str, Tensor]:
    """Take one of the networks that a self-supervised training holds.

    Args:
        state_dict: may be of any origin.
        branch: beginning of the network's names, such as "encoder_k" or "momentum_encoder"; None
            for the one that MoCo v2 and v3 evaluate, and for everything of other origins.

    Raises:
        ValueError: if no name begins with the branch.
    """
    if branch is None:
        begins = {name.partition(".")[0] for name in state_dict}
        branch = next((encoder for encoder in MOCO_ENCODERS if encoder in begins), None)
        if branch is None:
            return dict(state_dict)
    taken = {n: tensor for n, tensor in state_dict.items() if n.startswith(f"{branch}.")}
    if not taken:
        known = sorted({name.partition(".")[0] for name in state_dict if "." in name})
        raise ValueError(f"no name begins with {branch!r}; they begin with {', '.join(known)}")
    return taken


def _ours(common: str) -> str:
    """Replace the name of a block plugin's parameter in a name by ours."""
    match = _PLUGIN.fullmatch(common)
    if match is None:
        return common
    block, _, child, parameter = match.groups()
    for name, kind in registered_block_plugins().items():
        spellings = getattr(kind, "published_names", {})
        known = (*spellings, *spellings.values())
        if child in getattr(kind, "published_children", ()) and parameter.startswith(known):
            child = name
        if child == name:
            return f"{block}.{name}.{our_name(parameter, spellings)}"
    return common


def plugins_in(state_dict: Mapping[str, Tensor]) -> list[FoundPlugin]:
    """Find the block plugins of the backbone in a state dict, as entries for a config.

    timm's ResNets call any of them ``se``; there it is the registered one that has such tensors.

    Raises:
        ValueError: if there is no backbone, or a block has a child that is no known plugin.
    """
    found = []
    backbone = find_backbone(state_dict)
    all_blocks = {match[0][:-1] for match in map(_BLOCK.match, backbone.names) if match}
    for child, blocks in backbone.plugins().items():
        block, names = next(iter(blocks.items()))
        tensors = {parameter: state_dict[name] for parameter, name in names.items()}
        name = f"timm:{child[5:]}" if child.startswith("timm_") else child
        if not is_known_child(child):
            if child != TIMM_CHILD:
                raise ValueError(
                    f"its blocks have {child!r}, which is no block plugin's name; say by --config "
                    "which module that is"
                )
            norms = (backbone.names.get(f"{block}.{norm}.weight") for norm in ("bn3", "bn2"))
            norm = next(filter(None, norms), None)
            known = [] if norm is None else _with_tensors(tensors, len(state_dict[norm]))
            if len(known) != 1:
                raise ValueError(
                    f"its blocks have {child!r}, as timm calls any attention, and no registered "
                    f"block plugin alone has the tensors {few(tensors)}; say by --config which "
                    "module that is"
                )
            name = known[0]
        kind = registered_block_plugins().get(name)
        stages = tuple(sorted({int(block[len("layer")]) for block in blocks}))
        of_stages = {b for b in all_blocks if int(b[len("layer")]) in stages}
        in_order = sorted(of_stages, key=lambda block: int(block.partition(".")[2]))
        last = {block.partition(".")[0]: block for block in in_order}
        places = {"all": of_stages, "last": set(last.values())}
        place = next((key for key, value in places.items() if value == set(blocks)), None)
        parameters = {frozenset(names) for names in blocks.values()}
        if place is None or len(parameters) > 1:
            raise ValueError(
                f"neither every block of its stages nor the last of each has the same {child}; say "
                "by --config what the model has"
            )
        reads = getattr(kind, "arguments_in", None)
        arguments = {} if reads is None else reads(tensors)
        found.append(FoundPlugin(name, stages, "alpha" in names, arguments, place))
    return found


def _with_tensors(tensors: Mapping[str, Tensor], channels: int) -> list[str]:
    """List the registered block plugins that have exactly tensors of these names and shapes."""

    def shapes(of: Mapping[str, Tensor]) -> dict[str, Any]:
        names = (n for n in of if n != "alpha" and not n.endswith("num_batches_tracked"))
        return {name: of[name].shape for name in names}

    found = []
    for name, kind in registered_block_plugins().items():
        reads = getattr(kind, "arguments_in", None)
        try:
            arguments = {} if reads is None else reads(tensors)
            with torch.device("meta"):
                module = make_module(name, channels, arguments)
        except (KeyError, IndexError, TypeError, ValueError):  # tensors of another module
            continue
        if shapes(tensors) and shapes(module.state_dict()) == shapes(tensors):
            found.append(name)
    return found


def convert(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Conversion:
    """Convert the tensors of the backbone in a source for a target, in any spelling.

    Args:
        source: a state dict that holds a backbone, maybe among other things.
        target: state dict of the backbone that gets the tensors.

    Raises:
        ValueError: if one has no backbone, the architectures or a tensor's shapes differ, or the
            target would silently compute something else.
    """
    from_backbone, to_backbone = find_backbone(source), find_backbone(target)
    if from_backbone.architecture != to_backbone.architecture:
        raise ValueError(
            f"these are weights of a {from_backbone.architecture}, "
            f"but the model has a {to_backbone.architecture}"
        )
    from_names = _renamed_plugins(from_backbone, to_backbone, source, target)
    values = {common: source[name] for common, name in from_names.items()}
    for child, blocks in to_backbone.plugins().items():
        for block, parameters in blocks.items():
            if "alpha" not in parameters and f"{block}.{child}.alpha" in values:
                raise ValueError(
                    f"these weights' {child} was trained with warm_start=True (it has alpha); the "
                    "model's needs warm_start=True too (WARM_START in Detectron2)"
                )
    _check_same_function(from_backbone, from_names, to_backbone)
    _check_order(from_names, to_backbone)
    conversion = Conversion({}, [], [], [], [])
    misfits = []
    for common, name in to_backbone.names.items():
        value = values.get(common)
        if value is not None:
            conversion.matched.append(name)
        elif (value := _implied(common, values)) is not None:
            conversion.implied.append(name)
        elif common.endswith("num_batches_tracked"):
            continue
        else:
            conversion.fresh.append(name)
            continue
        if value.shape != target[name].shape:
            misfits.append(f"{name} is {tuple(value.shape)}, not {tuple(target[name].shape)}")
        # A copy, as saving a view or a parameter writes more than the values.
        conversion.tensors[name] = value.detach().to(target[name].dtype, copy=True).contiguous()
    if misfits:
        more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(f"shapes that do not fit the model: {'; '.join(misfits[:3])}{more}")
    used = {name for common, name in from_names.items() if common in to_backbone.names}
    conversion.unused.extend(
        name for name in source if name not in used and not name.endswith("num_batches_tracked")
    )
    return conversion


def _renamed_plugins(
    source: Backbone,
    target: Backbone,
    source_tensors: Mapping[str, Tensor],
    target_tensors: Mapping[str, Tensor],
) -> dict[str, str]:
    """Rename the source's block plugins as the target names plugins with tensors of these shapes.

    A framework or a user may name the same plugin differently.
    """

    def shapes(plugin: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {p: tensors[name].shape for p, name in plugin.items() if p != "alpha"}

    theirs, ours = source.plugins(), target.plugins()
    renamed: dict[str, str] = {}
    for child in [child for child in theirs if child not in ours]:
        for other in [other for other in ours if other not in theirs]:
            if is_known_child(child) and is_known_child(other):
                continue  # two different plugins
            if theirs[child].keys() == ours[other].keys() and all(
                shapes(theirs[child][block], source_tensors)
                == shapes(ours[other][block], target_tensors)
                for block in theirs[child]
            ):
                for block, plugin in theirs[child].items():
                    for parameter in plugin:
                        ours_is = f"{block}.{other}.{parameter}"
                        renamed[f"{block}.{child}.{parameter}"] = ours_is
                theirs[other] = theirs.pop(child)
                break
    return {renamed.get(common, common): name for common, name in source.names.items()}


def _check_order(names: Mapping[str, str], target: Backbone) -> None:
    """Check that a block applies its plugins in the order in which they were trained."""
    orders = [
        list(dict.fromkeys(m[3] for m in map(_PLUGIN.fullmatch, of) if m))
        for of in (names, target.names)
    ]
    theirs, ours = (
        [child for child in order if child in orders[1 - i]] for i, order in enumerate(orders)
    )
    if theirs != ours:
        raise ValueError(
            f"these weights' blocks apply {', then '.join(theirs)}; the model's apply "
            f"{', then '.join(ours)}"
        )


def _check_same_function(source: Backbone, names: Mapping[str, str], target: Backbone) -> None:
    """Check that the source's blocks have no parameter that the target's blocks lack."""
    blocks = {match[0] for match in map(_BLOCK.match, target.names) if match}
    for common, name in names.items():
        block = _BLOCK.match(common)
        if (
            block
            and block[0] in blocks
            and common not in target.names
            and not common.endswith(("num_batches_tracked", "momentum"))
        ):
            plugin = _PLUGIN.fullmatch(common)
            hint = "they are another network's"
            if plugin and is_known_child(plugin[3]):
                hint = f"take a config with {plugin[3]} in the same stages"
            raise ValueError(
                f"these weights' blocks have {name}, which the model's have no place for: {hint}"
            )
    for common in target.names:
        module, _, parameter = common.rpartition(".")
        scale = names.get(f"{module}.weight")
        if parameter != "running_var" or scale is None or common in names:
            continue
        if not (source.spelling == "Caffe2" and scale.endswith("_bn_s")):
            raise ValueError(
                f"these weights' norm of {scale} has no running statistics, as GroupNorm has none; "
                "the model's BatchNorm needs them"
            )


def _implied(name: str, values: Mapping[str, Tensor]) -> Tensor | None:
    """Find the known value of a parameter that the source lacks; None if there is none."""
    module, _, parameter = name.rpartition(".")
    scale = values.get(f"{module}.weight")
    # Caffe2's norms only scale and shift. With these statistics a norm does the same.
    if scale is not None and parameter == "running_mean":
        return torch.zeros_like(scale)
    if scale is not None and parameter == "running_var":
        return torch.ones_like(scale) - 1e-5  # the norms' eps
    if parameter == "alpha" and any(other.startswith(f"{module}.") for other in values):
        return torch.ones(())  # a plugin without alpha is the module alone
    return None


def _resnet_depth(names: Iterable[str]) -> int:
    convolutions = [m.groups() for m in map(_BLOCK_CONVOLUTION.fullmatch, names) if m]
    counts = tuple(
        max((int(block) for s, block, _ in convolutions if s == stage), default=-1) + 1
        for stage in "1234"
    )
    has_third = any(convolution == "3" for _, _, convolution in convolutions)
    depth = resnet_depth(counts, has_third)
    if depth is not None:
        return depth
    raise ValueError(
        f"a ResNet whose stages have {', '.join(map(str, counts))} blocks; there are those of "
        f"{', '.join(map(str, RESNET_DEPTHS))} layers"
    )


def _unchanged(name: str) -> str:
    return name


def _from_sequential(name: str) -> str:
    child, _, rest = name.partition(".")
    return f"{_SEQUENTIAL.get(child, child)}.{rest}"


def _from_detectron2(name: str) -> str:
    name = re.sub(r"^linear\.", "fc.", name.removeprefix("stem."))
    name = re.sub(r"^res([2-5])\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


def _from_caffe2(name: str) -> str:
    parts = [_CAFFE2_PARTS.get(part, part) for part in name.removeprefix("res_").split("_")]
    return _from_detectron2(".".join(parts))


def _from_torchvision_mobilenet(name: str) -> str:
    match = re.fullmatch(r"features\.(\d+)\.(?:conv\.)?(\d(?:\.\d)?)\.(.+)", name)
    if match is None:
        return name.replace("classifier.1.", "fc.")
    index, part, parameter = int(match[1]), match[2], match[3]
    last = len(_INVERTED_RESIDUALS) + 1
    if index in (0, last):
        module, parts = ("conv1" if index == 0 else "conv2"), {"0": "conv", "1": "bn"}
    elif index < last:
        module = _INVERTED_RESIDUALS[index - 1]
        parts = _FIRST_BLOCK_PARTS if index == 1 else _BLOCK_PARTS
    else:
        return name
    return f"{module}.{parts[part]}.{parameter}" if part in parts else name


@dataclass(frozen=True)
class _Spelling:
    """A spelling: two names that identify it, and its translation; None if it is unsupported."""

    owner: str
    stem: str
    block: str
    translate: Callable[[str], str] | None


_SPELLINGS = (
    # MMDetection's ResNets have torchvision's names.
    _Spelling("torchvision", "conv1.weight", "layer1.0.conv1.weight", _unchanged),
    _Spelling("torchvision", "0.weight", "4.0.conv1.weight", _from_sequential),
    _Spelling("timm", "conv1.0.weight", "layer1.0.conv1.weight", None),
    _Spelling("MMDetection", "stem.0.weight", "layer1.0.conv1.weight", None),
    _Spelling("Detectron2", "stem.conv1.weight", "res2.0.conv1.weight", _from_detectron2),
    _Spelling("Caffe2", "conv1_w", "res2_0_branch2a_w", _from_caffe2),
    _Spelling(
        "torchvision",
        "features.0.0.weight",
        "features.1.conv.0.0.weight",
        _from_torchvision_mobilenet,
    ),
    _Spelling(
        "MMDetection", "conv1.conv.weight", "layer1.0.depthwise_conv.conv.weight", _unchanged
    ),
)
