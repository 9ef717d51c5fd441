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
calibration, and with --images FOLDER the images in which the first two detectors differ most. With
--pairs or --train-annotations, as of tools/evaluate_context_bias.py, it shows contextual bias. Of
detectors with a config (that of a checkpoint, or --config NAME=CONFIG) it has parameters and
GFLOPs, and with weights the time an image and the memory on this machine.

--iou-type panoptic compares panoptic quality: GT and the results are JSON files in COCO's panoptic
format, each with its PNGs in the folder of its name without .json (PREFIX.panoptic.json and
PREFIX.panoptic of MMDetection). Such a report has numbers and differences alone, and what is
published of the configs.

--control NAME is a detector that costs as much as the others but has no plugin. The first sentence,
Holm's correction and the gate leave it out, and the others' AP is compared with its, too.

As a gate, --fail-below X makes the exit status 1 if the AP or PQ of another detector (mean over its
seeds) is below the baseline's + X percentage points; --fail-below -0.5 lets 0.5 be lost. The report
is written all the same.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from plugin_core.evaluation.coco_files import Record, Source
from plugin_core.evaluation.companions import add_companions, choose_companions
from plugin_core.evaluation.comparison import panoptic
from plugin_core.evaluation.comparison.bias import contextual_bias
from plugin_core.evaluation.comparison.calibration import calibration
from plugin_core.evaluation.comparison.confusion import confusion
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
    doubts,
    named_files,
    read_detector,
    read_truth,
)
from plugin_core.evaluation.comparison.logs import LOGS, check_log, write_log
from plugin_core.evaluation.comparison.pictures import pictures
from plugin_core.evaluation.comparison.published import published_section
from plugin_core.evaluation.comparison.report import Report
from plugin_core.evaluation.comparison.sections import Section
from plugin_core.evaluation.context_bias_report import GEOMETRY
from plugin_core.files import make_folder

Files = Mapping[str, Sequence[str]]
Analyse = Callable[[], list[Section]]


def main(argv: Sequence[str] | None = None, trained: Sequence[Section] = ()) -> None:
    """Compare; ``trained`` are sections of the report on how the detectors were trained."""
    args = parse_args(argv)
    # The frameworks import it, some of them with every config.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    new = not args.out.exists()
    try:
        files = named_files(args.detector)
        check(args, [*files])
        compare = of_segments if args.iou_type == "panoptic" else of_objects
        measured, analyse = compare(files, args)
        sections = [accuracy_section(measured)]
        if measured.compared:
            sections.append(differences_section(measured))
        sections += [*trained, *analyse()]
    except (OSError, ValueError) as error:
        if new:
            with suppress(OSError):  # of a folder that is not empty
                args.out.rmdir()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    settings = {
        "annotations": args.annotations,
        "detectors": files,
        "iou_type": args.iou_type,
        "resamples": args.resamples,
        "score_threshold": args.score_threshold,
        "fail_below": args.fail_below,
    }
    for name in ("control", "gt_masks", "images", "config", "pairs", "train_annotations"):
        if given := getattr(args, name):
            settings[name] = given if isinstance(given, list) else str(given)
    report = Report(f"Comparison on {args.annotations}", measured.verdict, sections, settings)
    print(report.terminal())
    try:
        report.write(args.out)
    except OSError as error:
        sys.exit(f"error: --out {args.out}: {error}")
    print(f"\nwrote the report to {args.out}")
    if args.log:
        metrics = {name: [a.metrics for a in of] for name, of in measured.accuracies.items()}
        write_log(args.log, args.out, metrics, sections)
    if args.fail_below is not None and (failed := below(measured, args.fail_below)):
        sys.exit("\n".join(failed))


def check(args: argparse.Namespace, detectors: Sequence[str]) -> None:
    """Check the arguments that are no files of detectors; raises ValueError."""
    if args.resamples < 100:
        raise ValueError(f"--resamples {args.resamples}: expected at least 100")
    if args.fail_below is not None and (
        math.isnan(args.fail_below) or len(detectors) < 2 + bool(args.control)
    ):
        raise ValueError("--fail-below: expected a number, and a detector beside the baseline")
    if args.control and args.control not in detectors[1:]:
        raise ValueError(
            f"--control {args.control}: expected the name of a --detector that is not the first"
        )
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold {args.score_threshold}: expected a number from 0 to 1")
    if args.images and not args.images.is_dir():
        raise ValueError(f"--images {args.images}: there is no such folder")
    if args.images and args.iou_type == "panoptic":
        raise ValueError("--images: --iou-type panoptic takes PNGs of segments alone")
    if args.gt_masks and args.iou_type != "panoptic":
        raise ValueError(f"--gt-masks: not of --iou-type {args.iou_type}")
    if args.log:
        check_log(args.log)
    if (args.pairs or args.train_annotations) and args.iou_type not in GEOMETRY:
        raise ValueError(f"--pairs and --train-annotations: not of --iou-type {args.iou_type}")


