#!/usr/bin/env python
"""Make a small dataset of drawn scenes in the exact layout of COCO 2017.

    python tools/make_synthetic_coco.py OUT --train 400 --val 100 --size 128 --seed 0

writes

    OUT/train2017/000000000001.jpg …, OUT/val2017/000000500001.jpg …
    OUT/annotations/{instances,person_keypoints,panoptic,captions}_{train,val}2017.json
    OUT/annotations/panoptic_{train,val}2017/*.png
    OUT/annotations/grounding_{train,val}2017_{odvg.jsonl,flickr30k.json,refcoco.json}
    OUT/annotations/synthetic_coco.json       the options of the run
    OUT/annotations/context_bias.json         with --context-bias only

Object classes, with their category ids: person 1, disk 2, square 3, triangle 4, star 5,
ring 6, cross 7. Stuff classes: grass 8, sand 9, water 10, brick 11, stone 12, sky 13.

The instances files are also a multi-label list for classifiers: ``CocoMultiLabel`` reads the
classes of each image's objects from them (docs/multi_label_classification.md).

The grounding files are for MMDetection's ODVGDataset, Flickr30kDataset and
MDETRStyleRefCocoDataset. They have captions of noun phrases, each with the boxes of exactly the
objects that it fits. They also have expressions of one object each, such as "the large disk left
of the square.". A mirrored image swaps left and right: train on them without RandomFlip.

``--context-bias P``: each class has one companion, another object class: person ↔ disk,
square ↔ triangle, star → ring → cross → star with all 7 classes (with fewer: pairs in the
order of ids, and a cycle of the last three when their number is odd). Of the train images
that hold a class, a share P also holds its companion; of the val images, 1 - P.

``--imbalance R``: the numbers of objects of the classes fall geometrically, in the order
of ids, to 1/R in train. Val stays balanced, so that the rare classes' AP can be measured.

``--ambiguous P``: in a share P of the images one object, of whatever class, is drawn as a pebble, a
flat ellipse that tells no class. Its annotation keeps the class. With --context-bias the image has
one object beside it: of the pebbles of a class, a share P are beside its companion in train, 1 - P
in val, the others beside another class, if there is one. A person drawn as a pebble has no
keypoints. With --class-colors pebbles are purple.

``--classification``: each image has one object, and the images are also in
OUT/classification/{train,val}/CLASS, as classifiers are trained from. With --imbalance these have a
long tail in train.

``--class-colors``: each class has a colour of its own, a person the shirt's. A detector learns such
scenes in fewer steps. Otherwise any object may have any colour.

The same options give the same bytes (with the same versions of numpy, OpenCV and Pillow).
An image depends on the seed, the split and its index only, not on --train and --val.
"""

import argparse
import signal
import sys
from pathlib import Path

from synthetic_coco import THINGS, ArgumentError, Summary, make_dataset

__all__ = ["ArgumentError", "Summary", "main", "make_dataset"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for an argument that cannot be used."""
    options = vars(_parser().parse_args(argv))
    try:
        summary = make_dataset(**options)
    except ArgumentError as error:
        print(f"make_synthetic_coco.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"make_synthetic_coco.py: error: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_synthetic_coco.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"wrote {summary.train} train and {summary.val} val images, "
        f"{summary.objects} objects of {options['classes']} classes, to {summary.out}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Makes a small dataset of drawn scenes in the exact layout of COCO 2017.",
        epilog="instances_*.json are also the multi-label list of classifiers (CocoMultiLabel).",
    )
    names = ", ".join(category.name for category in THINGS)
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    parser.add_argument("--train", type=int, required=True, metavar="N", help="train images")
    parser.add_argument("--val", type=int, required=True, metavar="N", help="val images")
    parser.add_argument(
        "--size", type=int, default=256, metavar="S", help="long side in pixels (default: 256)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="K", help="same seed, same bytes (default: 0)"
    )
    parser.add_argument(
        "--classes",
        type=int,
        default=len(THINGS),
        metavar="N",
        help=f"use the first N of: {names} (default: all)",
    )
    parser.add_argument(
        "--context-bias",
        type=float,
        metavar="P",
        help="a class appears with its companion class with probability P in train, 1-P in val",
    )
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        metavar="R",
        help="class frequencies fall geometrically to 1/R in train; val stays balanced",
    )
    parser.add_argument(
        "--ambiguous",
        type=float,
        default=0.0,
        metavar="P",
        help="in a share P of the images one object is a pebble, which tells no class (default: 0)",
    )
    parser.add_argument(
        "--class-colors", action="store_true", help="each class has a colour of its own"
    )
    parser.add_argument(
        "--classification",
        action="store_true",
        help="one object in each image, and folders of classes beside COCO's layout",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a dataset that this tool wrote"
    )
    return parser


if __name__ == "__main__":
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
