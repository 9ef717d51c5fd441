"""Kinds of errors, and the AP that mending each would bring (TIDE: Bolya et al., ECCV 2020).

At IoU 0.5 (of keypoints, OKS), after COCO's matching, a detection that found nothing is, in this
order,

    localization    overlaps an object of its class by 0.1 to 0.5
    classification  overlaps an object of another class by at least 0.5
    duplicate       overlaps an object of its class by at least 0.5; it was found already
    background      overlaps no object by more than 0.1
    both            the rest: an object of another class, overlapped by 0.1 to 0.5

and an object that was not found, and is not the object of an error of the first two kinds, is
missed. Mending a classification or localization error makes it a true positive, if its object was
not found and no error of either kind on this object has a higher score; else it takes the detection
away. Mending the other kinds takes away the detections, or the missed objects. Two further numbers
mend all false positives and all objects that were not found. What mending brings is AP50 afterwards
less AP50 before; the kinds do not add up, as the paper says.

AP50 is COCO's, over the classes with objects. The authors' tidecv has AP 0 for further classes that
are detected; without such classes and without crowds, its numbers are these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from plugin_core.evaluation.comparison.detections import (
    LEAST_OVERLAP,
    Detections,
    mean_ap,
    precision,
)
from plugin_core.evaluation.comparison.drawing import draw_bars
from plugin_core.evaluation.comparison.sections import Cell, Figure, Section, Table

IOU = 0.5
KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
TOTALS = ("false positives", "false negatives")


@dataclass(frozen=True)
class Errors:
    """Errors of a detector.

    Attributes:
        ap: AP50, in percent; None without objects.
        gains: percentage points that mending each of ``KINDS`` and ``TOTALS`` brings.
        counts: number of errors of each.
    """

    ap: float | None
    gains: dict[str, float | None]
    counts: dict[str, int]


def errors(detectors: Mapping[str, Detections]) -> Section:
    """Compare the errors of named detectors."""
    found = {name: measure(detections) for name, detections in detectors.items()}
    overlap = next(iter(detectors.values())).truth.overlap
    headers = ["detector", "AP50", *KINDS, *TOTALS]
    gains: list[list[Cell]] = [
        [name, e.ap, *(e.gains[kind] for kind in headers[2:])] for name, e in found.items()
    ]
    counts: list[list[Cell]] = [
        [name, *(e.counts[kind] for kind in headers[2:])] for name, e in found.items()
    ]
    bars = {name: [e.gains[kind] for kind in KINDS] for name, e in found.items()}
    return Section(
        "Kinds of errors",
        "How much AP50 would gain if all errors of one kind were mended, after TIDE (Bolya et al., "
        "ECCV 2020). The larger a number, the more of what the detector lacks is of this kind.",
        [
            Table(
                "AP50 that mending would bring",
                headers,
                gains,
                "Percentage points. Classification: right place, wrong class. Localization: right "
                f"class, {overlap} from 0.1 to 0.5. Both: neither is right. Duplicate: the object "
                "was found already. Background: no object there. Missed: no detection comes near. "
                "The kinds do not add up.",
                decimals=2,
            ),
            Table("Number of errors", [headers[0], *headers[2:]], counts),
        ],
        [Figure("AP50 that mending each kind would bring", draw_bars(KINDS, bars, "points"))],
        {name: vars(e) for name, e in found.items()},
    )


def measure(detections: Detections) -> Errors:
    """Find the errors of a detector, and what mending them brings."""
    truth, match = detections.truth, detections.match(IOU)
    wrong = ~match.right & ~match.ignored
    missing = match.counted & ~match.found
    same, real = detections.pair_same_class, match.counted[detections.pair_object]
    own, own_iou = _nearest(detections, same & real)
    other, other_iou = _nearest(detections, ~same & real)
    kinds: dict[str, np.ndarray] = {}
    rest = wrong
    for kind, of_it in (
        ("localization", (own_iou >= LEAST_OVERLAP) & (own_iou < IOU)),
        ("classification", other_iou >= IOU),
        ("duplicate", own_iou >= IOU),
        ("background", np.maximum(own_iou, other_iou) <= LEAST_OVERLAP),
        ("both", True),
    ):
        kinds[kind] = rest & of_it
        rest = rest & ~kinds[kind]

    def ap(
        keep: np.ndarray,
        right: np.ndarray = match.right,
        category: np.ndarray = detections.category,
        counted: np.ndarray = match.counted,
    ) -> float | None:
        order = detections.by_class
        if category is not detections.category:
            order = np.lexsort((-detections.score, category))
        order = order[keep[order]]
        values = precision(category[order], right[order], truth.objects_of_class(counted))
        # A class whose objects are all missed remains, with AP 0
        values[np.isnan(values).all(1) & (truth.objects_of_class(match.counted) > 0)] = 0
        return mean_ap(values)

    # Object that each of these errors means, and the best error of each object not found
    target = np.where(kinds["localization"], own, other)
    close = np.flatnonzero(kinds["localization"] | kinds["classification"])
    missed = missing.copy()
    missed[target[close]] = False
    close = close[missing[target[close]]]
    close = close[np.argsort(-detections.score[close], kind="stable")]
    best = np.zeros(len(wrong), bool)
    best[close[np.unique(target[close], return_index=True)[1]]] = True

    def ap_corrected(kind: str) -> float | None:
        corrected = kinds[kind] & best
        category = detections.category.copy()
        category[corrected] = truth.category[target[corrected]]
        return ap(kept & ~kinds[kind] | corrected, match.right | corrected, category)

    kept = ~match.ignored
    before = ap(kept)
    after = {
        "classification": ap_corrected("classification"),
        "localization": ap_corrected("localization"),
        **{kind: ap(kept & ~kinds[kind]) for kind in ("both", "duplicate", "background")},
        "missed": ap(kept, counted=match.counted & ~missed),
        "false positives": ap(match.right),
        "false negatives": ap(kept, counted=match.found),
    }
    counts = {kind: int(kinds[kind].sum()) for kind in kinds} | {
        "missed": int(missed.sum()),
        "false positives": int(wrong.sum()),
        "false negatives": int(missing.sum()),
    }
    gains = {
        kind: None if value is None or before is None else value - before
        for kind, value in after.items()
    }
    return Errors(before, gains, {kind: counts[kind] for kind in gains})


def _nearest(detections: Detections, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the object of each detection's largest overlap among some pairs, and the overlap."""
    object_, overlap = np.full(len(detections.score), -1), np.zeros(len(detections.score))
    chosen = np.flatnonzero(pairs)
    order = chosen[np.argsort(detections.pair_iou[chosen], kind="stable")]
    # The last of several values for one place remains
    object_[detections.pair_detection[order]] = detections.pair_object[order]
    overlap[detections.pair_detection[order]] = detections.pair_iou[order]
    return object_, overlap
