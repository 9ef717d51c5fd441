#!/usr/bin/env python
"""Measure how much a detector recognises objects by their company (contextual bias).

    tools/evaluate_context_bias.py --annotations annotations/instances_val2017.json \\
        --results output/inference/coco_instances_results.json \\
        --train-annotations annotations/instances_train2017.json --out bias

Takes COCO-format ground truth and a results file of Detectron2 (OUTPUT_DIR/inference/
coco_instances_results.json) or MMDetection (CocoMetric's outfile_prefix: PREFIX.bbox.json,
PREFIX.segm.json). Each class has one companion. --pairs names a file of companions, the
context_bias.json of tools/make_synthetic_coco.py --context-bias. Without --pairs, a class's
companion is the other class in most of its images in --train-annotations, or else --annotations.

For each class it prints COCO's AP in percent: over all images, over the class's images with the
companion (in company), and over its images without the companion (alone). It prints the gap between
the last two, and the same gap between images with equally many objects. It prints the share of the
images without the class in which the class is detected (false positives): with the companion only,
and with neither. A last row has the means over the classes. --out DIR writes context_bias.json,
context_bias.md and context_bias.png there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from plugin_core.evaluation.coco_files import Source, read_annotations, read_results
from plugin_core.evaluation.companions import choose_companions
from plugin_core.evaluation.context_bias import load_detections, load_ground_truth, measure
from plugin_core.evaluation.context_bias_report import GEOMETRY, Report

SETTINGS = (
    "annotations",
    "results",
    "pairs",
    "train_annotations",
    "iou_type",
    "score_threshold",
)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    annotations = Source("--annotations", args.annotations)
    try:
        if not 0 <= args.score_threshold <= 1:
            raise ValueError(f"--score-threshold {args.score_threshold}: expected 0 to 1")
        content = read_annotations(annotations, args.iou_type)
        detected = Source("--results", args.results)
        results = read_results(detected, args.iou_type, content, annotations)
        companions, source = choose_companions(
            content, annotations, pairs=args.pairs, train=args.train_annotations
        )
        if args.out:
            make_folder(args.out)  # before the work, as it may fail
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    truth = load_ground_truth(content)
    report = Report(
        measure(
            truth,
            load_detections(truth, results),
            companions,
            args.iou_type,
            args.score_threshold,
        ),
        args.iou_type,
        args.score_threshold,
        source,
        title=f"{args.results} on {args.annotations}",
        note="" if results else f"There is no detection in {args.results}.",
    )
    print(report.text())
    if args.out:
        try:
            report.write(args.out, {name: getattr(args, name) for name in SETTINGS})
        except OSError as error:
            sys.exit(f"error: --out {args.out}: {error}")
        print(f"\nwrote context_bias.json, .md and .png to {args.out}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations", required=True, metavar="FILE", help="COCO-format ground truth"
    )
    parser.add_argument(
        "--results", required=True, metavar="FILE", help="COCO-format detections of its images"
    )
    companions = parser.add_mutually_exclusive_group()
    companions.add_argument(
        "--pairs", metavar="FILE", help="the companions of the classes to report"
    )
    companions.add_argument(
        "--train-annotations", metavar="FILE", help="where companions are counted"
    )
    parser.add_argument("--iou-type", choices=list(GEOMETRY), default="bbox")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="of a false positive, 0 to 1 (default: 0.5); AP takes all detections",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table, numbers and figure")
    return parser.parse_args(argv)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"--out {folder}: {error.filename!r} is a file, not a folder") from error


if __name__ == "__main__":
    main()
