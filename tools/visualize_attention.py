#!/usr/bin/env python
"""Draw a trained detector's attention in a detection.

    tools/visualize_attention.py output/config.yaml --weights output/model_final.pth a.jpg b.jpg \\
        --out pictures
    tools/visualize_attention.py my_config.py --weights epoch_12.pth a.jpg --out pictures \\
        --class dog --baseline mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py plain.pth
    tools/visualize_attention.py my_grounding_config.py --weights iter_1500.pth a.jpg \\
        --out pictures --phrase "the red disk" --text "the red disk, the small square."
    tools/visualize_attention.py classifier --weights resnet50_triplet.pth.tar a.jpg \\
        --out pictures --class goldfish --baseline classifier resnet50.pth

A config is one of Detectron2 (.yaml, or .py in LazyConfig's style) or of MMDetection (.py). A
training leaves its config with all settings in its output folder; a LazyConfig works as .py only.
Each image's best detection of the class is explained in a sheet, DIR/<image>_attention.png. The
main pictures of the sheet are files of their own, too:

    gradcam, gradcam++  Grad-CAMs of the detection's score over the backbone's last stage
    triplet             the three gates of the last triplet attention
    ida-queries         queries of the last IDA block that attend most to the detection's box
    …                   maps of any other block plugin that offers them, by its name
    ida-regions         where IDA's classifier looks in the region of the detection, for its class

With a detector of MMDetection that reads a text (GLIP, Grounding DINO), phrases are explained, each
in a row of the sheet:

    phrase, phrase-2 …  heatmap of the phrase's score, as in attention mask consistency: over the
                        last fusion layer's attention, or over the module in the config's
                        model.heatmap or in --layer. A cross marks the maximum; the box is the
                        phrase's best detection

The word "classifier" in place of a config stands for an ImageNet classifier: a ResNet whose
checkpoint has its fc, plain or with block plugins, in torchvision's names or those of triplet
attention's authors. Its class's logit is explained, by default that of the highest, over the middle
of the image, which is cropped as in ImageNet's evaluation.

Colours go from a map's least value to its greatest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from plugin_core.files import make_folder
from plugin_core.inspection.attention_maps import Caption
from plugin_core.inspection.choices import choose_baseline_layer, choose_layers, find_class
from plugin_core.inspection.config_kinds import FRAMEWORKS, add_register_coco, common_side
from plugin_core.inspection.opening import CLASSIFIER, load
from plugin_core.inspection.phrases import choose_grounder, phrase_rows
from plugin_core.inspection.pictures import explain
from plugin_core.inspection.sheets import Row, write


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        rows_of = prepare(args)
        make_folder("--out", args.out)
    except (OSError, ValueError) as error:
        lines = str(error).splitlines()  # a library's error can have several
        sys.exit(f"error: {' '.join(line.strip() for line in lines)}")
    drawn = 0
    for path in tqdm(args.images, unit="image"):
        try:
            write(rows_of(path), path, args.out)
            drawn += 1
        except ValueError as error:
            warn(f"{path}: {error}")
        except OSError as error:
            sys.exit(f"error: {error}")
    if not drawn:
        sys.exit("error: no picture was made; the warnings above say why")
    print(f"{drawn} of {len(args.images)} images: {args.out}/*_attention.png")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", help="a path, model_zoo://… of Detectron2, mmdet::…, or classifier"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--weights", required=True, help="checkpoint of the trained detector")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the pictures")
    parser.add_argument(
        "--class",
        dest="class_",
        metavar="NAME_OR_ID",
        help="what to explain, ids from 0 on (default: the best detection of an image)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="what to draw: gradcam, triplet, … (default: Grad-CAMs and what attention there is)",
    )
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="a module of the model in place of a default: the attention to draw, or the feature "
        "map for Grad-CAMs, such as an FPN's level; may be given several times. With --phrase a "
        "fusion layer or feature maps, such as neck",
    )
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        metavar="WORDS",
        help="what to explain of a detector that reads a text; may be given several times",
    )
    parser.add_argument(
        "--text",
        metavar="WORDS",
        help="that the phrases stand in (default: the phrases, as a list of names)",
    )
    parser.add_argument(
        "--baseline",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="a detector, such as one without attention, whose Grad-CAMs to draw below",
    )
    add_register_coco(
        parser, "Detectron2: a dataset of the config, for the classes' names; as tools/train_net.py"
    )
    parser.add_argument(
        "--trust", action="store_true", help="let checkpoints run what they ask to run"
    )
    return parser.parse_args(argv)


# --- before anything is drawn ----------------------------------------------------------------- #


def prepare(args: argparse.Namespace) -> Callable[[str], list[Row]]:
    """Load and check everything; returns a function that makes the rows of an image's sheet."""
    baseline_config = args.baseline and args.baseline[0]
    side = CLASSIFIER
    if args.config != CLASSIFIER or baseline_config not in (None, CLASSIFIER):
        side = common_side(args.config, baseline_config)
    check_images(args.images)
    caption = choose_caption(args, side)
    register(args.register_coco, side)
    detector = load(side, args.config, args.weights, args.trust)
    if caption is not None:
        ground = choose_grounder(detector, caption, args.layer[0] if args.layer else None)
        return partial(phrase_rows, detector, ground, caption)
    if detector.reads_text:
        kind = type(detector.model).__name__
        raise ValueError(f"{kind} reads a text; name what to look for by --phrase")
    layers = choose_layers(detector, args.methods, args.layer)
    class_id = find_class(args.class_, detector.class_names)
    baseline = load(side, *args.baseline, args.trust) if args.baseline else None
    baseline_layer = None
    if baseline is not None:
        baseline_layer = choose_baseline_layer(detector, baseline, layers, args.layer)
    return lambda path: explain(
        detector, path, class_id, layers, baseline, baseline_layer, warn=warn
    )


