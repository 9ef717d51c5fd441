"""Contextual bias by the protocol of Singh et al. (CVPR 2020, arXiv:2001.03152).

The details are those of its reproduction (Kim et al., ReScience C 2021, arXiv:2104.13582). It is of
image classifiers, so a detector counts as one: the score of class b in an image is that of its best
detection of b, 0 without any. Boxes and masks play no part.

Pairs. For classes b and z, with the images taken by their ground truth,

    bias(b, z) = mean score of b in images with b and z / mean score of b in those without z

where z is in at least 20% of b's training images. The context c of b is the z of the highest bias.
The K = 20 classes b of the highest bias are reported. The paper takes a plain model's scores on
held-out training images, and then compares all models on the same pairs.

Numbers. The images with b are co-occurring (with c) or exclusive (without c). AP of b is computed
for each of the two sides, with all images without b as negatives. The mean is over the pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugin_core.evaluation.coco_files import Record, Source, read_annotations, read_results
from plugin_core.evaluation.companions import (
    classes_by_image,
    ids_by_name,
    read_pairs,
    train_images,
)
from plugin_core.evaluation.context_bias import split_images

Scores = Mapping[tuple[int, int], float]  # (image id, category id) → score, 0 where it is missing
Images = Mapping[int, set[int]]  # image id → category ids
Pairs = Mapping[int, tuple[int, float | None]]  # b → c, and the bias by which it was chosen

NUMBER_OF_PAIRS = 20
LEAST_CO_OCCURRENCE = 0.2  # of b's training images; for COCO-Stuff

# Numbers to average over pairs, in percent or percentage points: attribute → header
PAIR_NUMBERS = {"ap_co_occurring": "AP co-occurring", "ap_exclusive": "AP exclusive", "gap": "gap"}


@dataclass(frozen=True)
class PairBias:
    """Measurements of a pair; None where nothing can be measured.

    Attributes:
        category_id: of the class b.
        name: of the class b.
        companion_id: category id of its context c.
        companion: name of c.
        bias: the ratio by which the pair was chosen; None of a pair that was given.
        images_co_occurring: number of images with b and c.
        images_exclusive: number of images with b without c.
        images_without: number of images without b, the negatives.
        ap_co_occurring: AP of b over the co-occurring images and the negatives, in percent.
        ap_exclusive: AP of b over the exclusive images and the negatives, in percent.
        gap: ``ap_co_occurring`` - ``ap_exclusive``, in percentage points.
    """

    category_id: int
    name: str
    companion_id: int
    companion: str
    bias: float | None
    images_co_occurring: int
    images_exclusive: int
    images_without: int
    ap_co_occurring: float | None
    ap_exclusive: float | None
    gap: float | None


def image_scores(results: Iterable[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    """Take the highest score of each class in each image from a list of detections."""
    scores: dict[tuple[int, int], float] = {}
    for result in results:
        key = result["image_id"], result["category_id"]
        scores[key] = max(result["score"], scores.get(key, 0.0))
    return scores


def bias_score(images: Images, scores: Scores, category_id: int, other_id: int) -> float | None:
    """Compute bias(b, z); None where a group is empty, or b is never detected without z."""
    groups = split_images(images, category_id, other_id)
    if not groups.in_company or not groups.alone:
        return None
    together, apart = (
        sum(scores.get((i, category_id), 0.0) for i in side) / len(side)
        for side in (groups.in_company, groups.alone)
    )
    return together / apart if apart > 0 else None


def most_biased_pairs(
    train: Sequence[set[int]],
    images: Images,
    scores: Scores,
    number: int = NUMBER_OF_PAIRS,
    least_co_occurrence: float = LEAST_CO_OCCURRENCE,
) -> dict[int, tuple[int, float]]:
    """Choose the classes of the highest bias, each with its context.

    Args:
        train: category ids of each training image, in which co-occurrence is counted.
        images: category ids of the images on which the bias is measured.
        scores: of these images.
        number: K.
        least_co_occurrence: of b's training images, 0…1; what is in fewer is no context of b.

    Returns:
        Context and bias by category id, from the highest bias to the lowest; of equals the lowest
        ids.
    """
    chosen: dict[int, tuple[int, float]] = {}
    for b in sorted(set().union(*train)):
        with_b = {i: classes for i, classes in images.items() if b in classes}
        counts = Counter(z for classes in train if b in classes for z in classes)
        for z in sorted(counts.keys() - {b}):
            if counts[z] < least_co_occurrence * counts[b]:
                continue
            bias = bias_score(with_b, scores, b, z)
            if bias is not None and (b not in chosen or bias > chosen[b][1]):
                chosen[b] = z, bias
    return dict(sorted(chosen.items(), key=lambda item: -item[1][1])[:number])


def average_precision(scored: Iterable[tuple[float, bool]]) -> float | None:
    """Compute the AP of (score, whether positive) in percent; None without a positive.

    It is the mean over the positives of the precision at their score, without interpolation, as
    scikit-learn's ``average_precision_score``. Equal scores count together.
    """
    ranked = sorted(scored, key=lambda item: -item[0])
    positives = sum(positive for _, positive in ranked)
    if not positives:
        return None
    total = 0.0
    found = start = 0
    for end, (score, _) in enumerate(ranked, 1):
        if end == len(ranked) or ranked[end][0] != score:
            more = sum(positive for _, positive in ranked[start:end])
            found, start = found + more, end
            total += more * found / end
    return 100 * total / positives


def choose_pairs(
    content: Record,
    annotations: Source,
    scores: Scores,
    iou_type: str,
    *,
    pairs: str | None,
    train: str | None,
    held_out: Sequence[str] | None,
) -> tuple[Pairs, str]:
    """Choose the pairs to report.

    Args:
        content: content of the annotation file for the evaluation.
        annotations: this annotation file.
        scores: of its images.
        iou_type: "bbox" or "segm", the fields of ``held_out`` to check.
        pairs: path of a file of companions.
        train: without ``pairs``, path of the annotations in which co-occurrence is counted; None
            for those on which the bias is measured.
        held_out: without ``pairs``, paths of the annotations and the detections on which the bias
            is measured; None for the evaluated ones.

    Returns:
        The pairs, and their origin in words.

    Raises:
        ValueError: if a file cannot be used, or no pair qualifies.
    """
    if pairs:
        if held_out:
            raise ValueError("--held-out: chooses pairs, and --pairs gives them; leave one out")
        given = read_pairs(Source("--pairs", pairs), content)
        return {b: (c, None) for b, c in given.items() if c is not None}, f"from {pairs}"
    if held_out:
        on = Source("--held-out", held_out[0])
        measured = read_annotations(on, iou_type)
        ids = ids_by_name(content, annotations, measured, on)
        results = read_results(Source("--held-out", held_out[1]), iou_type, measured, on)
        scores = {(i, ids[b]): score for (i, b), score in image_scores(results).items()}
        images = {i: {ids[b] for b in bs} for i, bs in classes_by_image(measured).items()}
        where = f"bias of {held_out[1]} on {held_out[0]}"
    else:
        images = classes_by_image(content)
        where = "bias of the evaluated detections themselves, as no --pairs or --held-out is given"
    counted = list(images.values())
    if train:
        counted = train_images(content, annotations, Source("--train-annotations", train))
        where += f", co-occurrence of {train}"
    chosen = most_biased_pairs(counted, images, scores)
    if not chosen:
        raise ValueError(
            "no pair of classes has a bias: none is in at least "
            f"{LEAST_CO_OCCURRENCE:.0%} of another's images, with detections on both sides"
        )
    return dict(chosen), f"the {len(chosen)} of the highest {where}"


def measure_pairs(content: Record, scores: Scores, pairs: Pairs) -> list[PairBias]:
    """Measure the contextual bias of pairs.

    Args:
        content: content of the annotation file.
        scores: of its images.
        pairs: to measure.

    Returns:
        One entry for each of ``pairs``, in the same order.
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = classes_by_image(content)

    def measure_pair(b: int, c: int, bias: float | None) -> PairBias:
        groups = split_images(images, b, c)
        without = [*groups.companion_only, *groups.neither]

        def ap(side: Sequence[int]) -> float | None:
            labelled = [*((i, True) for i in side), *((i, False) for i in without)]
            return average_precision((scores.get((i, b), 0.0), label) for i, label in labelled)

        together, exclusive = ap(groups.in_company), ap(groups.alone)
        return PairBias(
            category_id=b,
            name=names[b],
            companion_id=c,
            companion=names[c],
            bias=bias,
            images_co_occurring=len(groups.in_company),
            images_exclusive=len(groups.alone),
            images_without=len(without),
            ap_co_occurring=together,
            ap_exclusive=exclusive,
            gap=None if together is None or exclusive is None else together - exclusive,
        )

    return [measure_pair(b, c, bias) for b, (c, bias) in pairs.items()]
