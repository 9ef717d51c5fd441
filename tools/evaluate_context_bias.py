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
context_bias.md and context_bias.png there; --pairs takes the JSON, too.

    tools/evaluate_context_bias.py --protocol singh2020 \\
        --annotations annotations/instances_val2017.json \\
        --results output/inference/coco_instances_results.json \\
        --train-annotations train_80.json --held-out train_20.json plain_on_train_20.json --out bias

measures as image classifiers are measured (Singh et al., CVPR 2020). The score of a class in an
image is that of its best detection. The 20 pairs are those of the highest bias: the mean score of a
class in images with its context over that in images without it. The context is in at least 20% of
the class's images in --train-annotations. The scores are those of a plain detector on --held-out
training images, or else the evaluated ones. It prints the class's AP over the co-occurring images
and over the exclusive ones, each with all images without the class as negatives. To compare
detectors, give them the same --pairs, such as the context_bias.json of the plain one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from plugin_core.evaluation.biased_pairs import choose_pairs, image_scores, measure_pairs
from plugin_core.evaluation.coco_files import Source, read_annotations, read_results
from plugin_core.evaluation.companions import add_companions, choose_companions
from plugin_core.evaluation.context_bias import load_detections, load_ground_truth, measure
from plugin_core.evaluation.context_bias_report import GEOMETRY, PairReport, Report
from plugin_core.files import make_folder

SETTINGS = ("annotations", "results", "pairs", "train_annotations")
SETTINGS_OF = {"detection": ("iou_type", "score_threshold"), "singh2020": ("held_out",)}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        measure_report = prepare(args)
        if args.out:
            make_folder("--out", args.out)  # before the work, as it may fail
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    report = measure_report()
    print(report.text())
    if args.out:
        names = (*SETTINGS, "protocol", *SETTINGS_OF[args.protocol])
        try:
            report.write(args.out, {name: getattr(args, name) for name in names})
        except OSError as error:
            sys.exit(f"error: --out {args.out}: {error}")
        print(f"\nwrote context_bias.json, .md and .png to {args.out}")


def prepare(args: argparse.Namespace) -> Callable[[], Report | PairReport]:
    """Read and check everything; returns a function that measures."""
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold {args.score_threshold}: expected 0 to 1")
    if args.held_out and args.protocol != "singh2020":
        raise ValueError("--held-out: of --protocol singh2020")
    annotations = Source("--annotations", args.annotations)
    content = read_annotations(annotations, args.iou_type)
    detected = Source("--results", args.results)
    results = read_results(detected, args.iou_type, content, annotations)
    title = f"{args.results} on {args.annotations}"
    note = "" if results else f"There is no detection in {args.results}."
    files = {"pairs": args.pairs, "train": args.train_annotations}
    if args.protocol == "singh2020":
        scores = image_scores(results)
        pairs, source = choose_pairs(
            content, annotations, scores, args.iou_type, **files, held_out=args.held_out
        )
        return lambda: PairReport(measure_pairs(content, scores, pairs), source, title, note)
    companions, source = choose_companions(content, annotations, **files)

    def measure_report() -> Report:
        truth = load_ground_truth(content)
        detections = load_detections(truth, results)
        classes = measure(truth, detections, companions, args.iou_type, args.score_threshold)
        return Report(classes, args.iou_type, args.score_threshold, source, title, note)

    return measure_report


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
    parser.add_argument(
        "--protocol",
        choices=list(SETTINGS_OF),
        default="detection",
        help="COCO's AP of each class (default), or that of 20 pairs by Singh et al.",
    )
    add_companions(parser)
    parser.add_argument(
        "--held-out",
        nargs=2,
        metavar=("FILE", "RESULTS"),
        help="singh2020: training images and a plain detector's detections, which choose the pairs",
    )
    parser.add_argument(
        "--iou-type",
        choices=list(GEOMETRY),
        default="bbox",
        help="detection: what is matched (default: bbox); singh2020: what --results must have",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="detection: of a false positive, 0 to 1 (default: 0.5); AP takes all detections",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table, numbers and figure")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
