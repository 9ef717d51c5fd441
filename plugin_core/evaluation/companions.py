"""Choosing the companion of each class: another class that often comes with it."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from plugin_core.evaluation.coco_files import (
    Checks,
    Record,
    Source,
    check_records,
    check_unique,
    is_id,
    read_annotations,
    read_json,
)

Companions = dict[int, int | None]  # category id → companion's category id, or None


def classes_by_image(content: Mapping[str, Any]) -> dict[int, set[int]]:
    """List the category ids of each image of a COCO-format file, empty images included.

    A crowd counts: it is company, and a detection on it is no false positive.
    """
    classes: dict[int, set[int]] = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        classes[annotation["image_id"]].add(annotation["category_id"])
    return classes


def frequent_companions(images: Iterable[set[int]]) -> dict[int, int]:
    """Find for each class the other class in most of its images; of equals the lowest id.

    Args:
        images: category ids of each image.

    Returns:
        Companions by category id, without classes that never share an image.
    """
    shared: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for classes in images:
        for category_id in classes:
            shared[category_id].update(classes - {category_id})
    return {
        category_id: min(counts, key=lambda other: (-counts[other], other))
        for category_id, counts in shared.items()
        if counts
    }


def add_companions(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--pairs`` and ``--train-annotations``, one of which may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--pairs", metavar="FILE", help="the companions of the classes, for contextual bias"
    )
    group.add_argument(
        "--train-annotations", metavar="FILE", help="the same, with companions counted here"
    )


def choose_companions(
    content: Record, annotations: Source, *, pairs: str | None, train: str | None
) -> tuple[Companions, str]:
    """Choose the companion of each class to report.

    Args:
        content: content of the annotation file for the evaluation.
        annotations: this annotation file.
        pairs: path of a file of companions, as :func:`read_pairs` reads it.
        train: without ``pairs``, path of the annotations in which companions are counted; None for
            the evaluated annotations.

    Returns:
        The companions, and their origin in words.

    Raises:
        ValueError: if a file cannot be used.
    """
    if pairs:
        return read_pairs(Source("--pairs", pairs), content), f"from {pairs}"
    if train:
        counted_in, why = train, ""
        images = train_images(content, annotations, Source("--train-annotations", train))
    else:
        counted_in, why = annotations.path, ", as no --pairs or --train-annotations are given"
        images = list(classes_by_image(content).values())
    found = frequent_companions(images)
    companions = {category["id"]: found.get(category["id"]) for category in content["categories"]}
    return companions, f"the class that is in most images of {counted_in} that hold the class{why}"


def train_images(content: Record, annotations: Source, source: Source) -> list[set[int]]:
    """List the classes of each training image, by the evaluated file's category ids."""
    train = read_annotations(source)
    ids = ids_by_name(content, annotations, train, source)
    return [{ids[i] for i in classes} for classes in classes_by_image(train).values()]


def ids_by_name(
    content: Record, annotations: Source, other: Record, source: Source
) -> dict[int, int]:
    """Find the evaluated file's category id for each one of another annotation file, by name.

    Raises:
        ValueError: if the names differ or are not unique.
    """
    check_unique(content["categories"], "name", f"{annotations}: categories")
    check_unique(other["categories"], "name", f"{source}: categories")
    ids = {category["name"]: category["id"] for category in content["categories"]}
    names = {category["id"]: category["name"] for category in other["categories"]}
    different = ids.keys() ^ set(names.values())
    if different:
        first = min(different)
        side = annotations.option if first in ids else source.option
        raise ValueError(
            f"{source}: other categories than {annotations}; "
            f"{len(different)} are in one of the two only, such as {first!r} in {side}"
        )
    return {i: ids[name] for i, name in names.items()}


def read_pairs(source: Source, content: Record) -> Companions:
    """Read a file of companions of a dataset's classes; raises ValueError if it cannot be used.

    It is make_synthetic_coco.py's, or the context_bias.json of an earlier evaluation.
    """
    content_of_file = read_json(source)
    pairs = content_of_file.get("companions") if isinstance(content_of_file, dict) else None
    if isinstance(pairs, str) and isinstance(content_of_file.get("classes"), list):
        pairs = [  # of an evaluation, which lists classes without a companion, too
            pair
            for pair in content_of_file["classes"]
            if not isinstance(pair, dict) or pair.get("companion_id", pair) is not None
        ]
    if not isinstance(pairs, list):
        raise ValueError(
            f"{source}: no list of companions; expected make_synthetic_coco.py's file, or the "
            "context_bias.json of an evaluation"
        )
    if not pairs:
        raise ValueError(f"{source}: the list of companions is empty; expected at least one")
    checks: Checks = {"category_id": is_id, "companion_id": is_id}
    check_records(pairs, f"{source}: pair", checks)
    known = [category["id"] for category in content["categories"]]
    companions: Companions = {}
    for pair in pairs:
        category_id, companion_id = pair["category_id"], pair["companion_id"]
        for key in checks:
            if pair[key] not in known:
                raise ValueError(
                    f"{source}: unknown {key} {pair[key]!r}; the ground truth lists "
                    f"{', '.join(map(str, known))}"
                )
        if category_id == companion_id:
            raise ValueError(f"{source}: category_id {category_id} is its own companion")
        if category_id in companions:
            raise ValueError(f"{source}: category_id {category_id} occurs twice; expected one pair")
        companions[category_id] = companion_id
    return companions
