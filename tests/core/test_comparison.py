"""plugin_core/evaluation/comparison: pycocotools' numbers, and the bootstrap's statistics."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from typing import Any

import numpy as np
import pytest
from comparison_cases import Case, random_case
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plugin_core.evaluation.comparison.accuracy import Accuracy, accuracy
from plugin_core.evaluation.comparison.bootstrap import (
    draw_weights,
    matches_of,
    resampled,
    rows_of,
)
from plugin_core.evaluation.comparison.detections import Detections, Truth
from plugin_core.evaluation.comparison.overlaps import areas, similarities

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


def load(content: dict[str, Any], results: list[Any], iou_type: str = "bbox") -> Detections:
    return Detections(Truth(content, iou_type), results)


def measured(content: dict[str, Any], results: list[Any], iou_type: str = "bbox") -> Accuracy:
    return accuracy(load(content, results, iou_type))


def point_values(content: dict[str, Any], results: list[Any], iou_type: str) -> np.ndarray:
    matches = matches_of(load(content, results, iou_type))
    return resampled(matches, np.ones((1, len(content["images"]))))[:, 0]


def as_row(content: dict[str, Any], results: list[Any], iou_type: str) -> list[float]:
    found = measured(content, results, iou_type)
    assert list(found.metrics) == rows_of(iou_type)
    return [*found.metrics.values(), *(one["AP"] for one in found.by_class.values())]


# Accuracy


@pytest.mark.parametrize(("iou_type", "seed", "options"), CASES)
def test_accuracy_is_pycocotools_to_the_last_digit(iou_type, seed, options):
    content, results = random_case(seed, iou_type, **options)
    before = copy.deepcopy((content, results))
    found = measured(content, results, iou_type)
    assert (content, results) == before
    expected = pycocotools_stats(content, results, iou_type)
    np.testing.assert_array_equal(list(found.metrics.values()), expected)


def test_accuracy_is_that_of_hotcoco_too():
    hotcoco = pytest.importorskip("hotcoco")
    content, results = random_case(4)
    content = copy.deepcopy(content)
    for n, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = n
    truth = hotcoco.COCO(content)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = hotcoco.COCOeval(truth, truth.load_res(results), "bbox")
        evaluation.run()
    np.testing.assert_array_equal(
        list(measured(*random_case(4)).metrics.values()), 100 * np.array(evaluation.stats)
    )


def test_oks_is_that_of_pycocotools_to_the_last_digit():
    rng = np.random.default_rng(0)
    points, objects = (np.round(rng.uniform(0, 90, (n, 17, 3)), 2) for n in (12, 9))
    objects[..., 2] = rng.integers(0, 3, (9, 17))
    objects[:2, :, 2] = 0  # without labelled keypoints
    boxes, areas = rng.uniform(20, 60, (9, 4)), rng.uniform(400, 3000, 9)
    evaluation = COCOeval(iouType="keypoints")
    evaluation._dts = {(0, 0): [{"score": 1, "keypoints": one.ravel()} for one in points]}
    rows = zip(objects, boxes, areas, strict=True)
    evaluation._gts = {(0, 0): [{"keypoints": p.ravel(), "bbox": b, "area": a} for p, b, a in rows]}
    expected = evaluation.computeOks(0, 0)
    np.testing.assert_array_equal(similarities(points, objects, boxes, areas), expected)


def test_a_class_has_the_numbers_of_its_records_alone():
    content, results = random_case(1)
    found = measured(content, results)
    assert list(found.by_class) == ["cup (0)", "table", "lamp", "never there", "cup (8)"]
    for category, metrics in zip(content["categories"], found.by_class.values(), strict=True):
        of_class = {**content, "categories": [category]}
        of_class["annotations"] = [
            a for a in content["annotations"] if a["category_id"] == category["id"]
        ]
        detections = [r for r in results if r["category_id"] == category["id"]]
        expected = pycocotools_stats(of_class, detections, "bbox")
        np.testing.assert_array_equal(list(metrics.values()), expected)
    assert all(math.isnan(value) for value in found.by_class["never there"].values())


def test_without_detections_ap_is_zero():
    content, _ = random_case(0)
    found = measured(content, [])
    assert found.metrics["AP"] == found.metrics["AR100"] == 0
    np.testing.assert_array_equal(point_values(content, [], "bbox"), as_row(content, [], "bbox"))


def test_ids_may_be_texts():
    content, results = random_case(2)
    expected = measured(content, results)
    for record in content["images"] + content["categories"]:
        record["id"] = f"{record['id']:03}"
    for record in content["annotations"] + results:
        record["image_id"] = f"{record['image_id']:03}"
        record["category_id"] = f"{record['category_id']:03}"
    found = measured(content, results)
    np.testing.assert_array_equal(list(found.metrics.values()), list(expected.metrics.values()))


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
    matches = matches_of(load(*case, iou_type))
    exact, rough = resampled(matches, weights.astype(float)), resampled(matches, weights)
    for values, row in zip(exact.T, weights.astype(int).tolist(), strict=True):
        np.testing.assert_allclose(values, as_row(*repeated(case, row), iou_type), atol=1e-9)
    np.testing.assert_allclose(rough, exact, atol=0.5)  # a rounded recall may move one of 101


def test_resamples_are_drawn_with_replacement_and_repeatably():
    weights = draw_weights(50, 20)
    assert (weights.sum(axis=1) == 50).all() and weights.max() > 1 and weights.min() == 0
    np.testing.assert_array_equal(weights, draw_weights(50, 20))


def test_areas_are_those_of_any_number_of_masks():
    mask = masks.encode(np.ones((5, 4), np.uint8, order="F"))
    assert areas([mask] * 300, "segm").tolist() == [20] * 300
    assert areas([], "segm").shape == (0,)
