"""Precision over recall, AP by the size of objects and by their number in the image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plugin_core.evaluation.comparison.detections import RECALLS, Detections, Truth
from plugin_core.evaluation.comparison.drawing import (
    draw_bars,
    grid_and_legend,
    new_figure,
    no_formula,
    to_png,
)
from plugin_core.evaluation.comparison.sections import Figure, Section, Table

GROUPS = 4  # of images, by number of objects
CURVES = (0.5, 0.75)  # IoU or OKS
AREAS = {"small": "below 32²", "medium": "32² to 96²", "large": "above 96²"}  # in pixels


def curves(detectors: Mapping[str, Detections]) -> Section:
    """Compare where named detectors are precise, over recall, sizes and crowded images."""
    truth = next(iter(detectors.values())).truth
    groups = by_number_of_objects(truth)
    precisions = {
        name: {iou: _mean_over_classes(d.precision(d.match(iou))) for iou in CURVES}
        for name, d in detectors.items()
    }
    sizes: dict[str, list[float | None]] = {name: [] for name in detectors}
    numbers: dict[str, list[float | None]] = {}
    for name, d in detectors.items():
        every, *numbers[name] = d.ap(images=[None, *groups.values()])
        sizes[name] = [every, *(d.ap(size)[0] for size in [*truth.sizes][1:])]
    tables = [
        Table(
            f"AP by {what}",
            [header, "objects", *detectors],
            rows,
            f"In percent, {truth.overlap} 0.50:0.95.",
        )
        for what, header, rows in (
            (
                "size of the objects",
                "area in pixels",
                [
                    [
                        f"{size} ({AREAS[size]})" if size in AREAS else size,
                        int(truth.wanted[i].sum()),
                        *(values[i] for values in sizes.values()),
                    ]
                    for i, size in enumerate(truth.sizes)
                ],
            ),
            (
                "number of objects in the image",
                "objects in the image",
                [
                    [
                        label,
                        int(truth.objects_of_image[images].sum()),
                        *(values[i] for values in numbers.values()),
                    ]
                    for i, (label, images) in enumerate(groups.items())
                ],
            ),
        )
    ]
    short = [label.partition(" (")[0] for label in groups]
    return Section(
        "Where precision is lost",
        "Precision over recall as the score threshold falls, and AP of parts of the ground truth.",
        tables,
        [
            Figure("Precision over recall, mean over classes", _draw(precisions, truth.overlap)),
            Figure("AP by size", draw_bars([*truth.sizes], sizes, "AP (%)")),
            Figure("AP by number of objects in the image", draw_bars(short, numbers, "AP (%)")),
        ],
        {
            "recall": RECALLS,
            "precision": {
                name: {f"{truth.overlap} {iou:g}": values for iou, values in of_iou.items()}
                for name, of_iou in precisions.items()
            },
            "ap_by_size": {
                name: dict(zip(truth.sizes, v, strict=True)) for name, v in sizes.items()
            },
            "ap_by_number": {
                name: dict(zip(groups, v, strict=True)) for name, v in numbers.items()
            },
        },
    )


def by_number_of_objects(truth: Truth, groups: int = GROUPS) -> dict[str, np.ndarray]:
    """Group the images by quantiles of their number of objects, crowds left out.

    Images with equally many objects stay together, so there may be fewer groups. Images without
    objects are in the first.

    Returns:
        Whether each image is in the group (I,), by a label such as "1 to 3 (120 images)".
    """
    counts = truth.objects_of_image
    if not counts.any():
        return {}
    shares = np.linspace(0, 1, groups + 1)[1:]
    result = {}
    low = 0
    for high in np.unique(np.quantile(counts[counts > 0], shares, method="inverted_cdf")):
        images = (counts >= low) & (counts <= high)
        first, last = int(counts[images].min()), int(counts[images].max())
        spread = f"{first}" if first == last else f"{first} to {last}"
        number = int(images.sum())
        result[f"{spread} ({number:,} image{'s' if number != 1 else ''})"] = images
        low = int(high) + 1
    return result


def _mean_over_classes(values: np.ndarray) -> np.ndarray:
    """Average precisions (K, 101) over the classes with objects; nothing if there are none."""
    values = values[~np.isnan(values).any(1)]
    return values.mean(0) if len(values) else np.zeros(0)


def _draw(precisions: Mapping[str, Mapping[float, np.ndarray]], overlap: str) -> bytes:
    figure = new_figure(8, 3.6)
    for axes, iou in zip(figure.subplots(1, len(CURVES), sharey=True), CURVES, strict=True):
        for name, of_iou in precisions.items():
            values = of_iou[iou]
            label = no_formula(name)
            axes.plot(RECALLS[: len(values)], values, label=label, linewidth=1.5)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", title=f"{overlap} {iou:g}")
        grid_and_legend(axes)
    figure.axes[0].set_ylabel("precision")
    return to_png(figure)
