#!/usr/bin/env python
"""Makes pretrained weights for Detectron2 or MMDetection out of other ones.

    tools/convert_checkpoint.py SOURCE OUT.pth --to d2 --config your.yaml
    tools/convert_checkpoint.py SOURCE OUT.pth --to mm --config your_config.py

SOURCE is a ResNet-18, 34, 50, 101 or 152 or a MobileNetV2, with triplet attention or without it:
the authors' classifiers, torchvision's and timm's, Detectron2's .pkl, a checkpoint of a detector of
either framework. Use OUT as

    MODEL.WEIGHTS OUT.pth                                                       in Detectron2
    model.backbone.init_cfg = dict(type="Pretrained", checkpoint="OUT.pth")     in MMDetection

Without --config OUT is for a backbone with triplet attention in every block.

SOURCE may also be a whole DETR, Conditional DETR or Deformable DETR of the original repositories,
with BatchFormerV2 or without it. OUT is then MMDetection's (--to mm), `load_from` in its config; it
is the backbone alone with --to d2 or --backbone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from detr_settings import as_config, check_detr, describe, model_settings
from torch import Tensor

from plugin_core.checkpoints.conversion import (
    Backbone,
    Conversion,
    attention_arguments,
    convert,
    find_backbone,
)
from plugin_core.checkpoints.detr_conversion import DetrConversion, convert_detr, is_original_detr
from plugin_core.checkpoints.pixel_format import (
    TORCHVISION,
    PixelFormat,
    explain_mismatch,
    pixel_format_of,
)
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.files import replacing

FRAMEWORKS = {"d2": "Detectron2", "mm": "MMDetection"}
SUFFIXES = {"d2": (".pth", ".pkl"), "mm": (".pth",)}
STAGES = ("res2", "res3", "res4", "res5")
SHOWN = 6  # names or groups of names in a line


@dataclass(frozen=True)
class Target:
    """What the weights are for, and the pixels that its config gives it."""

    state_dict: dict[str, Tensor]
    pixel_settings: Callable[[PixelFormat], dict[str, tuple[str, Any]]]
    pixel_format: PixelFormat | None = None


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_args(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; nothing was written", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes pretrained weights for Detectron2 or MMDetection."
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint to convert")
    parser.add_argument(
        "out", metavar="OUT", help="file to write: .pth, or .pkl as Detectron2's model zoo has it"
    )
    parser.add_argument(
        "--to", required=True, choices=FRAMEWORKS, help="d2: Detectron2, mm: MMDetection"
    )
    parser.add_argument(
        "--config",
        help="of the model that the weights are for: Detectron2's yaml, MMDetection's Python file "
        "(default: the same backbone with triplet attention in every block; the same DETR)",
    )
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="of a whole DETR of the original repositories take the backbone alone",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let SOURCE run what it asks for; only for a file whose origin you know",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Convert, report and write; raises ValueError or OSError, and then nothing is written."""
    check_out(args.out, args.source, args.to)
    # What mmengine's checkpoints hold besides tensors is allowed by this import, where MMDetection
    # is installed with versions that fit it.
    with contextlib.suppress(ImportError, AssertionError):
        import_module("mm_plugins")
    # The original DETRs save their arguments, plain values; an older PyTorch has no such list.
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint = read_checkpoint(args.source, trust=args.trust)
    source = find_state_dict(checkpoint)
    if is_original_detr(source) and not args.backbone:
        if args.to == "mm":
            run_detr(args, checkpoint, source)
            return
        print(
            "SOURCE is a whole DETR, of which Detectron2 can use the backbone alone; for "
            "MODEL.META_ARCHITECTURE MMDetDetector convert it with --to mm"
        )
    try:
        backbone = find_backbone(source)
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from error
    print(f"{args.source}: {backbone}")
    target = build_target(args, backbone, attention_arguments(source))
    try:
        conversion = convert(source, target.state_dict)
    except ValueError as error:
        model = f"--config {args.config}" if args.config else "the default model"
        raise ValueError(f"{args.source} for {model}: {error}") from error
    wanted = pixel_format_of(checkpoint)
    report(conversion)
    report_pixels(args, wanted, target)
    write(args.out, args.to, conversion.tensors, wanted)
    use = {
        "d2": f"MODEL.WEIGHTS {args.out}, or train.init_checkpoint={args.out} in a LazyConfig",
        "mm": f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint='{args.out}')",
    }
    print(f"wrote {args.out}; use it as {use[args.to]}")


