#!/usr/bin/env python
"""Measure how much a detector recognises objects by their company (contextual bias).

    tools/evaluate_context_bias.py --annotations annotations/instances_val2017.json \\
        --results output/inference/coco_instances_results.json \\
        --train-annotations annotations/instances_train2017.json --out bias

Takes COCO-format ground truth and the results file that Detectron2 (OUTPUT_DIR/inference/
coco_instances_results.json) or MMDetection (CocoMetric's outfile_prefix: PREFIX.bbox.json,
PREFIX.segm.json) writes. Each class has one companion: from --pairs, the context_bias.json of
tools/make_synthetic_coco.py --context-bias, or else the class that is in most of the images that
hold it, of --train-annotations or, without them, of --annotations.

For each class it prints AP (COCO's, in percent) over all images, over those of its images that hold
the companion (in company) and those that do not (alone), and the gap between the two, as it is and
between images with equally many objects; and, of the images without the class, the share in which
it is detected nevertheless (false positives), where the companion is and where it is not. A last
row has the means over the classes. --out DIR writes context_bias.json, context_bias.md and
context_bias.png there.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from plugin_core.evaluation.context_bias import (
    NUMBERS,
    ClassBias,
    classes_by_image,
    frequent_companions,
    load_detections,
    load_ground_truth,
    means,
    measure,
)
from plugin_core.evaluation.datasets import check_coco_json
from plugin_core.files import replacing

Record = dict[str, Any]
Checks = dict[str, Callable[[Any], bool]]  # key → whether a value of it can be used
GEOMETRY = {"bbox": "box", "segm": "mask"}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if not 0 <= args.score_threshold <= 1:
            raise ValueError(f"--score-threshold {args.score_threshold}: expected 0 to 1")
        content = read_annotations(args.annotations, "--annotations", args.iou_type)
        results = read_results(args, content)
        companions, source = choose_companions(args, content)
        if args.out:
            make_folder(args.out)  # before the work, as it may fail
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    truth = load_ground_truth(content)
    detections = load_detections(truth, results)
    classes = measure(truth, detections, companions, args.iou_type, args.score_threshold)
    notes = [
        f"AP ({GEOMETRY[args.iou_type]}) and FP rates in percent, gap in percentage points; "
        "-: nothing to measure.",
        "FP rate: of the images without the class, those in which it is detected with a score of "
        f"at least {args.score_threshold:g}.",
        "Gap at equal counts: between images that hold equally many objects, of whatever class.",
        f"Companions: {source}.",
    ]
    if not results:
        notes.append(f"There is no detection in {args.results}.")
    table = "\n\n".join([describe(classes), "\n".join(notes)])
    print(f"{args.results} on {args.annotations}\n\n{table}")
    if args.out:
        try:
            write(args.out, args, classes, source, table)
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


# --- reading ---------------------------------------------------------------------------------- #


def read_annotations(path: str, option: str, iou_type: str | None = None) -> Record:
    """A COCO-format file with what is needed of it: for evaluation, if an IoU type is given."""
    check_coco_json(path, option, needs_annotations=True)
    content = read_json(path, option)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise ValueError(f"{option} {path}: no list of {key}; expected COCO's instances")
    image_checks: Checks = {"id": is_id}
    checks: Checks = {"id": is_id, "image_id": is_id, "category_id": is_id}
    where = f"{option} {path}"
    if iou_type:
        checks |= {"iscrowd": is_number, "bbox": is_box, "area": is_number}
        where += f", --iou-type {iou_type}"
    if iou_type == "segm":
        image_checks |= {"height": is_number, "width": is_number}
        checks["segmentation"] = bool  # [] where only boxes were labelled
    check_records(content["images"], f"{where}: image", image_checks)
    check_records(content["categories"], f"{where}: category", {"id": is_id, "name": is_name})
    check_records(content["annotations"], f"{where}: annotation", checks)
    for key in ("images", "annotations", "categories"):
        check_unique(content[key], "id", f"{option} {path}: {key}")
    check_references(content["annotations"], content, f"{option} {path}: annotations", "the file")
    return content


def read_results(args: argparse.Namespace, content: Record) -> list[Record]:
    """The detections of --results, as --iou-type needs them."""
    where = f"--results {args.results}"
    results = read_json(args.results, "--results")
    if not isinstance(results, list):
        raise ValueError(f"{where}: expected a list of detections, not {type(results).__name__}")
    checks: Checks = {"image_id": is_id, "category_id": is_id, "score": is_number}
    checks |= {"bbox": is_box} if args.iou_type == "bbox" else {"segmentation": is_rle}
    check_records(results, f"{where}, --iou-type {args.iou_type}: detection", checks)
    listed_in = f"--annotations {args.annotations}"
    hint = "; are both of the same dataset and split?"
    check_references(results, content, f"{where}: detections", listed_in, hint)
    if args.iou_type == "segm":
        for detection in results:  # as the frameworks do: pycocotools would go by the boxes' areas
            detection.pop("bbox", None)
    return results


def read_json(path: str, option: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option} {path}: not JSON: {error}") from error


def check_records(records: Iterable[Any], what: str, checks: Checks) -> None:
    """Check that each record has all the keys, with values that can be used."""
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{what} {index}: expected an object, not {record!r:.40}")
        for key, check in checks.items():
            if key not in record:
                raise ValueError(f"{what} {index} has no {key}; expected {', '.join(checks)}")
            if not check(record[key]):
                raise ValueError(f"{what} {index}: {key} cannot be {record[key]!r:.40}")


def is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def is_name(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_rle(value: Any) -> bool:
    """Whether a mask is compressed as both frameworks do, the only way that pycocotools reads."""
    return isinstance(value, dict) and isinstance(value.get("counts"), str) and "size" in value


def check_unique(records: Iterable[Record], key: str, what: str) -> None:
    seen = set()
    for record in records:
        if record[key] in seen:
            raise ValueError(f"{what}: {key} {record[key]!r} occurs twice")
        seen.add(record[key])


def check_references(
    records: list[Record], content: Record, what: str, listed_in: str, hint: str = ""
) -> None:
    """Check that the records are of images and categories that an annotation file lists."""
    for key, entries in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[entries]}
        in_order = sorted(known, key=lambda i: (isinstance(i, str), i))
        unknown = [record[key] for record in records if record[key] not in known]
        if unknown:
            raise ValueError(
                f"{what}: {len(unknown)} of {len(records)} are of {entries} that {listed_in} does "
                f"not list, the first of {key} {unknown[0]!r} (it lists {in_order[0]} to "
                f"{in_order[-1]}){hint}"
            )


# --- companions ------------------------------------------------------------------------------- #


def choose_companions(
    args: argparse.Namespace, content: Record
) -> tuple[dict[int, int | None], str]:
    """The companion of each class to report, by category id, and in words where it is from."""
    if args.pairs:
        return read_pairs(args.pairs, content), f"from {args.pairs}"
    if args.train_annotations:
        source, why = args.train_annotations, ""
        train = read_annotations(source, "--train-annotations")
        ids = same_categories(args, content, train)
        images = [{ids[i] for i in classes} for classes in classes_by_image(train).values()]
    else:
        source, why = args.annotations, ", as no --pairs or --train-annotations are given"
        images = list(classes_by_image(content).values())
    found = frequent_companions(images)
    companions = {category["id"]: found.get(category["id"]) for category in content["categories"]}
    return companions, f"the class that is in most images of {source} that hold the class{why}"


def same_categories(args: argparse.Namespace, content: Record, train: Record) -> dict[int, int]:
    """The evaluated file's category id for each of the training file's, by name."""
    check_unique(content["categories"], "name", f"--annotations {args.annotations}: categories")
    where = f"--train-annotations {args.train_annotations}"
    check_unique(train["categories"], "name", f"{where}: categories")
    ids = {category["name"]: category["id"] for category in content["categories"]}
    train_ids = {category["name"]: category["id"] for category in train["categories"]}
    different = ids.keys() ^ train_ids.keys()
    if different:
        first = min(different)
        side = "--annotations" if first in ids else "--train-annotations"
        raise ValueError(
            f"{where}: other categories than --annotations {args.annotations}; "
            f"{len(different)} are in one of the two only, such as {first!r} in {side}"
        )
    return {train_ids[name]: ids[name] for name in ids}


def read_pairs(path: str, content: Record) -> dict[int, int | None]:
    where = f"--pairs {path}"
    pairs = read_json(path, "--pairs")
    if not isinstance(pairs, dict) or not isinstance(pairs.get("companions"), list):
        raise ValueError(f"{where}: no list of companions; expected make_synthetic_coco.py's file")
    if not pairs["companions"]:
        raise ValueError(f"{where}: the list of companions is empty; expected at least one")
    checks: Checks = {"category_id": is_id, "companion_id": is_id}
    check_records(pairs["companions"], f"{where}: pair", checks)
    known = [category["id"] for category in content["categories"]]
    companions: dict[int, int | None] = {}
    for pair in pairs["companions"]:
        category_id, companion_id = pair["category_id"], pair["companion_id"]
        for key in checks:
            if pair[key] not in known:
                raise ValueError(
                    f"{where}: unknown {key} {pair[key]!r}; --annotations lists "
                    f"{', '.join(map(str, known))}"
                )
        if category_id == companion_id:
            raise ValueError(f"{where}: category_id {category_id} is its own companion")
        if category_id in companions:
            raise ValueError(f"{where}: category_id {category_id} occurs twice; expected one pair")
        companions[category_id] = companion_id
    return companions


# --- writing ---------------------------------------------------------------------------------- #


def describe(classes: Sequence[ClassBias]) -> str:
    """The table, with the means and the number of classes in each of them."""
    headers = ["class", "companion", "objects in company", "objects alone", *NUMBERS.values()]
    cells = []
    for c in classes:
        counts = (c.objects_in_company, c.objects_alone)
        row = [c.name, c.companion or "none"]
        row += ["-" if count is None else f"{count:,}" for count in counts]
        cells.append(row + [cell(number, getattr(c, number)) for number in NUMBERS])
    averages = means(classes)
    row = [cell(number, mean) for number, (mean, _) in averages.items()]
    cells.append(["mean", "", "", "", *row])
    cells.append(["classes in the mean", "", "", "", *(str(n) for _, n in averages.values())])
    align = ["left", "left", *["right"] * (len(headers) - 2)]
    return tabulate(cells, headers, "github", disable_numparse=True, colalign=align)


def cell(number: str, value: float | None) -> str:
    if value is None:
        return "-"
    rounded = round(value, 1) + 0.0  # -0.0 becomes 0.0
    return f"{rounded:+.1f}" if number.startswith("gap") else f"{rounded:.1f}"


def write(
    folder: Path, args: argparse.Namespace, classes: Sequence[ClassBias], source: str, table: str
) -> None:
    content = {
        "settings": {
            "annotations": args.annotations,
            "results": args.results,
            "pairs": args.pairs,
            "train_annotations": args.train_annotations,
            "iou_type": args.iou_type,
            "score_threshold": args.score_threshold,
        },
        "companions": source,
        "units": "AP and FP rates in percent, gap in percentage points",
        "classes": [asdict(c) for c in classes],
        "mean": {number: {"value": v, "classes": n} for number, (v, n) in means(classes).items()},
    }
    files = {
        "context_bias.json": json.dumps(content, indent=2).encode() + b"\n",
        "context_bias.md": f"{args.results} on {args.annotations}\n\n{table}\n".encode(),
        "context_bias.png": draw(classes, args.iou_type, args.score_threshold),
    }
    for name, data in files.items():
        with replacing(folder / name) as file:
            file.write(data)


def draw(classes: Sequence[ClassBias], iou_type: str, score_threshold: float) -> bytes:
    """The bar chart as PNG: APs on the left, false positives on the right, a row for each class."""
    from matplotlib.figure import Figure

    labels = [*(f"{c.name} ({c.companion or 'none'})" for c in classes), "mean"]
    averages = means(classes)
    figure = Figure(figsize=(11, 1.8 + 0.3 * len(labels)), layout="constrained")
    ap = {"ap_in_company": "in company", "ap_alone": "alone"}
    fp = {"fp_rate_companion_only": "companion only", "fp_rate_neither": "neither"}
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, numbers in ((left, ap), (right, fp)):
        largest = 1.0  # of the axis, where all is 0
        for number, shift, color in zip(numbers, (-0.2, 0.2), ("C0", "C1"), strict=True):
            values = [*(getattr(c, number) for c in classes), averages[number][0]]
            rows = [row + shift for row in range(len(values))]
            widths = [value or 0 for value in values]
            axes.barh(rows, widths, 0.4, color=color, label=numbers[number])
            for row, value in zip(rows, values, strict=True):
                if value is None:  # which is not 0
                    axes.text(0, row, " n/a", color=color, va="center", fontsize=7)
            largest = max(largest, *widths)
        axes.axhline(len(classes) - 0.5, color="black", linewidth=0.8)
        axes.set(xlim=(0, 1.05 * largest), ylim=(len(labels) - 0.5, -0.5))
        axes.set_yticks(range(len(labels)), labels)
        axes.tick_params(labeltop=True)
        axes.grid(axis="x", alpha=0.4)
        axes.set_axisbelow(True)
        place: Record = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "borderaxespad": 2}
        axes.legend(**place, ncols=2, frameon=False)
    left.set(xlabel=f"{GEOMETRY[iou_type]} AP (%)", ylabel="class (companion)")
    right.set_xlabel(f"images with a false positive of score ≥ {score_threshold:g} (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
