#!/usr/bin/env python
"""Check a dataset in COCO's format, as the trainings here do before they begin.

    tools/check_dataset.py annotations/instances_train.json train/
    tools/check_dataset.py train.json images/ --config configs/mm/… --split train
    tools/check_dataset.py train.json images/ --fix mended.json --json report.json
    tools/check_dataset.py panoptic.json images/ --segments pngs/

It prints errors (a training would fail or learn something wrong), warnings (some of the data is
lost) and notes, each with the first places, with what happens in Detectron2 and in MMDetection, and
with the remedy. It ends with status 1 if there are errors. ANNOTATIONS and IMAGES are never
changed. --fix writes a copy with what can be mended without guessing.

A file whose annotations have segments_info is checked as a panoptic one. Of PNGs the pixels of the
first 16 are compared with the segments, or of all with --decode. Nothing is mended in such a file,
and of --config only the framework is read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from plugin_core.datasets.check import Use, check_dataset
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.findings import ERROR, FRAMEWORKS, Report
from plugin_core.datasets.mending import Mends, write_fixed
from plugin_core.datasets.panoptic import check_panoptic, is_panoptic
from plugin_core.files import write_text
from plugin_core.inspection.config_kinds import side_of


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        for path in filter(None, (args.json, args.fix)):
            if path.resolve() == Path(args.annotations).resolve() or args.json == args.fix:
                raise ValueError(f"{path}: is named twice; name a new file")
            if path == args.fix and path.exists():
                raise ValueError(f"--fix: {str(path)!r} exists; name a new file")
            if not path.absolute().parent.is_dir():
                raise ValueError(f"{path}: there is no folder {str(path.absolute().parent)!r}")
        framework, use, classes, numbers = None, Use(args.split), None, []
        if args.config:
            side = side_of(args.config)
            framework = "detectron2" if side == "d2_plugins" else "mmdetection"
            reads = importlib.import_module(f"{side}.preflight").reads_of(args.config)
            use, classes, numbers = reads.use, reads.classes, reads.heads
            if args.split == "test":
                use = use.for_test()
        report: Report
        mends: Mends | None = None
        if args.segments or is_panoptic(args.annotations):
            if args.fix:
                raise ValueError("--fix: nothing can be mended in a panoptic file")
            if not is_panoptic(args.annotations):
                raise ValueError(
                    f"--segments: {args.annotations!r} has no segments_info; it is not panoptic"
                )
            report = check_panoptic(
                args.annotations, args.segments, args.images, decode=args.decode
            )
            classes, numbers = None, []
        else:
            checked = check_dataset(args.annotations, args.images, use, decode=args.decode)
            report, mends = checked.report, checked.mends
            if args.fix and checked.content.not_objects:
                raise ValueError(f"--fix: first take out what is no object\n{report.text()}")
        if classes is not None:
            check_classes(report, classes, args.config, may_leave_out=framework != "detectron2")
        for setting, number in numbers:
            names = list(report.classes) if classes is None else classes
            if args.split == "test" and len(names) < number:
                continue  # a test set may lack some
            if text := check_number_of_classes(number, names, setting, report):
                report.add("number-of-classes", ERROR, text, [], count=1)
        print(f"{args.annotations}: {_counts(report.counts)}")
        if args.images is None:
            print("no IMAGES are named: the images' files were not checked")
        if mends is None and args.segments is None:
            print("no --segments are named: the PNGs were not checked")
        print(report.text(framework) or "nothing was found that is wrong")
        if args.json:
            write_text(args.json, json.dumps(report.as_dict(), indent=1, ensure_ascii=False))
        if args.fix and mends:
            done = write_fixed(args.annotations, mends, args.fix)
            print(f"wrote {args.fix}: {'; '.join(done) or 'nothing had to be changed'}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    errors = len(report.of(ERROR, framework))
    if errors:
        where = f" for {FRAMEWORKS[framework]}" if framework else ""
        print(f"{errors} {'kind' if errors == 1 else 'kinds'} of errors{where}", file=sys.stderr)
    return 1 if errors else 0


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS", help="file in COCO's format")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="?", help="folder that the file names are relative to"
    )
    parser.add_argument(
        "--segments", metavar="FOLDER", help="of the PNGs that a panoptic file names"
    )
    parser.add_argument(
        "--config", help="of either framework: check what it reads, and its classes"
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="train", help="what the data is for"
    )
    parser.add_argument("--decode", action="store_true", help="read every image whole")
    parser.add_argument("--fix", metavar="OUT.json", type=Path, help="write a mended copy")
    parser.add_argument("--json", metavar="REPORT.json", type=Path, help="write all findings")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