def run_detr(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], source: Mapping[str, Tensor]
) -> None:
    """Like :func:`run`, for a whole detector of the original repositories."""
    training = checkpoint.get("args")
    if isinstance(training, argparse.Namespace):
        training = vars(training)
    try:
        conversion = convert_detr(source, training if isinstance(training, Mapping) else {})
    except ValueError as error:
        raise ValueError(
            f"{args.source}: {error}. With --backbone its backbone alone is converted"
        ) from error
    print(f"{args.source}: {describe(conversion)}")
    with saying_where(args):
        target = detr_target(args.config, conversion)
    report_detr(conversion, target)
    report_pixels(args, TORCHVISION, target)
    write(args.out, args.to, conversion.tensors, TORCHVISION)
    print(f"wrote {args.out}; use it as load_from='{args.out}' in a config with")
    print(f"model = {as_config(model_settings(conversion))}")


def check_out(out: str, source: str, to: str) -> None:
    path = Path(out)
    if path.suffix not in SUFFIXES[to]:
        raise ValueError(
            f"OUT {out!r}: {FRAMEWORKS[to]} takes a file that ends in {' or '.join(SUFFIXES[to])}"
        )
    if not path.parent.is_dir():
        raise ValueError(f"OUT {out!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.is_dir():
        raise ValueError(f"OUT {out!r} is a folder; name a file")
    if path.exists() and os.path.exists(source) and path.samefile(source):
        raise ValueError(f"OUT {out!r} is SOURCE; name another file")


# --- the target --------------------------------------------------------------------------- #


def build_target(args: argparse.Namespace, backbone: Backbone, attention: dict[str, Any]) -> Target:
    """Build what the config says, or the same backbone with attention; raises ValueError."""
    if args.to == "d2" and backbone.depth is None:
        raise ValueError(f"{args.source}: Detectron2 has no MobileNetV2; convert it with --to mm")
    build: Callable[..., Target] = detectron2_target if args.to == "d2" else mmdetection_target
    with saying_where(args):
        target = build(args.config, backbone.depth, attention)
        find_backbone(target.state_dict)
    return target


@contextlib.contextmanager
def saying_where(args: argparse.Namespace) -> Iterator[None]:
    """Turn what the framework, or its absence, raises inside into a ValueError that says where."""
    try:
        import_module(f"{args.to}_plugins")  # says what to install where the framework is missing
        yield
    except ImportError as error:
        raise ValueError(f"--to {args.to}: {error}") from error
    except Exception as error:  # the frameworks raise anything for a setting that is wrong
        where = f"--config {args.config}" if args.config else f"--to {args.to}"
        raise ValueError(f"{where}: {error}") from error


def detectron2_target(config: str | None, depth: int, attention: dict[str, Any]) -> Target:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone, build_model

    from d2_plugins import add_plugin_config, merge_config
    from d2_plugins.mmdet_bridge import is_bridge
    from d2_plugins.pixels import pixel_format, pixel_settings

    cfg = get_cfg()
    add_plugin_config(cfg)
    if config is None:
        resnets = cfg.MODEL.RESNETS
        cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        resnets.DEPTH = depth
        resnets.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
        resnets.OUT_FEATURES = resnets.TRIPLET_ATTENTION.STAGES = list(STAGES)
        for argument, value in attention.items():
            setattr(resnets.TRIPLET_ATTENTION, argument.upper(), value)
        return Target(build_backbone(cfg).state_dict(), pixel_settings)
    if config.endswith(".py"):
        raise ValueError("is a LazyConfig; take a yaml config of the same backbone, or none")
    merge_config(cfg, config, ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", "0"])
    if is_bridge(cfg):
        raise ValueError(
            "is of a detector of MMDetection, and so are its weights: "
            f"use --to mm --config {cfg.MODEL.MMDET.CONFIG}"
        )
    model = build_model(cfg)
    state_dict = getattr(model.backbone, "bottom_up", model.backbone).state_dict()
    res5 = getattr(getattr(model, "roi_heads", None), "res5", None)
    if res5 is not None:  # a C4 detector; Detectron2 matches names by their ends
        state_dict.update({f"res5.{name}": t for name, t in res5.state_dict().items()})
    return Target(state_dict, pixel_settings, pixel_format(cfg))


def mmdetection_target(config: str | None, depth: int | None, attention: dict[str, Any]) -> Target:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    from mm_plugins.analysis import load_config
    from mm_plugins.pixels import pixel_format, pixel_settings

    register_all_modules(init_default_scope=False)
    pixels = None
    if config is None:
        position = "after_conv3" if depth and depth >= 50 else "after_conv2"
        settings: dict[str, Any] = {"type": "PluginResNet", "depth": depth}
        if depth is None:
            position, settings = "after_linear_conv", {"type": "PluginMobileNetV2"}
        layer = {"type": "TripletAttention", **attention}
        settings["plugins"] = [{"cfg": layer, "position": position}]
    else:
        model = load_config(config).model
        settings = model.backbone
        pixels = pixel_format(model, settings)
    with DefaultScope.overwrite_default_scope("mmdet"):
        built = MODELS.build({**settings, "init_cfg": None})
    return Target(built.state_dict(), pixel_settings, pixels)


def detr_target(config: str | None, conversion: DetrConversion) -> Target:
    """The detector of a config, which must be the converted one; raises ValueError."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    from mm_plugins.analysis import load_config
    from mm_plugins.pixels import pixel_format, pixel_settings

    if config is None:
        return Target(conversion.tensors, pixel_settings)
    register_all_modules(init_default_scope=False)
    settings = load_config(config).model
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        model = MODELS.build(settings)
    check_detr(conversion, model)
    return Target(model.state_dict(), pixel_settings, pixel_format(settings, settings.backbone))


# --- what is said and written --------------------------------------------------------------- #


def report(conversion: Conversion) -> None:
    total = len(conversion.tensors) + len(conversion.fresh)
    print(f"matched {len(conversion.matched)} of the backbone's {total} tensors")
    if conversion.implied:
        print(f"set to what the source computes without them: {in_short(conversion.implied)}")
    print(f"fresh, as SOURCE has none: {in_short(conversion.fresh)}")
    print(f"unused of SOURCE: {in_short(conversion.unused)}")


def report_detr(conversion: DetrConversion, target: Target) -> None:
    if conversion.from_coco_ids:
        print("classes: the 80 categories of COCO, of its 91 ids")
    places = [n for n in target.state_dict if not n.endswith("num_batches_tracked")]
    fresh = [n for n in places if n not in conversion.tensors]
    unused = [n for n in conversion.tensors if n not in target.state_dict]
    print(f"matched {len(places) - len(fresh)} of the detector's {len(places)} tensors")
    print(f"fresh, as SOURCE has none: {in_short(fresh)}")
    print(f"unused of SOURCE: {in_short(unused)}")


def in_short(names: list[str]) -> str:
    """Names, or if they are many, how many there are of each kind."""
    if len(names) <= SHOWN:
        return ", ".join(names) or "none"
    kinds: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for name in names:
        parts = re.sub(r"\d+", "*", name).split(".")
        kinds[tuple(parts[:3])].append(parts)
    largest = sorted(kinds.values(), key=len, reverse=True)
    shown = [f"{'.'.join(os.path.commonprefix(kind))} ({len(kind)})" for kind in largest[:SHOWN]]
    rest = sum(map(len, largest[SHOWN:]))
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def report_pixels(args: argparse.Namespace, wanted: PixelFormat | None, target: Target) -> None:
    if wanted is None:
        print("pixels: unknown; set those that the weights were trained with")
        return
    settings = target.pixel_settings(wanted)
    if wanted.stride_in_1x1 is None:
        del settings["stride_in_1x1"]
    print("pixels: " + ", ".join(f"{name} = {value!r}" for name, value in settings.values()))
    if target.pixel_format is not None:
        used = target.pixel_format
        for text in explain_mismatch(args.source, wanted, used, target.pixel_settings):
            print(f"warning: {args.config}: {text}", file=sys.stderr)


def write(
    out: str, to: str, tensors: Mapping[str, Tensor], pixel_format: PixelFormat | None
) -> None:
    """Write the file whole or not at all."""
    record = {} if pixel_format is None else {"pixel_format": asdict(pixel_format)}
    content: dict[str, Any] = {"state_dict": dict(tensors), "meta": record}
    if to == "d2":
        # Without the prefix that a detector gives to its backbone: that is what heuristics are for.
        model = {n: t.numpy() if out.endswith(".pkl") else t for n, t in tensors.items()}
        content = {"model": model, "matching_heuristics": True, "__author__": "detection-plugins"}
        content |= record
    with replacing(out) as file:
        if out.endswith(".pkl"):
            pickle.dump(content, file)
        else:
            torch.save(content, file)


if __name__ == "__main__":
    sys.exit(main())
