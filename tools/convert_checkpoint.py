#!/usr/bin/env python
"""Convert pretrained weights for Detectron2, MMDetection or MMPretrain.

    tools/convert_checkpoint.py SOURCE OUT.pth --to d2 --config your.yaml
    tools/convert_checkpoint.py SOURCE OUT.pth --to mm --config your_config.py
    tools/convert_checkpoint.py SOURCE OUT.pth --to mmpretrain

SOURCE is a ResNet-18, 34, 50, 101 or 152 or a MobileNetV2, with triplet attention or without it:
the authors' classifiers, torchvision's, timm's ResNets, MoCo's, those of IDA's public reproduction,
Detectron2's .pkl, a checkpoint of a detector of either framework. Use OUT as

    MODEL.WEIGHTS OUT.pth                                                       in Detectron2
    model.backbone.init_cfg = dict(type="Pretrained", checkpoint="OUT.pth")     in MMDetection

Without --config, OUT is for a backbone with SOURCE's block plugins. If SOURCE has none, OUT is for
a backbone with triplet attention in every block.

SOURCE may also be a whole DETR, Conditional DETR or Deformable DETR of the original repositories,
with BatchFormerV2 or without it, the first also with its mask head. With --to mm, OUT is then a
whole detector, for `load_from` in MMDetection's config. With --to d2 or --backbone, OUT is the
backbone alone.

With --to mmpretrain, SOURCE is a whole image classifier, and OUT is one for
tools/test_mmpretrain.py or `load_from`: triplet attention's authors', torchvision's, timm's, or of
IDA's public reproduction. A backbone alone is converted with --to mm, as the names are the same.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugin_core.checkpoints.classifier_conversion import (
    ClassifierConversion,
    convert_ida,
    is_ida_reproduction,
    linear_classifier,
)
from plugin_core.checkpoints.conversion import (
    TIMM_CHILD,
    Backbone,
    FoundPlugin,
    branch_of,
    convert,
    find_backbone,
    plugins_in,
)
from plugin_core.checkpoints.detr_conversion import convert_detr, is_original_detr
from plugin_core.checkpoints.detr_settings import as_config, describe, model_settings
from plugin_core.checkpoints.pixel_format import (
    TORCHVISION,
    PixelFormat,
    explain_mismatch,
    pixel_format_of,
)
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.checkpoints.report import Target, in_short, report, report_detr, report_pixels
from plugin_core.files import replacing

FRAMEWORKS = {"d2": "Detectron2", "mm": "MMDetection", "mmpretrain": "MMPretrain"}
_TRAINING_ARGUMENTS = {"dilation": bool, "insert_idx": list, "nheads": int, "num_queries": int}
SUFFIXES = {"d2": (".pth", ".pkl"), "mm": (".pth",), "mmpretrain": (".pth",)}


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
        description="Makes pretrained weights for Detectron2, MMDetection or MMPretrain."
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint to convert")
    parser.add_argument(
        "out", metavar="OUT", help="file to write: .pth, or .pkl as Detectron2's model zoo has it"
    )
    parser.add_argument(
        "--to",
        required=True,
        choices=FRAMEWORKS,
        help="d2: Detectron2, mm: MMDetection, mmpretrain: MMPretrain, for a whole classifier",
    )
    parser.add_argument(
        "--config",
        help="of the model that the weights are for: Detectron2's yaml, MMDetection's Python file "
        "(default: the same backbone, with triplet attention in every block if it has no block "
        "plugin; the same DETR)",
    )
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="of a whole DETR of the original repositories take the backbone alone",
    )
    parser.add_argument(
        "--branch",
        metavar="NAME",
        help="of a self-supervised training take the network with this first part of its names, "
        "such as encoder_k (default: what MoCo evaluates, v2's encoder_q or v3's base_encoder)",
    )
    parser.add_argument(
        "--args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="arguments of a DETR's original training that SOURCE does not hold: dilation=True for "
        "DC5, insert_idx=[0,1] for shared BatchFormers, num_queries=300 for two stages",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let SOURCE run what it asks for; only for a file whose origin you know",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Convert, report and write; raises ValueError or OSError, before anything is written."""
    check_out(args.out, args.source, args.to)
    # This import allows the objects in mmengine's checkpoints that are no tensors. It works only
    # where MMDetection is installed with fitting versions.
    with contextlib.suppress(ImportError, AssertionError):
        import_module("mm_plugins")
    # The original DETRs save their arguments, plain values. An older PyTorch has no list to allow.
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint = read_checkpoint(args.source, trust=args.trust)
    source = find_state_dict(checkpoint)
    is_detr = is_original_detr(source)
    if args.args and not (is_detr and args.to == "mm" and not args.backbone):
        raise ValueError(
            "--args: are of a whole DETR of the original repositories, with --to mm; leave them out"
        )
    if args.to == "mmpretrain":
        run_classifier(args, checkpoint, source)
        return
    if is_detr and args.branch:
        raise ValueError(f"--branch {args.branch}: SOURCE is a DETR, which has one network")
    if is_detr and not args.backbone:
        if args.to == "mm":
            run_detr(args, checkpoint, source)
            return
        print(
            "SOURCE is a whole DETR, of which Detectron2 can use the backbone alone; for "
            "MODEL.META_ARCHITECTURE MMDetDetector convert it with --to mm"
        )
    try:
        source = branch_of(source, args.branch)
        backbone = find_backbone(source)
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from error
    print(f"{args.source}: {backbone}")
    tell_averages(checkpoint)
    target = build_target(args, backbone, source)
    try:
        conversion = convert(source, target.state_dict)
    except ValueError as error:
        model = f"--config {args.config}" if args.config else "the default model"
        raise ValueError(f"{args.source} for {model}: {error}") from error
    wanted = pixel_format_of(checkpoint)
    print(report(conversion))
    print_pixels(args, wanted, target)
    write(args, conversion.tensors, wanted)
    use = {
        "d2": f"MODEL.WEIGHTS {args.out}, or train.init_checkpoint={args.out} in a LazyConfig",
        "mm": f"model.backbone.init_cfg=dict(type='Pretrained', checkpoint='{args.out}')",
    }
    print(f"wrote {args.out}; use it as {use[args.to]}")


