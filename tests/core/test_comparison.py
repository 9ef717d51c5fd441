"""plugin_core/evaluation/comparison: pycocotools' numbers, and the bootstrap's statistics."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
import sys
from typing import Any

import numpy as np
import pytest
from comparison_cases import Case, random_case
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plugin_core.evaluation.comparison.accuracy import accuracy, fastest_library, precisions_of
from plugin_core.evaluation.comparison.bootstrap import (
    Difference,
    Spread,
    compare,
    draw_weights,
    holm,
    resampled,
    student,
)
from plugin_core.evaluation.comparison.matching import TRUE, ClassMatches, Matches, match
from plugin_core.evaluation.comparison.verdict import seeds_needed, verdict

LIBRARIES = [name for name in ("pycocotools", "hotcoco") if importlib.util.find_spec(name)]
CASES = [
    *[("bbox", seed, {}) for seed in range(8)],
    ("bbox", 20, {"crowded": True}),
    ("bbox", 21, {"ties": False}),
    *[(iou_type, seed, {}) for iou_type in ("segm", "keypoints") for seed in range(3)],
    ("keypoints", 22, {"crowded": True}),
]


def pycocotools_stats(content: dict[str, Any], results: list[Any], iou_type: str) -> np.ndarray:
    """What pycocotools prints, in percent; NaN where it says -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)


def point_values(content: dict[str, Any], results: list[Any], iou_type: str) -> np.ndarray:
    return resampled(match(content, results, iou_type), np.ones((1, len(content["images"]))))[:, 0]


def as_row(content: dict[str, Any], results: list[Any], iou_type: str) -> list[float]:
    measured = accuracy(content, results, iou_type)
    metrics = [measured.metrics[name] for name in precisions_of(iou_type)]
    return metrics + [one["AP"] for one in measured.by_class.values()]


# Accuracy


@pytest.mark.parametrize(("iou_type", "seed", "options"), CASES)
def test_accuracy_is_pycocotools_to_the_last_digit(iou_type, seed, options):
    content, results = random_case(seed, iou_type, **options)
    before = copy.deepcopy((content, results))
    expected = pycocotools_stats(content, results, iou_type)
    for library in LIBRARIES:
        measured = accuracy(content, results, iou_type, library)
        np.testing.assert_array_equal(list(measured.metrics.values()), expected, library)
    assert (content, results) == before  # pycocotools would write into them


def test_pycocotools_evaluates_where_hotcoco_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    content, results = random_case(4)
    assert fastest_library() == "pycocotools"
    expected = pycocotools_stats(content, results, "bbox")
    measured = accuracy(content, results, "bbox")
    np.testing.assert_array_equal(list(measured.metrics.values()), expected)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_class_has_the_numbers_of_its_records_alone(library):
    content, results = random_case(1)
    measured = accuracy(content, results, "bbox", library)
    assert list(measured.by_class) == ["cup (0)", "table", "lamp", "never there", "cup (8)"]
    for category, metrics in zip(content["categories"], measured.by_class.values(), strict=True):
        of_class = {**content, "categories": [category]}
        of_class["annotations"] = [
            a for a in content["annotations"] if a["category_id"] == category["id"]
        ]
        detections = [r for r in results if r["category_id"] == category["id"]]
        expected = pycocotools_stats(of_class, detections, "bbox")
        np.testing.assert_array_equal(list(metrics.values()), expected)
    assert all(math.isnan(value) for value in measured.by_class["never there"].values())


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_detections_ap_is_zero(library):
    content, _ = random_case(0)
    measured = accuracy(content, [], "bbox", library)
    assert measured.metrics["AP"] == measured.metrics["AR100"] == 0
    np.testing.assert_array_equal(point_values(content, [], "bbox"), as_row(content, [], "bbox"))


@pytest.mark.parametrize("library", LIBRARIES)
def test_ids_may_be_texts(library):
    content, results = random_case(2)
    expected = accuracy(content, results, "bbox")
    for record in content["images"] + content["categories"]:
        record["id"] = f"{record['id']:03}"
    for record in content["annotations"] + results:
        record["image_id"] = f"{record['image_id']:03}"
        record["category_id"] = f"{record['category_id']:03}"
    measured = accuracy(content, results, "bbox", library)
    np.testing.assert_array_equal(list(measured.metrics.values()), list(expected.metrics.values()))


# Weighted images


