#!/usr/bin/env python
"""Compare detectors by their results on the same images, and say whether a difference is real.

    tools/compare_detectors.py annotations/instances_val2017.json \\
        --detector plain=plain/seed0.bbox.json,plain/seed1.bbox.json \\
        --detector triplet=triplet/seed0.bbox.json,triplet/seed1.bbox.json --out comparison
    tools/compare_detectors.py val.json --images images/ --out comparison \\
        --detector plain=plain.yaml:plain/model_final.pth --detector ida=ida.py:ida/epoch_12.pth

Takes COCO-format ground truth and results files of Detectron2 (OUTPUT_DIR/inference/
coco_instances_results.json) or MMDetection (CocoMetric's outfile_prefix: PREFIX.bbox.json,
PREFIX.segm.json, PREFIX.keypoints.json). Several files under one name, after commas or in a
--detector of their own, are one detector trained with several seeds. The first detector is the
baseline. NAME=CONFIG:WEIGHTS, a checkpoint, is evaluated first by its framework on GT and the
images of --images; more weights after commas are seeds. The results stay in DIR/evaluations, and
the same command takes them from there.

It prints COCO's AP and AR, whether any detector beats the noise between the baseline's seeds, and
for every other detector one sentence: better than the baseline, worse, or not told apart. The
differences in all metrics and in each class's AP come with 95% intervals (paired bootstrap over the
images, and over the seeds where there are several) and p-values. --out DIR takes the report: HTML
in one file, Markdown, JSON, LaTeX tables, pictures. It also shows, for each detector's first seed:
kinds of errors, precision and recall, AP by size and by the number of objects, confused classes,
calibration, and with --images FOLDER the images in which the first two detectors differ most. Of
detectors with a config (that of a checkpoint, or --config NAME=CONFIG) it has parameters and
GFLOPs, and with weights the time an image and the memory on this machine.

As a gate, --fail-below X makes the exit status 1 if the AP of another detector (mean over its
seeds) is below the baseline's + X percentage points; --fail-below -0.5 lets 0.5 be lost. The report
is written all the same.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from plugin_core.evaluation.coco_files import Record, Source
from plugin_core.evaluation.comparison.calibration import calibration
from plugin_core.evaluation.comparison.confusion import check_score_threshold, confusion
from plugin_core.evaluation.comparison.costs import cost_section, measure_costs, pick_images
from plugin_core.evaluation.comparison.curves import curves
from plugin_core.evaluation.comparison.detections import MOST_DETECTIONS, Truth
from plugin_core.evaluation.comparison.differences import (
    Measured,
    accuracy_section,
    differences_section,
    measure,
)
from plugin_core.evaluation.comparison.errors import errors
from plugin_core.evaluation.comparison.evaluations import (
    Checkpoint,
    GroundTruth,
    Task,
    read_models,
    read_seeds,
    run_all,
)
from plugin_core.evaluation.comparison.inputs import (
    Detector,
    named_files,
    read_detector,
    read_truth,
)
from plugin_core.evaluation.comparison.pictures import pictures
from plugin_core.evaluation.comparison.published import published_section
from plugin_core.evaluation.comparison.report import Report
from plugin_core.evaluation.comparison.sections import Section
from plugin_core.files import make_folder


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.resamples < 100:
            raise ValueError(f"--resamples {args.resamples}: expected at least 100")
        files = named_files(args.detector)
        if args.fail_below is not None and (math.isnan(args.fail_below) or len(files) < 2):
            raise ValueError("--fail-below: expected a number, and a detector beside the baseline")
        check_score_threshold(args.score_threshold)
        if args.images and not args.images.is_dir():
            raise ValueError(f"--images {args.images}: there is no such folder")
        seeds = read_seeds(files)
        models = read_models(args.config, seeds)
        annotations = Source("annotations", args.annotations)
        content = read_truth(annotations, args.iou_type)
        truth = Truth(content, args.iou_type)
        tasks = evaluations(seeds, args)
        read = partial(read_detector, truth=truth, content=content, annotations=annotations)
        # What is there already is read before evaluations, which take their time.
        detectors = {name: read(name, files[name]) for name in files if name not in tasks}
        make_folder("--out", args.out)  # before the work, as it may fail
        run_all([task for listed in tasks.values() for task in listed.values()])
        for name, listed in tasks.items():
            given = enumerate(files[name])
            results = [listed[k].results if k in listed else file for k, file in given]
            detectors[name] = read(name, results)
        detectors = {name: detectors[name] for name in files}
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    measured = measure([*detectors.values()], args.resamples)
    settings = {
        "annotations": args.annotations,
        "detectors": files,
        "iou_type": args.iou_type,
        "resamples": args.resamples,
        "score_threshold": args.score_threshold,
        "fail_below": args.fail_below,
    }
    sections = [accuracy_section(measured)]
    if measured.compared:
        sections.append(differences_section(measured))
    if beside := papers(seeds, models, content, measured, args.iou_type):
        sections.append(beside)
    if models:
        sections.append(costs(models, content, measured, args))
    sections += analyses([*detectors.values()], args)
    report = Report(f"Comparison on {args.annotations}", measured.verdict, sections, settings)
    print(report.terminal())
    try:
        report.write(args.out)
    except OSError as error:
        sys.exit(f"error: --out {args.out}: {error}")
    print(f"\nwrote the report to {args.out}")
    if args.fail_below is not None and (failed := below(measured, args.fail_below)):
        sys.exit("\n".join(failed))


def evaluations(
    seeds: Mapping[str, Sequence[str | Checkpoint]], args: argparse.Namespace
) -> dict[str, dict[int, Task]]:
    """Prepare the evaluations: by the names of detectors that have any, and numbers of seeds."""
    data = GroundTruth(args.annotations, str(args.images))
    tasks: dict[str, dict[int, Task]] = {}
    for name, listed in seeds.items():
        for k, seed in enumerate(listed):
            if not isinstance(seed, Checkpoint):
                continue
            if not args.images:
                raise ValueError(
                    f"--detector {name}: a checkpoint is evaluated on the images of --images FOLDER"
                )
            task = Task(name, k, seed, data, args.iou_type, args.out)
            tasks.setdefault(name, {})[k] = task
    return tasks


def papers(
    seeds: Mapping[str, Sequence[str | Checkpoint]],
    models: Mapping[str, Checkpoint],
    content: Record,
    measured: Measured,
    iou_type: str,
) -> Section | None:
    """Set detectors beside what is published of their configs, if all seeds are of one config."""
    configs = {
        name: model.config
        for name, model in models.items()
        if all(isinstance(s, str) or s.config == model.config for s in seeds[name])
    }
    metrics = {
        name: {
            metric: measured.mean(name, metric) for metric in measured.accuracies[name][0].metrics
        }
        for name in configs
    }
    return published_section(configs, metrics, iou_type, content)


def costs(
    models: Mapping[str, Checkpoint],
    content: Record,
    measured: Measured,
    args: argparse.Namespace,
) -> Section:
    """Measure what the detectors with a config cost."""
    images = pick_images(content, args.images)
    what = f"{len(images)} of {args.images}" if images else "noise of the config's test size"
    accuracies = {name: measured.mean(name) for name in models}
    return cost_section(measure_costs(models, images), accuracies, "AP", what)


def analyses(detectors: Sequence[Detector], args: argparse.Namespace) -> list[Section]:
    """Show where the numbers come from, of the first seed of each detector."""
    found = {one.name: one.seeds[0] for one in detectors}
    sections = [
        errors(found),
        curves(found),
        confusion(found, args.score_threshold),
        calibration(found, args.score_threshold),
    ]
    if len(detectors) > 1:
        sections.append(pictures(found, args.images, args.score_threshold))
    return sections


def below(measured: Measured, margin: float) -> list[str]:
    """A sentence on each detector whose AP is below the baseline's plus a margin."""
    baseline = next(iter(measured.accuracies))
    bound = measured.mean(baseline) + margin
    return [
        f"failed: AP of {name} is {measured.mean(name):.2f}, below {baseline}'s "
        f"{measured.mean(baseline):.2f} {margin:+g} (--fail-below)"
        for name in measured.compared
        if not measured.mean(name) >= bound
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", metavar="GT", help="COCO-format ground truth")
    parser.add_argument(
        "--detector",
        action="append",
        required=True,
        metavar="NAME=RESULTS[,RESULTS…]",
        help="a detector's COCO-format detections, one file for each seed; or NAME=CONFIG:WEIGHTS"
        "[,WEIGHTS…], which evaluates checkpoints; the baseline first",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the report")
    parser.add_argument(
        "--iou-type",
        choices=list(MOST_DETECTIONS),
        default="bbox",
        help="what is matched (default: bbox)",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="of the bootstrap, 100 or more (default: 1000)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="of GT's images: to evaluate checkpoints, and draw the images that differ most",
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="of a detection that counts in confusions, calibration and pictures (default: 0.3)",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=CONFIG[:WEIGHTS]",
        help="of a detector that is given by results, for its cost; with weights it is timed",
    )
    parser.add_argument(
        "--fail-below",
        type=float,
        metavar="X",
        help="exit with 1 if a detector's AP is below the baseline's + X percentage points",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