def tell_averages(checkpoint: Mapping[str, Any]) -> None:
    if "state_dict_ema" in checkpoint:
        print(
            "SOURCE also holds state_dict_ema, the moving averages of timm's training; the weights "
            "themselves are taken. timm's clean_checkpoint.py makes a file of the averages"
        )


def run_detr(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], source: Mapping[str, Tensor]
) -> None:
    """Convert, report and write a whole detector of the original repositories, as :func:`run`."""
    training = checkpoint.get("args")
    if isinstance(training, argparse.Namespace):
        training = vars(training)
    if not isinstance(training, Mapping):
        training = {}
        print(
            "SOURCE does not hold the arguments of its training; is it DC5? Then say --args "
            "dilation=True"
        )
    try:
        conversion = convert_detr(source, {**training, **training_arguments(args.args)})
    except ValueError as error:
        raise ValueError(
            f"{args.source}: {error}. With --backbone its backbone alone is converted"
        ) from error
    print(f"{args.source}: {describe(conversion)}")
    with saying_where(args):
        target = checkpoints(args.to).detr_target(args.config, conversion)
    print(report_detr(conversion, target))
    print_pixels(args, TORCHVISION, target)
    write(args, conversion.tensors, TORCHVISION)
    print(f"wrote {args.out}; use it as load_from='{args.out}' in a config with")
    print(f"model = {as_config(model_settings(conversion))}")


def run_classifier(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], source: Mapping[str, Tensor]
) -> None:
    """Convert, report and write a whole image classifier, as :func:`run`."""
    is_ida = is_ida_reproduction(source)
    for option in ("config", "backbone", "branch") if is_ida else ("backbone", "branch"):
        if getattr(args, option):
            raise ValueError(f"--{option}: is not for --to mmpretrain; leave it out")
    if "head.fc.weight" in source:
        raise ValueError(f"{args.source}: is a classifier of MMPretrain; use it as it is")
    tell_averages(checkpoint)
    try:
        backbone = find_backbone(source)
        if is_ida:
            conversion, settings, pixels = convert_ida(source), {}, TORCHVISION
        else:
            pixels = pixel_format_of(checkpoint)
            conversion, settings = convert_linear(args, source, backbone)
            if pixels is not None and pixels.stride_in_1x1 and not args.config:
                settings["backbone"]["style"] = "caffe"
    except ValueError as error:
        raise ValueError(f"{args.source}: {error}") from error
    what = "a linear classifier"
    if is_ida:
        what = (
            f"IDA ({'heavy' if conversion.head['heavy'] else 'light'}), the public reproduction's"
        )
    print(f"{args.source}: {backbone}; its head is {what}")
    print(f"matched all of its tensors; unused of SOURCE: {in_short(conversion.unused)}")
    if pixels is None:
        print("pixels: unknown; set data_preprocessor as in the training of the weights")
    else:
        is_rgb, mean, std = pixels.channel_order == "RGB", list(pixels.mean), list(pixels.std)
        print(f"pixels: data_preprocessor = dict(to_rgb={is_rgb}, mean={mean}, std={std})")
    if is_ida:
        print("of a training with --orid_norm, which no tensor tells: mean=[0] * 3, std=[255] * 3")
    content = {"state_dict": conversion.tensors, "meta": {}}
    if pixels is not None:
        content["meta"] = {"pixel_format": asdict(pixels)}
    with replacing(args.out) as file:
        torch.save(content, file)
    print(
        f"wrote {args.out}; use it with tools/test_mmpretrain.py, or as load_from, in a config with"
    )
    print(args.config or f"model = {as_config({**settings, 'head': conversion.head})}")


