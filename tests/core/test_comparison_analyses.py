"""Why detectors differ: matching as COCO's, and each analysis on cases worked out by hand."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks
from pycocotools.cocoeval import COCOeval

from plugin_core.errors import ArgumentError
from plugin_core.evaluation import context_bias
from plugin_core.evaluation.comparison.calibration import calibration, reliability
from plugin_core.evaluation.comparison.confusion import confusion, confusion_matrix
from plugin_core.evaluation.comparison.curves import by_number_of_objects, curves
from plugin_core.evaluation.comparison.detections import Detections, Truth
from plugin_core.evaluation.comparison.errors import errors, measure
from plugin_core.evaluation.comparison.pictures import f_scores, most_different, pictures

BOX, FAR, FARTHER = [0, 0, 10, 10], [50, 50, 10, 10], [80, 80, 10, 10]
CAT, DOG = 3, 7  # ids with gaps


def content(*images: list[tuple[int, list[float]]], crowds: int = 0) -> dict[str, Any]:
    """Images with objects of a class and a box each; the last ``crowds`` objects are crowds."""
    objects = [(i, *thing) for i, image in enumerate(images) for thing in image]
    return {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "width": 100, "height": 100}
            for i in range(len(images))
        ],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": n + 1,
                "image_id": 10 * i,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(n >= len(objects) - crowds),
            }
            for n, (i, category, box) in enumerate(objects)
        ],
    }


def result(category: int, box: list[float], score: float, image: int = 0) -> dict[str, Any]:
    return {"image_id": 10 * image, "category_id": category, "bbox": box, "score": score}


def detections_of(
    whole: dict[str, Any], results: dict[str, list[dict[str, Any]]], iou_type: str = "bbox"
) -> dict[str, Detections]:
    truth = Truth(whole, iou_type)
    return {name: Detections(truth, found) for name, found in results.items()}


def load(whole: dict[str, Any], *results: dict[str, Any]) -> Detections:
    return detections_of(whole, {"it": [*results]})["it"]


def random_case(seed: int, simple: bool = False) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twelve images with objects near each other, and detections around them.

    There are crowds and equal scores, unless the case is ``simple``.
    """
    random = np.random.default_rng(seed)
    images: list[list[tuple[int, list[float]]]] = []
    found = []
    for image in range(12):
        images.append([])
        for _ in range(random.integers(0, 6)):
            box = [*random.integers(0, 60, 2), *random.integers(8, 120, 2)]
            box = [float(value) for value in box]
            images[-1].append((int(random.choice([CAT, DOG])), box))
            for _ in range(random.integers(0, 4)):
                moved = [float(value) for value in box + random.integers(-6, 7, 4)]
                category, score = int(random.choice([CAT, DOG])), float(random.random())
                score = score if simple else round(score, 1)
                found.append(result(category, moved, score, image))
    whole = content(*images)
    for annotation in [] if simple else whole["annotations"]:
        annotation["iscrowd"] = int(random.random() < 0.2)
    return whole, found