def choose_caption(args: argparse.Namespace, side: str) -> Caption | None:
    """Make the caption for a detector to read; None if the user asks for no phrase.

    Raises ValueError if an argument is wrong, or does not go with phrases.
    """
    if not args.phrase:
        if args.text is not None:
            raise ValueError("--text: the text that phrases stand in; name one by --phrase")
        return None
    if side != "mm_plugins":
        raise ValueError(
            f"--phrase: {args.config} is no config of {FRAMEWORKS['mm_plugins']}, whose detectors "
            "alone read a text; choose by --class"
        )
    others = {"--class": args.class_, "--methods": args.methods, "--baseline": args.baseline}
    for option, value in others.items():
        if value is not None:
            raise ValueError(f"{option}: of detectors with classes; it does not go with --phrase")
    if len(args.layer) > 1:
        raise ValueError(f"--layer {args.layer[1]}: the heatmap of a phrase is made of one layer")
    try:
        # MMDetection strips these from the ends of phrases, too.
        return Caption(tuple(phrase.strip(". ") for phrase in args.phrase), args.text)
    except ValueError as error:
        raise ValueError(f"--phrase: {error}") from error


def check_images(paths: Sequence[str]) -> None:
    stems: dict[str, str] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                image.load()
        except FileNotFoundError:
            raise ValueError(f"there is no image {path!r}") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # of Pillow
            raise ValueError(f"image {path!r} cannot be read: {error}") from error
        other = stems.setdefault(Path(path).stem, path)
        if other != path:
            raise ValueError(f"images {other!r} and {path!r}: their pictures would have one name")


def register(datasets: Sequence[Sequence[str]], side: str) -> None:
    if not datasets:
        return
    if side != "d2_plugins":
        raise ValueError("--register-coco: of Detectron2; MMDetection's config names its dataset")
    from d2_plugins.datasets import register_coco

    for dataset in datasets:
        register_coco(*dataset)


def warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