def convert_linear(
    args: argparse.Namespace, source: Mapping[str, Tensor], backbone: Backbone
) -> tuple[ClassifierConversion, dict[str, Any]]:
    """Convert a backbone with a linear classifier, and give the backbone's settings."""
    target = build_target(args, backbone, source)
    conversion = linear_classifier(source, backbone, convert(source, target.state_dict))
    if args.config:
        return conversion, {}
    settings = checkpoints(args.to).backbone_settings(backbone.depth, plugins_in(source))
    return conversion, {"backbone": settings}


def training_arguments(texts: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE, with values as in Python."""
    arguments = {}
    for text in texts:
        name, _, value = text.partition("=")
        kind = _TRAINING_ARGUMENTS.get(name)
        if kind is None:
            raise ValueError(
                f"--args {text}: must be NAME=VALUE, with {', '.join(_TRAINING_ARGUMENTS)} as NAME"
            )
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[name] = value
        value = arguments[name]
        if type(value) is not kind or (kind is list and any(type(i) is not int for i in value)):
            words = "a list of whole numbers" if kind is list else f"of type {kind.__name__}"
            raise ValueError(f"--args {text}: must be {words}, as in Python")
    return arguments


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


def build_target(
    args: argparse.Namespace, backbone: Backbone, source: Mapping[str, Tensor]
) -> Target:
    """Build the config's model, or the same backbone with plugins; raises ValueError."""
    if args.to == "d2" and backbone.depth is None:
        raise ValueError(f"{args.source}: Detectron2 has no MobileNetV2; convert it with --to mm")
    with saying_where(args):
        framework = checkpoints(args.to)
        if args.config is None:
            stages = tuple(range(1, 5 if backbone.depth else 8))
            everywhere = FoundPlugin("triplet_attention", stages, False, {})
            found = plugins_in(source)
            if TIMM_CHILD in backbone.plugins():
                print(
                    f"{TIMM_CHILD}, as timm calls any attention, is {found[0].name} by its tensors"
                )
            if not found and args.to != "mmpretrain":
                found = [everywhere]
            target = framework.backbone_target(backbone.depth, found)
        else:
            target = framework.config_target(args.config)
        find_backbone(target.state_dict)
    return target


@contextlib.contextmanager
def saying_where(args: argparse.Namespace) -> Iterator[None]:
    """Turn errors of the framework, or of its absence, into a ValueError that names the option."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"--to {args.to}: {error}") from error
    except Exception as error:  # the frameworks raise anything for a wrong setting
        where = f"--config {args.config}" if args.config else f"--to {args.to}"
        raise ValueError(f"{where}: {error}") from error


def checkpoints(to: str) -> Any:
    """Import the framework's side. Without the framework, its ImportError says what to install."""
    return import_module(f"{'d2' if to == 'd2' else 'mm'}_plugins.checkpoints")


def print_pixels(args: argparse.Namespace, wanted: PixelFormat | None, target: Target) -> None:
    print(report_pixels(wanted, target))
    if wanted is not None and target.pixel_format is not None:
        used = target.pixel_format
        for text in explain_mismatch(args.source, wanted, used, target.pixel_settings):
            print(f"warning: {args.config}: {text}", file=sys.stderr)


def write(
    args: argparse.Namespace, tensors: Mapping[str, Tensor], pixels: PixelFormat | None
) -> None:
    """Write the file whole or not at all."""
    is_pkl = args.out.endswith(".pkl")
    options = {"as_arrays": is_pkl} if args.to == "d2" else {}
    content = checkpoints(args.to).checkpoint_of(tensors, pixels, **options)
    with replacing(args.out) as file:
        (pickle.dump if is_pkl else torch.save)(content, file)


if __name__ == "__main__":
    sys.exit(main())
