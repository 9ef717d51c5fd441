"""Accuracy of a long tail's groups of classes, by how many training images a class has.

The groups are those of Liu et al. (CVPR 2019, arXiv:1904.05160): many (more than 100 images), few
(fewer than 20) and medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugin_core.errors import ArgumentError

GROUPS = ("many", "medium", "few")


def check_thresholds(many: Any, few: Any) -> None:
    """Raise ArgumentError unless both are integers and 0 ≤ few ≤ many + 1."""
    for name, value in (("many", many), ("few", few)):
        if type(value) is not int or value < 0:
            raise ArgumentError(name, f"must be a number of images of at least 0, got {value!r}")
    if few > many + 1:
        raise ArgumentError(
            "few", f"must be at most many + 1 = {many + 1}, so that no class is in both, got {few}"
        )


def shot_groups(counts: Sequence[int], many: int = 100, few: int = 20) -> list[str]:
    """Tell the group of each class: more images than ``many``, fewer than ``few``, or medium."""
    return ["many" if n > many else "few" if n < few else "medium" for n in counts]


def long_tail_accuracy(
    predicted: NDArray[Any],
    labels: NDArray[Any],
    counts: Sequence[int],
    many: int = 100,
    few: int = 20,
) -> dict[str, float]:
    """Compute the top-1 accuracy of all images and of each group, in percent.

    A group's is the mean over its classes, as the field has it. That of all images counts each
    image once; on balanced test data it is the mean over all classes, too.

    Args:
        predicted: (N,) classes.
        labels: (N,) true classes, each in [0, K).
        counts: training images of the K classes.
        many: a class with more images is in "many".
        few: a class with fewer images is in "few".

    Returns:
        "all", and "many", "medium" and "few" where the labels have classes of the group.
    """
    correct = predicted == labels
    groups = shot_groups(counts, many, few)
    accuracies: dict[str, list[float]] = {group: [] for group in GROUPS}
    for k in np.unique(labels):
        accuracies[groups[int(k)]].append(float(correct[labels == k].mean()))
    means = {group: float(np.mean(found)) for group, found in accuracies.items() if found}
    return {name: 100 * x for name, x in {"all": float(correct.mean()), **means}.items()}
