"""Conversion of the original repositories' DETRs, as whole detectors, for MMDetection.

DETR, also with its mask head (facebookresearch/detr), Conditional DETR
(Atten4Vis/ConditionalDETR), Deformable DETR (fundamentalvision/Deformable-DETR) and
BatchFormerV2's versions of them (zhihou7/BatchFormer).

All names follow from a detector's few sizes. So missing and superfluous tensors are both noticed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plugin_core.checkpoints.conversion import find_backbone

_BODY = "backbone.0.body."
_OF_PANOPTIC_MODEL = "detr."
# Modules that a state dict has under two names
_DUPLICATES = {
    "transformer.encoder.bf.": "transformer.bf.",
    "transformer.decoder.bbox_embed.": "bbox_embed.",
    "transformer.decoder.class_embed.": "class_embed.",
}
_BATCHFORMER = re.compile(
    r"transformer\.bf\.(?:(\d+)\.)?(?:layers\.(\d+)\.)?(?:self_attn|linear[12]|norm[12])\."
)
# The original heads have an output for each of COCO's ids. These 80 are categories.
_COCO_IDS = [i for i in range(91) if i not in (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# Of COCO's panoptic ids, of which DETR has 250, these 133 are.
_COCO_STUFF_IDS = [
    *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147),
    *(148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181),
    *range(184, 201),
]
_PANOPTIC_OUTPUTS = 251

# A last stage of stride 1. torchvision dilates all of its blocks but the first.
_DC5 = {
    "type": "PluginResNet",
    "strides": (1, 2, 2, 1),
    "dilations": (1, 1, 1, 2),
    "contract_dilation": True,
}

# Stems, to which "weight" and "bias" are appended: the original's, MMDetection's.
_BATCHFORMER_LAYER = (
    *("self_attn.in_proj_", "self_attn.out_proj."),
    *("linear1.", "linear2.", "norm1.", "norm2."),
)
_FEED_FORWARD = {"linear1.": "ffn.layers.0.0.", "linear2.": "ffn.layers.1."}
_SELF_ATTENTION = {
    "self_attn.in_proj_": "self_attn.attn.in_proj_",
    "self_attn.out_proj.": "self_attn.attn.out_proj.",
}
_ENCODER_NORMS = {"norm1.": "norms.0.", "norm2.": "norms.1."}
_DECODER_NORMS = {**_ENCODER_NORMS, "norm3.": "norms.2."}
_SAMPLING = ("sampling_offsets.", "attention_weights.", "value_proj.", "output_proj.")
_PROJECTIONS = ("qcontent_proj.", "qpos_proj.", "kcontent_proj.", "kpos_proj.", "v_proj.")
_ENCODER_LAYER = {**_SELF_ATTENTION, **_FEED_FORWARD, **_ENCODER_NORMS}
_DEFORMABLE_ENCODER_LAYER = {
    **{f"self_attn.{stem}": f"self_attn.{stem}" for stem in _SAMPLING},
    **_FEED_FORWARD,
    **_ENCODER_NORMS,
}
_DECODER_LAYERS = {
    "DETR": {
        **_SELF_ATTENTION,
        "multihead_attn.in_proj_": "cross_attn.attn.in_proj_",
        "multihead_attn.out_proj.": "cross_attn.attn.out_proj.",
        **_FEED_FORWARD,
        **_DECODER_NORMS,
    },
    "ConditionalDETR": {
        **{f"sa_{stem}": f"self_attn.{stem}" for stem in _PROJECTIONS},
        **{f"ca_{stem}": f"cross_attn.{stem}" for stem in (*_PROJECTIONS, "qpos_sine_proj.")},
        **{f"{name}_attn.out_proj.": f"{name}_attn.out_proj." for name in ("self", "cross")},
        **_FEED_FORWARD,
        **_DECODER_NORMS,
    },
    "DeformableDETR": {
        **_SELF_ATTENTION,
        **{f"cross_attn.{stem}": f"cross_attn.{stem}" for stem in _SAMPLING},
        **_FEED_FORWARD,
        # Numbered as the layer's parts are written down; the self-attention comes first in both.
        **{"norm2.": "norms.0.", "norm1.": "norms.1.", "norm3.": "norms.2."},
    },
}


_MASK_HEAD = {
    "bbox_attention.q_linear.": "query_proj.",
    "bbox_attention.k_linear.": "key_proj.",
    **{f"mask_head.lay{i}.": f"convs.{i - 1}." for i in range(1, 6)},
    **{f"mask_head.gn{i}.": f"norms.{i - 1}." for i in range(1, 6)},
    **{f"mask_head.adapter{i}.": f"laterals.{i - 1}." for i in range(1, 4)},
    "mask_head.out_lay.": "output.",
}


@dataclass(frozen=True)
class DetrConversion:
    """A whole detector for MMDetection.

    Attributes:
        detector: MMDetection's class: "DETR", "ConditionalDETR" or "DeformableDETR"; or
            "PanopticDETR" of :mod:`mm_plugins.panoptic_detr`.
        tensors: by MMDetection's names, BatchFormer's as
            :class:`mm_plugins.batchformer.BatchFormers` names them.
        settings: needed in MMDetection's config of the model, with the config's nesting.
        batchformer: arguments of :class:`mm_plugins.batchformer.BatchFormers`; empty without it.
        from_coco_ids: whether the classifier's ids of COCO became MMDetection's classes: 91 became
            80, or of a panoptic detector 250 became 133.
        lacks_masks: whether it was trained for panoptic segmentation, but has no mask head yet.
    """

    detector: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    batchformer: dict[str, Any]
    from_coco_ids: bool
    lacks_masks: bool = False


def is_original_detr(names: Iterable[str]) -> bool:
    """Tell whether a state dict is a DETR's in an original repository's spelling."""
    return any(
        name.removeprefix(_OF_PANOPTIC_MODEL).startswith("transformer.encoder.layers.0.")
        for name in names
    )


def convert_detr(source: Mapping[str, Tensor], args: Mapping[str, Any]) -> DetrConversion:
    """Convert a detector of an original repository for MMDetection.

    It computes the same as the original, with one exception: a softmax over MMDetection's classes
    lacks the ids that are no category of COCO. The original gives them a small score.

    Args:
        source: state dict of the detector.
        args: the arguments of its training, which the repositories save beside it; may be empty.
            Read for what no tensor tells: ``insert_idx``, the layers of BatchFormers with shared
            weights (default: the first), ``dilation`` (DC5), ``nheads`` and ``num_queries``.

    Raises:
        ValueError: if tensors are missing, or MMDetection has no place for a tensor or no such
            detector.
    """
    if args.get("nheads", 8) != 8:
        raise ValueError(
            f"args.nheads is {args['nheads']}, which no tensor tells; MMDetection's configs have 8"
        )
    known: dict[str, Tensor] = {}
    for name, tensor in source.items():
        name = name.removeprefix(_OF_PANOPTIC_MODEL)
        for duplicate, original in _DUPLICATES.items():
            if name.startswith(duplicate):
                name = original + name.removeprefix(duplicate)
        known.setdefault(name, tensor)
    detector = _detector(known)
    two_stage = "transformer.enc_output.weight" in known
    # Without any layer, report the first one's tensors as missing.
    encoder_layers = _count("transformer.encoder.layers.", known) or 1
    decoder_layers = _count("transformer.decoder.layers.", known) or 1
    num_levels = _count("input_proj.", known) or 1
    batchformer = _find_batchformer(known, args)

    names = dict(_layer_names(detector, encoder_layers, decoder_layers))
    if detector == "DeformableDETR":
        names.update(_deformable_names(known, num_levels, decoder_layers, two_stage))
    else:
        names.update(_single_level_names(detector))
    has_masks = detector == "DETR" and any(n.startswith("mask_head.") for n in known)
    if has_masks:
        names.update(_mask_head_names())
    names.update(_batchformer_names(known, batchformer))
    _check_names(detector, names, known)
    backbone = find_backbone(source)
    names.update({n: n.replace(_BODY, "backbone.") for n in known if n.startswith(_BODY)})

    # Copies, as saving a view writes more than the values.
    tensors = {new: known[old].detach().clone().contiguous() for old, new in names.items()}
    classifiers = [new for old, new in names.items() if old.startswith("class_embed.")]
    num_outputs = len(tensors[classifiers[0]])
    no_object = detector == "DETR"  # an output of its own, the last in both
    is_panoptic = no_object and num_outputs == _PANOPTIC_OUTPUTS
    from_coco_ids = is_panoptic or num_outputs == 91 + no_object
    if from_coco_ids:
        for name in classifiers:
            rows = [*_COCO_IDS, num_outputs - 1] if no_object else _COCO_IDS
            if is_panoptic:
                rows[-1:-1] = _COCO_STUFF_IDS
            if two_stage and name.startswith(f"bbox_head.cls_branches.{decoder_layers}."):
                # For the encoder's proposals only the first output counts: is there any object?
                rows = [0, *_COCO_IDS[1:]]
            tensors[name] = tensors[name][rows]
        num_outputs = len(rows)

    settings: dict[str, Any] = {
        "backbone": {"depth": backbone.depth},
        "encoder": {"num_layers": encoder_layers},
        "decoder": {"num_layers": decoder_layers},
        "bbox_head": {"num_classes": num_outputs - no_object},
    }
    num_queries = args.get("num_queries") if two_stage else len(known["query_embed.weight"])
    if num_queries is not None:
        settings["num_queries"] = num_queries
    if detector == "DeformableDETR":
        settings |= {
            "num_feature_levels": num_levels,
            "with_box_refine": any("transformer.decoder.bbox_embed." in name for name in source),
            "as_two_stage": two_stage,
            # MMDetection's default leaves out the bias of convolutions before a norm.
            "neck": {"bias": True},
        }
        if num_levels == 1:
            channels = known["input_proj.0.0.weight"].shape[1]
            settings["backbone"]["out_indices"] = (3,)
            settings["neck"] |= {"in_channels": [channels], "num_outs": 1}
            levels = {"num_levels": 1}
            settings["encoder"]["layer_cfg"] = {"self_attn_cfg": levels}
            settings["decoder"]["layer_cfg"] = {"cross_attn_cfg": levels}
    if args.get("dilation"):
        settings["backbone"] |= _DC5
    if has_masks or is_panoptic:
        detector = "PanopticDETR"
        settings["backbone"]["out_indices"] = (0, 1, 2, 3)
        # Of classes of one's own no tensor tells which are stuff.
        num_stuff = len(_COCO_STUFF_IDS) if is_panoptic else 0
        num_things = settings["bbox_head"]["num_classes"] - num_stuff
        settings["panoptic_head"] = {
            "num_things_classes": num_things,
            "num_stuff_classes": num_stuff,
        }
    return DetrConversion(
        detector, tensors, settings, batchformer, from_coco_ids, is_panoptic and not has_masks
    )


def _detector(names: Collection[str]) -> str:
    if "transformer.level_embed" in names:
        return "DeformableDETR"
    if "transformer.decoder.layers.0.sa_v_proj.weight" in names:
        return "ConditionalDETR"
    return "DETR"


def _count(prefix: str, names: Iterable[str]) -> int:
    """Count the numbered modules below a prefix."""
    numbers = (n.removeprefix(prefix).partition(".")[0] for n in names if n.startswith(prefix))
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def _parameters(source: str, target: str) -> Iterator[tuple[str, str]]:
    yield from ((source + parameter, target + parameter) for parameter in ("weight", "bias"))


def _layer_names(detector: str, encoder: int, decoder: int) -> Iterator[tuple[str, str]]:
    """Pair the layers' names in the original with MMDetection's."""
    encoder_layer = _ENCODER_LAYER
    if detector == "DeformableDETR":
        encoder_layer = _DEFORMABLE_ENCODER_LAYER
    for part, layer, num_layers in (
        ("encoder", encoder_layer, encoder),
        ("decoder", _DECODER_LAYERS[detector], decoder),
    ):
        for i in range(num_layers):
            for source, target in layer.items():
                if source == "ca_qpos_proj." and i > 0:
                    continue  # only the first layer projects the queries' positions
                prefix = f"{part}.layers.{i}."
                yield from _parameters(f"transformer.{prefix}{source}", prefix + target)


def _single_level_names(detector: str) -> Iterator[tuple[str, str]]:
    """Pair the other names of DETR and Conditional DETR with MMDetection's."""
    yield "query_embed.weight", "query_embedding.weight"
    for source, target in (
        ("transformer.decoder.norm.", "decoder.post_norm."),
        ("input_proj.", "neck.convs.0.conv."),
        ("class_embed.", "bbox_head.fc_cls."),
        ("bbox_embed.layers.0.", "bbox_head.reg_ffn.layers.0.0."),
        ("bbox_embed.layers.1.", "bbox_head.reg_ffn.layers.1."),
        ("bbox_embed.layers.2.", "bbox_head.fc_reg."),
    ):
        yield from _parameters(source, target)
    if detector == "ConditionalDETR":
        for mlp in ("query_scale", "ref_point_head"):
            for target in (f"decoder.{mlp}.layers.0.", f"decoder.{mlp}.layers.1."):
                yield from _parameters(f"transformer.{target}", target)