def with_masks(
    whole: dict[str, Any], found: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for image in whole["images"]:
        image |= {"width": 200, "height": 200}
    for annotation in whole["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    results = []
    for one in found:
        rle = masks.frPyObjects(np.array([one["bbox"]], float), 200, 200)[0]
        rle["counts"] = rle["counts"].decode()
        results.append({k: v for k, v in one.items() if k != "bbox"} | {"segmentation": rle})
    return whole, results


def with_keypoints(
    whole: dict[str, Any], found: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Keypoints from the upper left to the lower right corner; every fifth object has no labels."""

    def points(box: list[float], seen: int) -> list[float]:
        x, y, w, h = box
        return [v for i in range(17) for v in (x + w * i / 16, y + h * i / 16, seen)]

    for n, annotation in enumerate(whole["annotations"]):
        seen = 2 * int(n % 5 != 4)
        annotation["keypoints"] = points(annotation["bbox"], seen)
        annotation["num_keypoints"] = 17 * (seen > 0)
    return whole, [
        {k: v for k, v in one.items() if k != "bbox"} | {"keypoints": points(one["bbox"], 1)}
        for one in found
    ]


SHAPES = {"bbox": lambda *case: case, "segm": with_masks, "keypoints": with_keypoints}


@pytest.mark.parametrize("iou_type", list(SHAPES))
@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools_to_the_last_digit(seed, iou_type):
    whole, found = SHAPES[iou_type](*random_case(seed))
    truth = context_bias.load_ground_truth(whole)
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in found]), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]
    ours = detections_of(whole, {"it": found}, iou_type)["it"]
    for area, size in enumerate(ours.truth.sizes):
        values = precision[:, :, :, area, -1]
        expected = 100 * values[values > -1].mean() if (values > -1).any() else None
        assert ours.ap(size) == [expected]
    curve = ours.precision(ours.match(0.75)).T
    assert np.array_equal(np.where(np.isnan(curve), -1, curve), precision[5, :, :, 0, -1])


def test_only_the_best_hundred_detections_of_a_class_in_an_image_count():
    many = [result(CAT, FAR, 0.9) for _ in range(99)]
    whole = content([(CAT, BOX)])
    assert load(whole, *many, result(CAT, BOX, 0.1)).match(0.5).right.any()
    assert (
        not load(whole, *many, result(CAT, FAR, 0.5), result(CAT, BOX, 0.1)).match(0.5).right.any()
    )


# Kind, number of errors, gain in percentage points; the other gains of the case, where not 0
AT_50 = 100 * 51 / 101  # AP of a class half of whose objects are found, with no false positive


@pytest.mark.parametrize(
    "objects, detections, kind, gain, others",
    [
        ([(CAT, BOX)], [result(DOG, BOX, 0.9)], "classification", 100, {}),
        ([(CAT, BOX)], [result(CAT, [0, 0, 10, 4], 0.9)], "localization", 100, {}),
        (  # a dog where a part of a cat is; that and the missing cat halve the means
            [(CAT, BOX), (DOG, FAR)],
            [result(DOG, [0, 0, 10, 4], 0.9), result(DOG, FAR, 0.8)],
            "both",
            25,
            {"false positives": 25},
        ),
        (
            [(CAT, BOX), (CAT, FAR)],
            [result(CAT, BOX, 0.9), result(CAT, BOX, 0.8), result(CAT, FAR, 0.7)],
            "duplicate",
            100 * 50 / 101 / 3,
            {"false positives": 100 * 50 / 101 / 3},
        ),
        (
            [(CAT, BOX)],
            [result(CAT, FAR, 0.9), result(CAT, BOX, 0.8)],
            "background",
            50,
            {"false positives": 50},
        ),
        (
            [(CAT, BOX), (CAT, FAR)],
            [result(CAT, BOX, 0.9)],
            "missed",
            100 - AT_50,
            {"false negatives": 100 - AT_50},
        ),
    ],
)
def test_each_kind_of_error_alone(objects, detections, kind, gain, others):
    found = measure(load(content(objects), *detections))
    expected = dict.fromkeys(found.gains, 0.0) | {kind: gain} | others
    assert found.gains == pytest.approx(expected)
    assert found.counts[kind] == 1


def test_of_two_errors_on_one_object_the_better_is_mended_and_the_other_taken_away():
    wrong_class, loose = result(DOG, BOX, 0.9), result(CAT, [0, 0, 10, 4], 0.8)
    found = measure(load(content([(CAT, BOX)]), wrong_class, loose))
    assert found.counts["classification"] == found.counts["localization"] == 1
    assert found.counts["missed"] == 0  # mending the errors would find it
    assert found.gains["localization"] == 0
    # The mended detection is first, the loose one a false positive after it
    assert found.gains["classification"] == pytest.approx(100)


def test_detections_of_a_crowd_are_no_errors():
    found = measure(load(content([(CAT, FAR), (CAT, BOX)], crowds=1), result(CAT, BOX, 0.9)))
    assert found.counts == dict.fromkeys(found.counts, 0) | {"missed": 1, "false negatives": 1}


@pytest.mark.parametrize("seed", range(4))
def test_errors_are_those_of_hotcoco_which_are_those_of_the_authors(seed):
    hotcoco = pytest.importorskip("hotcoco")
    whole, found = random_case(seed, simple=True)
    truth = hotcoco.COCO(whole)
    with redirect_stdout(io.StringIO()):
        evaluation = hotcoco.COCOeval(truth, truth.load_res(found), "bbox")
        evaluation.run()
    theirs = evaluation.tide_errors()
    ours = measure(load(whole, *found))
    names = {"classification": "Cls", "localization": "Loc", "both": "Both", "duplicate": "Dupe"}
    names |= {"background": "Bkg", "missed": "Miss"}
    assert ours.ap == pytest.approx(100 * theirs["ap_base"])
    for kind, name in names.items():
        assert ours.counts[kind] == theirs["counts"][name]
        assert ours.gains[kind] == pytest.approx(100 * theirs["delta_ap"][name])


def test_images_are_grouped_by_quantiles_of_their_objects_and_ties_stay_together():
    cat = (CAT, BOX)
    images = [[], *([[cat]] * 3), [cat, cat], [cat] * 3, [cat] * 3, [cat] * 8]
    groups = by_number_of_objects(Truth(content(*images), "bbox"))
    assert [*groups] == [
        "0 to 1 (4 images)",
        "2 (1 image)",
        "3 (2 images)",
        "8 (1 image)",
    ]
    assert sum(groups.values()).tolist() == [1] * len(images)


def test_ap_by_number_of_objects_is_that_of_the_images_alone():
    whole = content([(CAT, BOX)], [(CAT, BOX), (CAT, FAR)])
    found = [result(CAT, BOX, 0.9), result(CAT, FAR, 0.95, 1), result(CAT, FARTHER, 0.8, 1)]
    section = curves(detections_of(whole, {"it": found}))
    by_size, by_number = section.tables
    assert [row[:2] for row in by_number.rows] == [["1 (1 image)", 1], ["2 (1 image)", 2]]
    assert [row[2] for row in by_number.rows] == pytest.approx([100, AT_50])
    assert [row[1] for row in by_size.rows] == [3, 3, 0, 0]
    assert by_size.rows[2][2] is None  # no medium object
    # Two of three objects, then a false positive: precision 1 up to recall 2/3
    precision = section.data["precision"]["it"]["IoU 0.5"]
    assert precision.tolist() == [1.0] * 67 + [0.0] * 34


def test_confusion_counts_each_object_and_each_detection_once():
    whole = content([(CAT, BOX), (DOG, BOX), (CAT, FAR), (DOG, FARTHER)])
    found = load(
        whole,
        result(DOG, BOX, 0.9),  # right, though the cat is as near
        result(DOG, FAR, 0.8),  # a cat taken for a dog
        result(CAT, FAR, 0.2),  # below the threshold: cannot find the cat
        result(CAT, [30, 0, 10, 10], 0.7),  # nothing there
    )
    assert confusion_matrix(found, 0.3).tolist() == [
        [0, 1, 1],  # cats: one as a dog, one missed
        [0, 1, 1],  # dogs: one right, one missed
        [1, 0, 0],
    ]


def test_confusion_leaves_out_crowds():
    found = load(content([(CAT, BOX)], crowds=1), result(CAT, BOX, 0.9))
    assert not confusion_matrix(found, 0.3).any()


def test_worst_confusions_come_first_and_have_counts_of_each_detector():
    whole = content([(CAT, BOX), (CAT, FAR), (DOG, FARTHER)])
    swap = [result(DOG, BOX, 0.9), result(DOG, FAR, 0.9), result(CAT, FARTHER, 0.9)]
    section = confusion(detections_of(whole, {"bad": swap, "none": []}))
    between, with_background = section.tables
    assert between.rows == [["cat", "dog", 2, 2, 0], ["dog", "cat", 1, 1, 0]]
    assert with_background.rows == [["cat", "background", 2, 0, 2], ["dog", "background", 1, 0, 1]]


def test_calibration_error_is_the_mean_distance_of_score_and_share_of_right_detections():
    whole = content([(CAT, BOX), (CAT, FAR)])
    found = load(
        whole,
        result(CAT, BOX, 0.95),  # right
        result(CAT, FARTHER, 0.93),  # wrong: the bin has 50% at 0.94
        result(CAT, FAR, 0.25),  # right: 100% at 0.25
        result(CAT, [30, 0, 10, 10], 1.0),  # wrong, and in the last bin
    )
    whole_range = reliability(found)
    assert whole_range.counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 3]
    assert whole_range.error == pytest.approx(100 * (0.75 + 3 * (0.96 - 1 / 3)) / 4)
    assert whole_range.overconfidence == pytest.approx(100 * (-0.75 + 3 * (0.96 - 1 / 3)) / 4)
    assert reliability(found, 0.3).error == pytest.approx(100 * (0.96 - 1 / 3))


def test_scores_that_are_no_probabilities_are_named_and_not_rated():
    whole = content([(CAT, BOX)])
    logits = [result(CAT, BOX, 7.5)]
    section = calibration(detections_of(whole, {"logits": logits, "it": []}))
    assert [row[0] for row in section.tables[0].rows] == ["it"]
    assert "logits has scores outside of 0 to 1" in section.tables[0].note


def test_f_score_of_an_image_and_its_mistakes():
    whole = content([(CAT, BOX), (CAT, FAR)], [], [], [(CAT, BOX)])
    found = load(whole, result(CAT, BOX, 0.9), result(CAT, FARTHER, 0.8), result(CAT, BOX, 0.9, 1))
    scores, mistakes = f_scores(found, found.match(0.5, score_threshold=0.3))
    assert scores.tolist() == [0.5, 0, 1, 0]
    assert mistakes.tolist() == [2, 1, 0, 1]


def test_differing_images_are_taken_from_both_sides_and_ties_go_by_mistakes():
    scores = np.array([0.9, 0.8, 0.7, -0.1, 0, -0.1])
    mistakes = np.array([1, 1, 1, -1, 0, -5])
    assert most_different(scores, mistakes, 4) == [0, 1, 5, 3]
    assert most_different(scores, mistakes, 5) == [0, 1, 2, 5, 3]
    assert most_different(scores[:3], mistakes[:3], 2) == [0, 1]
    assert most_different(scores[3:], mistakes[3:], 3) == [2, 0]


@pytest.mark.parametrize("iou_type", list(SHAPES))
def test_differing_images_are_drawn_and_those_that_cannot_be_read_are_named(tmp_path, iou_type):
    whole, found = content([(CAT, BOX)], [(DOG, FAR)], [(CAT, BOX)]), [result(CAT, BOX, 0.9)]
    found.append(result(DOG, FAR, 0.9, 1))
    whole, found = SHAPES[iou_type](whole, found)
    Image.new("RGB", (100, 100), "white").save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    detectors = detections_of(whole, {"first": [], "second": found}, iou_type)
    section = pictures(detectors, tmp_path)
    assert [row[0] for row in section.tables[0].rows] == ["0.png", "1.png"]
    assert section.tables[0].rows[0][1:] == [0, 100, 100]
    assert section.data == {"images": [0, 10], "not_drawn": ["1.png"]}
    assert "1.png" in section.tables[0].note
    (figure,) = section.figures
    picture = np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB")).astype(int)
    truth, first, second = (picture[20:, i * 336 : i * 336 + 328] for i in range(3))
    green = [(panel[..., 1] - panel[..., 0] > 60).any() for panel in (truth, first, second)]
    orange = [(panel[..., 0] - panel[..., 2] > 60).any() for panel in (truth, first, second)]
    assert green == [False, False, True]
    assert orange == [True, False, False]  # the first detector missed it


def test_analyses_of_keypoints_say_oks_and_have_no_small_objects():
    whole, found = with_keypoints(*random_case(1))
    detectors = detections_of(whole, {"it": found}, "keypoints")
    sections = [analysis(detectors) for analysis in (errors, curves, confusion, calibration)]
    said = " ".join(s.text + " ".join(table.note for table in s.tables) for s in sections)
    assert "OKS" in said and "IoU" not in said
    by_size, by_number = sections[1].tables
    assert [row[0] for row in by_size.rows] == ["all", "medium (32² to 96²)", "large (above 96²)"]
    labelled = sum(a["num_keypoints"] > 0 and not a["iscrowd"] for a in whole["annotations"])
    assert by_size.rows[0][1] == sum(row[1] for row in by_number.rows) == labelled
    found_or_not = sections[2].data["matrices"]["it"][:-1].sum()
    assert found_or_not == labelled
    right = sections[3].data["it"]
    assert right["counts"].sum() > 0 and np.nanmax(right["right"]) > 0


def test_every_analysis_takes_no_detections_and_names_that_look_like_formulas():
    whole = content([(CAT, BOX)], [])
    whole["categories"][0]["name"] = "$cat_{"
    detectors = detections_of(whole, {"$x_{": [], "b$": []})
    for analysis in (errors, curves, confusion, calibration):
        assert all(figure.png.startswith(b"\x89PNG") for figure in analysis(detectors).figures)
    assert pictures(detectors, None).tables[0].rows == []


def test_without_any_object_to_find_nothing_is_measured():
    found = load(content([(CAT, BOX)], crowds=1))
    assert found.ap() == [None]
    assert [*measure(found).gains.values()] == [None] * 8
    assert by_number_of_objects(found.truth) == {}


def test_bad_kind_of_overlap_is_named():
    with pytest.raises(ArgumentError, match="^iou_type must"):
        Truth(content([(CAT, BOX)]), "pixels")
