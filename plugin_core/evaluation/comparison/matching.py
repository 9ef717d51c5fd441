"""Matching detections to objects by COCO's rules, in all images at once.

For each image and class the detections, best score first, take the free object of highest overlap
above the threshold; of equal ones the last. Objects that are to be found go before ignored ones
(crowds and those outside the area in question), and a crowd may be taken often. This is what
pycocotools' ``COCOeval.evaluateImg`` computes. Groups, each an image and a class, do not touch each
other: first the best detection of every group chooses, then the second of every group, and so on.
"""

from __future__ import annotations

import numpy as np


def choose(
    pairs: tuple[np.ndarray, np.ndarray, np.ndarray],
    group: np.ndarray,
    thresholds: np.ndarray,
    wanted: np.ndarray,
    reusable: np.ndarray,
    taken: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Let detections choose among objects.

    Shape notation: P pairs, D detections, G objects, a areas, t thresholds, c candidates.

    Args:
        pairs: detection, object and overlap of each pair to choose from (P,); in a group, the
            detections are numbered by falling score.
        group: of each detection (D,); an object is in pairs of one group alone.
        thresholds: of the overlap (t,).
        wanted: objects that go before the others, in each area (a, G).
        reusable: objects that may be chosen often (G,).
        taken: objects that are taken from the start (G,).

    Returns:
        the candidates, which are the detections with a pair, ascending (c,); and the object of each
        in each area and at each threshold (a, t, c), -1 for none.
    """
    order = np.lexsort((pairs[1], pairs[2], pairs[0]))
    detections, objects, overlap = (one[order] for one in pairs)
    candidates, first, size = np.unique(detections, return_index=True, return_counts=True)
    shape = (len(wanted), len(thresholds))
    result = np.full((*shape, len(candidates)), -1, np.int32)
    free = np.ones((*shape, len(reusable)), bool)
    if taken is not None:
        free[..., taken] = False
    possible = overlap >= thresholds[:, None]
    for now in _rounds(group[candidates]):
        sizes = size[now]
        starts = np.cumsum(sizes) - sizes
        within = np.arange(sizes.sum()) - np.repeat(starts, sizes)
        chosen = np.repeat(first[now], sizes) + within
        there = objects[chosen]
        preference = np.repeat(sizes, sizes) * wanted[:, None, there] + within
        preference = np.where(free[..., there] & possible[:, chosen], preference, -1)
        best = np.maximum.reduceat(preference, starts, axis=-1)
        a, t, c = np.nonzero(best >= 0)
        found = objects[first[now][c] + best[a, t, c] % sizes[c]]
        result[a, t, now[c]] = found
        free[a, t, found] = reusable[found]
    return candidates, result


def _rounds(group: np.ndarray) -> list[np.ndarray]:
    """List the candidates that are first in their group, then those that are second, and so on."""
    if not len(group):
        return []
    rank = rank_in_group(group)
    order = np.argsort(rank, kind="stable")
    return np.split(order, np.cumsum(np.bincount(rank))[:-1])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """Return the place of each entry among those of its group, from 0 on, in their order."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    rank = np.empty(len(group), int)
    rank[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return rank