def _deformable_names(
    source: Mapping[str, Tensor], num_levels: int, decoder_layers: int, two_stage: bool
) -> Iterator[tuple[str, str]]:
    """Pair the other names of Deformable DETR with MMDetection's."""
    yield "transformer.level_embed", "level_embed"
    if two_stage:
        for stem, target in (("enc_output", "memory_trans"), ("pos_trans", "pos_trans")):
            yield from _parameters(f"transformer.{stem}.", f"{target}_fc.")
            yield from _parameters(f"transformer.{stem}_norm.", f"{target}_norm.")
    else:
        yield "query_embed.weight", "query_embedding.weight"
        yield from _parameters("transformer.reference_points.", "reference_points_fc.")
    num_maps = 0  # of the backbone; convolutions of 3×3 make the levels beyond
    for level in range(num_levels):
        kernel = source.get(f"input_proj.{level}.0.weight")
        if kernel is not None and kernel.shape[-1] == 1:
            num_maps = level + 1
            target = f"neck.convs.{level}"
        else:
            target = f"neck.extra_convs.{level - num_maps}"
        yield from _parameters(f"input_proj.{level}.0.", f"{target}.conv.")
        yield from _parameters(f"input_proj.{level}.1.", f"{target}.gn.")
    for i in range(decoder_layers + two_stage):
        yield from _parameters(f"class_embed.{i}.", f"bbox_head.cls_branches.{i}.")
        for j in range(3):
            target = f"bbox_head.reg_branches.{i}.{2 * j}."  # activations are numbered, too
            yield from _parameters(f"bbox_embed.{i}.layers.{j}.", target)


