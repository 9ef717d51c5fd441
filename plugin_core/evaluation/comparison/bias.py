"""Contextual bias of detectors beside each other, measured on the same pairs of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plugin_core.evaluation.coco_files import Record, Source, read_results
from plugin_core.evaluation.companions import Companions
from plugin_core.evaluation.comparison.drawing import draw_bars
from plugin_core.evaluation.comparison.inputs import Detector
from plugin_core.evaluation.comparison.sections import Cell, Figure, Section, Table
from plugin_core.evaluation.context_bias import (
    NUMBERS,
    ClassBias,
    load_detections,
    load_ground_truth,
    means,
    measure,
)

SHOWN = 25  # classes in the picture


def contextual_bias(
    detectors: Sequence[Detector],
    content: Record,
    annotations: Source,
    companions: tuple[Companions, str],
    score_threshold: float = 0.3,
) -> Section:
    """Compare how much detectors lean on the company of objects.

    Args:
        detectors: with boxes or masks; the first seed's file is read again.
        content: content of the annotation file.
        annotations: the annotation file.
        companions: of the classes, and their origin in words.
        score_threshold: of a false positive, 0…1.
    """
    pairs, origin = companions
    iou_type = detectors[0].seeds[0].truth.iou_type
    found: dict[str, list[ClassBias]] = {}
    for one in detectors:
        source = Source(f"--detector {one.name}", one.files[0])
        truth = load_ground_truth(content)
        results = load_detections(truth, read_results(source, iou_type, content, annotations))
        found[one.name] = measure(truth, results, pairs, iou_type, score_threshold)
    averages = {name: means(classes) for name, classes in found.items()}
    rows: list[list[Cell]] = [
        [name, *(value for value, _ in numbers.values())] for name, numbers in averages.items()
    ]
    counts = [n for _, n in averages[detectors[0].name].values()]
    rows.append(["classes in the mean", *counts])
    first = found[detectors[0].name]
    gaps: list[list[Cell]] = [
        [
            *(c.name, c.companion, c.objects_in_company, c.objects_alone),
            *(classes[k].gap for classes in found.values()),
        ]
        for k, c in enumerate(first)
    ]
    measured = {k: c.gap for k, c in enumerate(first) if c.gap is not None}
    most = sorted(measured, key=lambda k: -measured[k])[:SHOWN]
    bars = {name: [classes[k].gap for k in most] for name, classes in found.items()}
    return Section(
        "Contextual bias",
        "Does a detector find a class as well without the other class that often comes with it, "
        "its companion? The gap is AP in images with the companion less AP in those without it. "
        "Images with a companion are also fuller, so compare detectors, and not one gap with 0; "
        "the gap at equal counts is between images with equally many objects. FP rate: share of "
        "the images without the class in which it is detected with a score of at least "
        f"{score_threshold:g}, with the companion alone or with neither.\n\n"
        f"Companions: {origin}.",
        [
            Table(
                "Mean over the classes",
                ["detector", *NUMBERS.values()],
                rows,
                "AP and FP rates in percent, gaps in percentage points. Each column is over the "
                "classes that have its number, so a gap is not the difference of two columns.",
            ),
            Table(
                "Gap of each class",
                ["class", "companion", "objects in company", "objects alone", *found],
                gaps,
                "In percentage points.",
            ),
        ],
        [Figure("Gap of each class", draw_bars([first[k].name for k in most], bars, "points"))]
        if most
        else [],
        {name: _data(classes, averages[name]) for name, classes in found.items()},
    )


def _data(
    classes: Sequence[ClassBias], averages: Mapping[str, tuple[float | None, int]]
) -> dict[str, Any]:
    mean = {number: value for number, (value, _) in averages.items()}
    return {"classes": [asdict(c) for c in classes], "mean": mean}