@pytest.mark.parametrize(("iou_type", "seed", "options"), CASES)
def test_every_image_once_gives_the_accuracy(iou_type, seed, options):
    content, results = random_case(seed, iou_type, **options)
    actual, expected = point_values(content, results, iou_type), as_row(content, results, iou_type)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def test_of_two_objects_with_equal_overlap_the_last_is_taken():
    # The best detection lies between two objects, the next one on the first of them.
    place = {"image_id": 1, "category_id": 1}
    boxes = [[100, 100, 100, 100], [140, 100, 100, 100]]
    annotations = [
        {"id": n, **place, "bbox": box, "area": 10000, "iscrowd": 0}
        for n, box in enumerate(boxes, 1)
    ]
    images, categories = [{"id": 1}], [{"id": 1, "name": "cup"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    results = [
        {**place, "bbox": [120, 100, 100, 100], "score": 0.9},
        {**place, "bbox": boxes[0], "score": 0.8},
    ]
    values = point_values(content, results, "bbox")
    assert values[1] == pytest.approx(100)  # AP50: the other object is left for the second one
    np.testing.assert_allclose(values, as_row(content, results, "bbox"))


def repeated(case: Case, weights: list[int]) -> Case:
    """The images of a case, each as often as its weight says."""
    content, results = case
    ids = sorted(image["id"] for image in content["images"])
    times = dict(zip(ids, weights, strict=True))

    def repeat(records: list[Any], key: str) -> list[Any]:
        return [{**r, key: 100 * r[key] + i} for r in records for i in range(times[r[key]])]

    annotations = repeat(content["annotations"], "image_id")
    for n, annotation in enumerate(annotations, 1):
        annotation["id"] = n
    images = repeat(content["images"], "id")
    return {**content, "images": images, "annotations": annotations}, repeat(results, "image_id")


@pytest.mark.parametrize("iou_type", ["bbox", "keypoints"])
def test_a_weight_is_that_many_copies_of_the_image(iou_type):
    case = random_case(21, iou_type, ties=False)
    weights = draw_weights(len(case[0]["images"]), 6)
    actual = resampled(match(*case, iou_type), weights, workers=2)
    for values, row in zip(actual.T, weights.astype(int).tolist(), strict=True):
        np.testing.assert_allclose(values, as_row(*repeated(case, row), iou_type), atol=1e-9)


def test_resamples_are_drawn_with_replacement_and_repeatably():
    weights = draw_weights(50, 20)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 50).all() and weights.max() > 1 and weights.min() == 0
    np.testing.assert_array_equal(weights, draw_weights(50, 20))


# Statistics


def simulated(
    rng: np.random.Generator, num_images: int, hit_rate: float, quality: np.ndarray
) -> Matches:
    """One class, two objects an image; a hard image (low quality) is hard for every detector."""
    hits = rng.random((num_images, 2)) < np.clip(hit_rate + quality[:, None], 0, 1)
    misses = rng.random((num_images, 2)) < 0.5
    scores = np.concatenate([rng.beta(4, 2, hits.size), rng.beta(2, 3, misses.size)])
    images = np.tile(np.repeat(np.arange(num_images), 2), 2)
    true = np.concatenate([hits.ravel(), np.zeros(misses.size, bool)])
    there = np.concatenate([hits.ravel(), misses.ravel()])
    order = np.argsort(-np.where(there, scores, -1), kind="stable")[: there.sum()]
    everywhere = np.ones((4, len(order)), bool)
    matched = np.broadcast_to(np.where(true[order], TRUE, 0), (4, 10, len(order))).copy()
    matched[1:] = matched[:, 1:] = 0  # AP50 alone is looked at: the others would cost time
    objects = np.repeat(np.arange(num_images), 2)
    one = ClassMatches(
        images[order], matched, everywhere, objects, np.ones((4, len(objects)), bool)
    )
    return Matches([one], ["cup"], num_images, "bbox")


def ap50_difference(
    pairs: list[tuple[float, float]], rng: np.random.Generator, resamples: int
) -> Difference:
    """Compare detectors of these hit rates, a pair for each seed, on 60 fresh images."""
    quality = rng.normal(0, 0.15, 60)
    weights = draw_weights(60, resamples, seed=int(rng.integers(1 << 30)))
    both = [
        [resampled(simulated(rng, 60, rate, quality), weights, workers=1) for rate in rates]
        for rates in zip(*pairs, strict=True)
    ]
    return compare(*both, list(precisions_of("bbox")), ["cup"], int(rng.integers(1 << 30)))[0][1]


def true_difference(rates: tuple[float, float]) -> float:
    rng = np.random.default_rng(99)
    quality = rng.normal(0, 0.15, 20000)
    a, b = (resampled(simulated(rng, 20000, r, quality), np.ones((1, 20000)))[1, 0] for r in rates)
    return b - a


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_interval_covers_the_true_difference(num_seeds):
    rng = np.random.default_rng(num_seeds)
    truth = true_difference((0.5, 0.6))
    covered = []
    for _ in range(100):
        noise = rng.normal(0, 0.1 if num_seeds > 1 else 0, (num_seeds, 2))
        one = ap50_difference([*map(tuple, noise + (0.5, 0.6))], rng, 100)
        covered.append(one.low <= truth <= one.high)
    assert 0.9 <= np.mean(covered) <= 0.99, np.mean(covered)


def test_equal_detectors_do_not_differ():
    case = random_case(3)
    values = resampled(match(*case, "bbox"), draw_weights(len(case[0]["images"]), 20))
    differences, spread = compare([values], [values], list(precisions_of("bbox")), [*"abcde"])
    measured = [d for d in differences if d.difference == d.difference]
    assert all((d.difference, d.low, d.high, d.p) == (0, 0, 0, 1) for d in measured)
    assert math.isnan(differences[-2].low) and math.isnan(differences[-2].p_holm)  # never there
    assert spread == Spread(0, (None, None))


def test_a_class_in_one_image_has_no_interval():
    one = np.array([[50.0, 50, 50, np.nan], [50, 50, 50, np.nan]])
    differences, _ = compare([one], [one + 10], ["AP"], ["cup"])
    assert differences[1].difference == 10
    assert math.isnan(differences[1].low) and math.isnan(differences[1].p)


def test_seeds_widen_the_interval_as_student_says():
    # Nothing but the seeds: 40 ± 1 against 41 ± 1, three each, has a standard error of √(2/3).
    baseline, other = ([np.full((1, 20001), m + d) for d in (-1.0, 0, 1)] for m in (40, 41))
    differences, spread = compare(baseline, other, ["AP"], [])
    assert differences[0].difference == 1 and spread == Spread(0, (1, 1))
    error = (differences[0].high - differences[0].low) / 2
    assert error == pytest.approx(student(4) * math.sqrt(2 / 3), rel=0.05)


def test_seeds_that_differ_by_chance_on_the_images_do_not_count_twice():
    # Three seeds apart by 1 on the images as they are, and by as much in every resample
    rng = np.random.default_rng(0)
    baseline, other = (
        [np.r_[mean + d, rng.normal(mean, 1, 20000)][None] for d in (-1.0, 0, 1)]
        for mean in (40, 41)
    )
    differences, _ = compare(baseline, other, ["AP"], [])
    error = (differences[0].high - differences[0].low) / 2
    assert error == pytest.approx(1.96 * math.sqrt(2 / 3), rel=0.05)


def test_holm_corrects_for_the_number_of_tests():
    corrected = holm(np.array([0.04, 0.01, np.nan, 0.03, 0.9]))
    # By hand: 4·0.01, then 3·0.03, then 2·0.04 but no less than the one before, then 1·0.9
    np.testing.assert_allclose(corrected, [0.09, 0.04, np.nan, 0.09, 0.9])


def test_student_quantiles_of_tables():
    for freedom, quantile in {1: 12.706, 4: 2.776, 10: 2.228, 11: 2.201, 20: 2.086}.items():
        assert student(freedom) == pytest.approx(quantile, abs=0.003)


# The sentence


def sentence(difference: float, low: float, high: float, spread: Spread) -> str:
    one = Difference("AP", None, difference, low, high, 0.5, None)
    return verdict("triplet", "plain", (40 + difference, 40), one, spread)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (
            (1.2, 0.5, 1.9, Spread(0.3, (0.2, 0.2))),
            "triplet is better than plain: AP 41.2 against 40.0, +1.2 (95% interval +0.5 to +1.9).",
        ),
        (
            (-1.2, -1.9, -0.5, Spread(0.3, (None, None))),
            "triplet is worse than plain: AP 38.8 against 40.0, -1.2 "
            "(95% interval -1.9 to -0.5); with one seed, this is of these trainings alone.",
        ),
        (
            (1.0, -0.5, 2.5, Spread(0.1, (1.0, 1.0))),
            "triplet and plain are not told apart: AP 41.0 against 40.0, +1.0 "
            "(95% interval -0.5 to +2.5); about 18 seeds of each would tell such a difference.",
        ),
        (
            (0.2, -0.5, 0.9, Spread(0.3, (0.2, 0.2))),
            "triplet and plain are not told apart: AP 40.2 against 40.0, +0.2 (95% interval "
            "-0.5 to +0.9); no number of seeds would tell so little on these images "
            "(standard error 0.3).",
        ),
        (
            (0.2, -0.5, 0.9, Spread(0.3, (None, None))),
            "triplet and plain are not told apart: AP 40.2 against 40.0, +0.2 (95% interval -0.5 "
            "to +0.9); how many seeds would tell is known only with several seeds of both.",
        ),
    ],
)
def test_the_verdict_is_a_sentence(numbers, expected):
    assert sentence(*numbers) == expected


def test_so_many_seeds_find_the_difference_in_80_percent_of_cases():
    spread = Spread(0.1, (0.5, 0.7))
    seeds = seeds_needed(0.6, spread)
    error = math.sqrt(0.1**2 + (0.5**2 + 0.7**2) / seeds)
    found = 1 + np.abs(np.random.default_rng(0).normal(0.6, error, 20000)) // (1.96 * error)
    assert 0.79 <= np.mean(found > 1) <= 0.84