def _mask_head_names() -> Iterator[tuple[str, str]]:
    """Pair the names of DETR's mask head with those of :mod:`mm_plugins.panoptic_detr`."""
    for source, target in _MASK_HEAD.items():
        yield from _parameters(source, f"panoptic_head.masks.{target}")


def _find_batchformer(names: Iterable[str], args: Mapping[str, Any]) -> dict[str, Any]:
    matches = [match for match in map(_BATCHFORMER.match, names) if match]
    if not matches:
        return {}
    indices = sorted({int(match[1]) for match in matches if match[1]})
    share = not indices
    return {
        "insert_after": tuple(indices or sorted(set(args.get("insert_idx") or (0,)))),
        "share": share,
        "num_layers": max(int(match[2] or 0) for match in matches) + 1,
    }


def _batchformer_names(
    names: Collection[str], batchformer: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    if not batchformer:
        return
    indices, share = batchformer["insert_after"], batchformer["share"]
    is_stack = any(re.match(r"transformer\.bf\.(\d+\.)?layers\.", name) for name in names)
    for i in indices[:1] if share else indices:
        for n in range(batchformer["num_layers"]):
            source = "transformer.bf." + (f"{i}." if not share else "")
            source += f"layers.{n}." if is_stack else ""
            for stem in _BATCHFORMER_LAYER:
                target = f"encoder.batchformer.{i}.layers.{n}.{stem}"
                yield from _parameters(source + stem, target)


def _check_names(detector: str, expected: Collection[str], found: Iterable[str]) -> None:
    found = [name for name in found if not name.startswith(_BODY)]
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"no whole {detector}: it has no {_in_short(missing)}")
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise ValueError(
            f"MMDetection's {detector} has no place for {_in_short(unknown)}; it has no learned "
            "positions, no norms before the attention, a mask head only in the plain DETR, and "
            "those of the original's descendants are detectors of their own"
        )


def _in_short(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