def of_segments(files: Files, args: argparse.Namespace) -> tuple[Measured, Analyse]:
    """Compare panoptic segments; raises ValueError for wrong input."""
    seeds = read_seeds(files)
    models = read_models(args.config, seeds)
    if any(model.weights for model in models.values()):
        raise ValueError("--iou-type panoptic: takes results files and configs, no checkpoints")
    segments = panoptic.read_truth(Source("annotations", args.annotations), args.gt_masks)
    predictions = panoptic.read_detectors(files, segments)
    make_folder("--out", args.out)  # before the work, as it may fail
    measured = panoptic.measure(segments, predictions, args.resamples, args.control)
    beside = papers(seeds, models, segments.content, measured, args.iou_type)
    return measured, lambda: [beside] if beside else []


def of_objects(files: Files, args: argparse.Namespace) -> tuple[Measured, Analyse]:
    """Compare boxes, masks or keypoints, evaluating checkpoints first.

    Returns:
        The numbers, and a function that shows where they come from.

    Raises:
        ValueError: for wrong input, or an evaluation that fails.
    """
    seeds = read_seeds(files)
    models = read_models(args.config, seeds)
    annotations = Source("annotations", args.annotations)
    content = read_truth(annotations, args.iou_type)
    if args.images and not pick_images(content, args.images):
        first = content["images"][0].get("file_name")
        raise ValueError(f"--images {args.images}: has none of GT's images, as {first!r}")
    companions = None
    if args.pairs or args.train_annotations:
        companions = choose_companions(
            content, annotations, pairs=args.pairs, train=args.train_annotations
        )
    read = partial(
        read_detector,
        truth=Truth(content, args.iou_type),
        content=content,
        annotations=annotations,
    )
    tasks = evaluations(seeds, args)
    # What is there already is read before evaluations, which take their time.
    found = {name: read(name, files[name]) for name in files if name not in tasks}
    make_folder("--out", args.out)  # before the work, as it may fail
    run_all([task for listed in tasks.values() for task in listed.values()])
    for name, listed in tasks.items():
        given = enumerate(files[name])
        found[name] = read(name, [listed[k].results if k in listed else f for k, f in given])
    detectors = [found[name] for name in files]
    measured = measure(detectors, args.resamples, args.control)
    if doubt := doubts(detectors):
        print(f"warning: {doubt}", file=sys.stderr)
        measured = replace(measured, doubt=doubt)

    def analyse() -> list[Section]:
        sections = []
        if beside := papers(seeds, models, content, measured, args.iou_type):
            sections.append(beside)
        if models:
            sections.append(costs(models, content, measured, args))
        of_first_seeds = analyses(detectors, args)
        if companions:
            of_first_seeds.append(
                contextual_bias(detectors, content, annotations, companions, args.score_threshold)
            )
        if any(len(one.seeds) > 1 for one in detectors):
            said = "Of the first seed of each detector, and not the mean over its seeds."
            of_first_seeds = [replace(one, text=f"{one.text} {said}") for one in of_first_seeds]
        return sections + of_first_seeds

    return measured, analyse


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
        f"failed: {measured.main} of {name} is {measured.mean(name):.2f}, below {baseline}'s "
        f"{measured.mean(baseline):.2f} {margin:+g} (--fail-below)"
        for name in measured.compared
        if name != measured.control and not measured.mean(name) >= bound
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
    parser.add_argument(
        "--control",
        metavar="NAME",
        help="a --detector that costs as much as the others but has no plugin",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="of the report")
    parser.add_argument(
        "--iou-type",
        choices=[*MOST_DETECTIONS, "panoptic"],
        default="bbox",
        help="what is matched (default: bbox)",
    )
    parser.add_argument(
        "--gt-masks",
        type=Path,
        metavar="FOLDER",
        help="panoptic: PNGs of the ground truth (default: the folder of GT's name beside it)",
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
    add_companions(parser)
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="of a detection that counts in confusions, calibration, pictures, bias (default: 0.3)",
    )
    parser.add_argument(
        "--log", choices=LOGS, help="log the metrics and the report's figures there as well"
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=CONFIG[:WEIGHTS]",
        help="of a detector that is given by results, for its cost and for published "
        "numbers (panoptic: these alone); with weights it is timed",
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
