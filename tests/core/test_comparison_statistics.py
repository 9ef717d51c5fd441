"""plugin_core/evaluation/comparison: intervals, p-values and the sentences made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparison_cases import random_case
from scipy.special import stdtrit

from plugin_core.evaluation.comparison.bootstrap import (
    TRUE,
    ClassMatches,
    Matches,
    draw_weights,
    images_with_objects,
    matches_of,
    resampled,
    rows_of,
)
from plugin_core.evaluation.comparison.detections import SIZES, Detections, Truth
from plugin_core.evaluation.comparison.significance import Difference, Spread, compare, holm
from plugin_core.evaluation.comparison.verdict import overall, seeds_needed, verdict


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
    matched = np.broadcast_to(np.where(true[order], TRUE, 0), (4, 10, len(order))).copy()
    matched[1:] = matched[:, 1:] = 0  # AP50 alone is looked at: the others would cost time
    objects = np.repeat(np.arange(num_images), 2)
    one = ClassMatches(
        images=images[order],
        inside=np.ones((4, len(order)), bool),
        near=np.arange(len(order)),
        matched=matched,
        rank=np.zeros(len(order), int),
        object_images=objects,
        counted=np.ones((4, len(objects)), bool),
    )
    return Matches([one], [*SIZES], "bbox")


def ap50_difference(
    pairs: list[tuple[float, float]], rng: np.random.Generator, resamples: int
) -> Difference:
    """Compare detectors of these hit rates, a pair for each seed, on 20 fresh images."""
    quality = rng.normal(0, 0.15, 20)
    weights = draw_weights(20, resamples, seed=int(rng.integers(1 << 30)))
    weights = np.concatenate([np.ones((1, 20), np.float32), weights])
    both = [
        [resampled(simulated(rng, 20, rate, quality), weights) for rate in rates]
        for rates in zip(*pairs, strict=True)
    ]
    return compare(*both, rows_of("bbox"), ["cup"], np.full(13, 20))[0][1]


@pytest.mark.parametrize(("num_seeds", "noise", "trials"), [(1, 0, 80), (3, 0.05, 40)])
def test_interval_covers_the_true_difference_of_ap(num_seeds, noise, trials):
    rng = np.random.default_rng(num_seeds)
    truth = 9.01  # of these rates on 1,000,000 images
    covered = []
    for _ in range(trials):
        rates = rng.normal((0.5, 0.6), noise, (num_seeds, 2))
        one = ap50_difference([*map(tuple, rates)], rng, 60)
        covered.append(one.low <= truth <= one.high)
    assert 0.9 <= np.mean(covered) <= 0.99, np.mean(covered)


@pytest.mark.parametrize("num_seeds", [(1, 1), (2, 2), (3, 3), (1, 3)])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_interval_covers_the_true_difference_whatever_the_seeds(num_seeds, noise):
    # 400 comparisons at once, as rows. Images shift both detectors, and each training by itself.
    rng, rows, images, resamples = np.random.default_rng(1), 400, 30, 60
    weights = np.concatenate([np.ones((1, images)), draw_weights(images, resamples)]) / images
    difficulty = rng.normal(0, 3, (rows, images))
    both = []
    for seeds in num_seeds:
        own = rng.normal(0, noise * (seeds > 1), (seeds, rows, 1))
        by_image = difficulty + rng.normal(0, 4, (seeds, rows, images))
        both.append(40 + own + by_image @ weights.T)
    low, high = np.array(
        [
            (d.low, d.high)
            for d in compare(*both, ["AP"], ["c"] * (rows - 1), np.full(rows, images))[0]
        ]
    ).T
    assert 0.9 <= np.mean((low <= 0) & (high >= 0)) <= 0.99


def test_equal_detectors_do_not_differ():
    case = random_case(3)
    matches = matches_of(Detections(Truth(case[0], "bbox"), case[1]))
    values = resampled(matches, draw_weights(len(case[0]["images"]), 21))
    images = images_with_objects(matches)
    differences, spread = compare([values], [values], rows_of("bbox"), [*"abcde"], images)
    measured = [d for d in differences if d.difference == d.difference]
    assert len(measured) > 8 and all(d.difference == 0 for d in measured)
    assert all(
        (d.low, d.high) == (0, 0) and d.p == pytest.approx(1) for d in measured if d.p == d.p
    )
    assert math.isnan(differences[-2].low) and math.isnan(differences[-2].p_holm)  # never there
    assert spread == Spread(0, (None, None), images[0])


def test_a_class_in_one_image_has_no_interval():
    one = np.array([[50.0, 50, 51, np.nan], [50, 50, 51, np.nan]])
    differences, _ = compare([one], [one * 1.1], ["AP"], ["cup"], np.array([2, 1]))
    assert differences[1].difference == pytest.approx(5)
    assert math.isnan(differences[1].low) and math.isnan(differences[1].p)
    assert differences[0].low < 5 < differences[0].high


def test_resamples_that_all_say_the_same_have_no_interval():
    one = np.full((1, 4), 50.0)
    differences, _ = compare([one], [one + 10], ["AP"], [], np.array([2]))
    assert math.isnan(differences[0].low) and math.isnan(differences[0].p)


def test_seeds_widen_the_interval_as_student_says():
    # Nothing but the seeds: 40 ± 1 against 41 ± 1, three each, has a standard error of √(2/3).
    baseline, other = ([np.full((1, 9), m + d) for d in (-1.0, 0, 1)] for m in (40, 41))
    differences, spread = compare(baseline, other, ["AP"], [], np.array([1000]))
    assert differences[0].difference == 1 and spread == Spread(0, (1, 1), 1000)
    error = (differences[0].high - differences[0].low) / 2
    assert error == pytest.approx(2.776445 * math.sqrt(2 / 3))  # of 4 degrees of freedom
    assert differences[0].p == pytest.approx(0.287864, abs=1e-5)  # Student's, as scipy has it


def test_seeds_that_differ_by_chance_on_the_images_do_not_count_twice():
    # Three seeds apart by 1 on the images as they are, and by as much in every resample
    rng = np.random.default_rng(0)
    baseline, other = (
        [np.r_[mean + d, rng.normal(mean, 1.1, 20000)][None] for d in (-1.0, 0, 1)]
        for mean in (40, 41)
    )
    differences, spread = compare(baseline, other, ["AP"], [], np.array([1000]))
    assert spread.over_images == pytest.approx(1.1 * math.sqrt(2 / 3), rel=0.05)
    error = (differences[0].high - differences[0].low) / 2
    assert error == pytest.approx(
        1.9623 * spread.over_images, rel=1e-4
    )  # of 999 degrees of freedom


def test_the_interval_leaves_out_0_where_p_is_below_5_percent():
    rng = np.random.default_rng(3)
    both = [rng.normal(mean, 1, (2, 300, 50)) for mean in (40, 42)]
    differences, _ = compare(*both, ["AP"], ["c"] * 299, np.full(300, 10))
    outside = [d.low > 0 or d.high < 0 for d in differences]
    assert outside == [d.p < 0.05 for d in differences]
    assert 10 < sum(outside) < 290


def test_six_detectors_without_a_difference_rarely_seem_to_have_a_better_one_after_correction():
    # 300 comparisons of six detectors with one baseline, three seeds each, as rows
    rng, rows = np.random.default_rng(0), 300
    weights = np.concatenate([np.ones((1, 30)), draw_weights(30, 40)]) / 30
    baseline, *others = (
        40 + rng.normal(0, 1, (3, rows, 1)) + rng.normal(0, 4, (3, rows, 30)) @ weights.T
        for _ in range(7)
    )
    images = np.full(rows, 30)
    compared = [compare(baseline, one, ["AP"], ["c"] * (rows - 1), images)[0] for one in others]
    better = np.array([[d.difference > 0 for d in one] for one in compared])
    p = np.array([[d.p for d in one] for one in compared])
    assert np.mean((better & (p < 0.05)).any(axis=0)) > 0.05
    corrected = np.array([holm(column) for column in p.T]).T
    assert np.mean((better & (corrected < 0.05)).any(axis=0)) < 0.05


def test_holm_corrects_for_the_number_of_tests():
    corrected = holm(np.array([0.04, 0.01, np.nan, 0.03, 0.9]))
    # By hand: 4·0.01, then 3·0.03, then 2·0.04 but no less than the one before, then 1·0.9
    np.testing.assert_allclose(corrected, [0.09, 0.04, np.nan, 0.09, 0.9])


# The sentence


def sentence(difference: float, low: float, high: float, spread: Spread) -> str:
    p = 0.01 if low > 0 or high < 0 else 0.5
    one = Difference("AP", None, difference, low, high, p, p)
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
            "In these trainings triplet is worse than plain: AP 38.8 against 40.0, -1.2 "
            "(95% interval -1.9 to -0.5); with one seed, another one may turn the sign.",
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


def test_a_difference_that_does_not_stand_after_correction_says_so():
    one = Difference("AP", None, 1.2, 0.1, 2.3, 0.03, 0.18)
    assert verdict("ida", "plain", (41.2, 40), one, Spread(0.3, (0.2, 0.2)), 6) == (
        "ida is better than plain taken alone, but not after correction for 6 comparisons "
        "(Holm, p = 0.180): AP 41.2 against 40.0, +1.2 (95% interval +0.1 to +2.3)."
    )


def corrected(*numbers: tuple[float, float, float]) -> dict[str, Difference]:
    """Detectors a, b, …, each of a difference, p and p after correction."""
    return {
        name: Difference("AP", None, difference, 0, 0, p, p_holm)
        for name, (difference, p, p_holm) in zip("abc", numbers, strict=False)
    }


NOISE = "the noise of plain, whose AP varies by 0.8 (standard deviation over 3 seeds)"
ON_IMAGES = "better than plain on these images by more than chance"
ONE_SEED = ". plain has one seed, so its noise between seeds is not known."


@pytest.mark.parametrize(
    ("seeds", "numbers", "expected"),
    [
        (
            3,
            [(1, 0.03, 0.09), (-2, 0.001, 0.003), (0, 1, 1)],
            f"None of the 3 detectors beats {NOISE}.",
        ),
        (3, [(1, 0.01, 0.03), (2, 0.2, 0.4), (0, 1, 1)], f"1 of 3 detectors beats {NOISE}: a."),
        (3, [(1, 0.01, 0.02), (2, 0.01, 0.02)], f"2 of 2 detectors beat {NOISE}: a, b."),
        (3, [(1, 0.01, 0.01)], f"a beats {NOISE}."),
        (3, [(1, 0.3, 0.3)], f"a does not beat {NOISE}."),
        (3, [(math.nan, math.nan, math.nan)], f"a does not beat {NOISE}."),
        (1, [(1, 0.3, 0.6), (1, 0.4, 0.6)], f"None of the 2 detectors is {ON_IMAGES}{ONE_SEED}"),
        (1, [(1, 0.01, 0.02), (1, 0.4, 0.4)], f"1 of 2 detectors is {ON_IMAGES}: a{ONE_SEED}"),
        (
            1,
            [(1, 0.01, 0.02), (1, 0.01, 0.02)],
            f"2 of 2 detectors are {ON_IMAGES}: a, b{ONE_SEED}",
        ),
        (1, [(1, 0.3, 0.3)], ""),  # the detector's own sentence says it
    ],
)
def test_the_first_sentence_says_whether_any_detector_beats_the_noise(seeds, numbers, expected):
    assert overall("plain", seeds, corrected(*numbers), 0.8) == expected


def test_so_many_seeds_find_the_difference_in_80_percent_of_cases():
    # Few seeds tell their spread badly, so that Student's distribution asks for more of them
    rng, apart, images = np.random.default_rng(0), (0.5, 0.7), 0.1
    for difference in (0.6, 1.5):
        seeds = seeds_needed(difference, Spread(images, apart))
        first, second = (rng.normal(0, one, (20000, seeds)) for one in apart)
        variances = [one.var(axis=1, ddof=1) / seeds for one in (first, second)]
        whole = images**2 + sum(variances)
        freedom = whole**2 / (sum(one**2 for one in variances) / (seeds - 1))
        by = difference + second.mean(1) - first.mean(1) + rng.normal(0, images, 20000)
        found = np.abs(by) > stdtrit(freedom, 0.975) * np.sqrt(whole)
        assert 0.76 <= np.mean(found) <= 0.88, (difference, seeds)


def test_seeds_needed_are_more_than_those_that_did_not_tell():
    # Three seeds each, 40 ± 0.2 against 45.5 ± 2.8: by the normal distribution, they would do
    baseline = [np.full((1, 9), 40 + d) for d in (-0.2, 0, 0.2)]
    other = [np.full((1, 9), 45.5 + d) for d in (-2.8, 0, 2.8)]
    differences, spread = compare(baseline, other, ["AP"], [], np.array([1000]))
    assert differences[0].p > 0.05 and seeds_needed(differences[0].difference, spread) > 3
    assert seeds_needed(-differences[0].difference, spread) > 3


def test_seeds_that_the_images_explain_almost_do_not_make_the_interval_endless():
    # Three seeds apart by 1, and by 0.97 or so in the resamples, where they move against each other
    moved = np.r_[0, np.random.default_rng(0).normal(0, 0.97, 20000)]
    baseline, other = ([(mean + d * (1 + moved))[None] for d in (-1.0, 0, 1)] for mean in (40, 44))
    difference = compare(baseline, other, ["AP"], [], np.array([1000]))[0][0]
    assert 2 < difference.low and difference.high < 6 and difference.p < 0.05
