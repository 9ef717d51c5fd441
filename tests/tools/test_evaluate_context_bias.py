"""tools/evaluate_context_bias.py: its numbers against hand-made ones and COCO's, files, errors."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import evaluate_context_bias
import numpy as np
import pytest
from context_bias_cases import (
    BOX,
    CUP,
    FILES,
    LAMP,
    TABLE,
    Inputs,
    Run,
    detection,
    error_of,
    ground_truth,
    table,
)
from make_synthetic_coco import make_dataset
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plugin_core.evaluation import context_bias, context_bias_report
from plugin_core.evaluation.companions import classes_by_image, frequent_companions


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


# The numbers


def test_numbers_of_a_case_worked_out_by_hand(inputs, run):
    rows = run(*inputs.options("--pairs"))
    assert list(rows) == ["cup", "mean", "classes in the mean"]
    # In company both cups are found: 100. Alone the one of two that is found, without an error,
    # gives precision 1 at recalls 0, 0.01 … 0.50, and 0 above: 51 of COCO's 101. Of all four, three
    # are found before the first error: 76 of 101. A cup is seen with 0.6 on one of two mere tables.
    assert rows["cup"] == {
        "class": "cup",
        "companion": "table",
        "objects in company": "2",  # the crowd is none
        "objects alone": "2",
        "AP": "75.2",
        "AP in company": "100.0",
        "AP alone": "50.5",
        "gap": "+49.5",
        "gap at equal counts": "-",  # two objects in company, one alone
        "FP rate companion only": "50.0",
        "FP rate neither": "0.0",
    }


def test_gap_at_equal_counts_compares_images_with_as_many_objects(inputs, run):
    # 9, 10: the cup with a lamp, so two objects as on the tables; one of the two is found.
    # 11: a cup and two tables; no cup alone has two neighbours, so it does not count.
    more = ground_truth([[CUP, LAMP], [LAMP, CUP], [CUP, TABLE, TABLE]], {CUP: "cup"})
    for record in more["images"]:
        inputs.truth["images"].append({**record, "id": record["id"] + 8})
    for record in more["annotations"]:
        moved = {"id": record["id"] + 200, "image_id": record["image_id"] + 8}
        inputs.truth["annotations"].append({**record, **moved})
    inputs.results.append(detection(9, CUP, 0.7))
    cup = run(*inputs.options("--pairs"))["cup"]
    # With two objects: 100 in company, 50.5 alone. A crowd is not counted.
    assert cup["gap at equal counts"] == "+49.5"
    # The one with a cup and a lamp is missed as well as one of those alone: 2 of 4 and 2 of 3
    assert (cup["AP in company"], cup["AP alone"]) == ("66.3", "50.5")


@pytest.mark.parametrize(
    ("threshold", "rate"), [("0.4", "100.0"), ("0.6", "50.0"), ("0.61", "0.0")]
)
def test_false_positive_has_at_least_the_threshold(inputs, run, threshold, rate):
    rows = run(*inputs.options("--pairs", "--score-threshold", threshold))
    assert rows["cup"]["FP rate companion only"] == rate
    assert rows["cup"]["AP"] == "75.2"  # which takes all detections


def test_false_positives_with_neither_are_counted_apart(inputs, run):
    inputs.results += [detection(8, CUP, 0.5), detection(8, CUP, 0.5)]  # one of two images
    rows = run(*inputs.options("--pairs"))
    assert rows["cup"]["FP rate companion only"] == "50.0"
    assert rows["cup"]["FP rate neither"] == "50.0"


def test_detection_on_a_crowd_is_no_false_positive(inputs, run):
    table_only = next(a for a in inputs.truth["annotations"] if a["image_id"] == 5)
    inputs.truth["annotations"].append(table_only | {"id": 100, "category_id": CUP, "iscrowd": 1})
    assert run(*inputs.options("--pairs"))["cup"]["FP rate companion only"] == "0.0"  # of image 6


def test_mean_is_over_the_classes_that_have_the_number(inputs, run):
    # The lamp is never with the cup: no AP in company, no gap. It is missed: 0 alone.
    inputs.pairs["companions"].append({"category_id": LAMP, "companion_id": CUP})
    rows = run(*inputs.options("--pairs"))
    assert rows["lamp"]["AP in company"] == rows["lamp"]["gap"] == "-"
    assert rows["lamp"]["AP alone"] == "0.0"
    mean, number = rows["mean"], rows["classes in the mean"]
    assert (mean["AP in company"], number["AP in company"]) == ("100.0", "1")
    assert (mean["AP alone"], number["AP alone"]) == ("25.2", "2")
    assert (mean["gap"], number["gap"]) == ("+49.5", "1")


def test_gap_that_rounds_to_0_has_no_minus():
    assert context_bias_report.cell("gap", -3e-14) == "+0.0"
    assert context_bias_report.cell("gap", -0.06) == "-0.1"


def test_no_detection_at_all_is_an_ap_of_0_and_is_said(inputs, capsys):
    inputs.results = []
    evaluate_context_bias.main(inputs.options("--pairs"))
    text = capsys.readouterr().out
    cup = table(text)["cup"]
    assert cup["AP"] == cup["AP in company"] == cup["AP alone"] == cup["gap"].lstrip("+") == "0.0"
    assert cup["FP rate companion only"] == "0.0"
    assert "There is no detection in" in text


def random_case(rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and detections with crowds, equal scores, empty images and crowded ones."""
    names = {2: "a", 3: "b", 5: "c", 8: "d", 9: "never there"}
    images = [list(rng.choice([2, 3, 5, 8], size=rng.integers(0, 6))) for _ in range(20)]
    images[4] = []
    truth = ground_truth([[int(c) for c in classes] for classes in images], names)
    results = []
    for annotation in truth["annotations"]:
        x, y, w, h = (float(v) for v in rng.integers((0, 0, 8, 8), (24, 24, 40, 40)))
        annotation |= {"bbox": [x, y, w, h], "area": w * h}
        annotation["iscrowd"] = int(rng.random() < 0.15)
        annotation["segmentation"] = rectangle(annotation["bbox"], text=False)
        seen = annotation["category_id"] if rng.random() < 0.8 else 9
        for _ in range(rng.integers(0, 3)):
            box = [x + float(rng.integers(-2, 3)), y + 1, w, h]
            results.append(detection(annotation["image_id"], seen, 0) | {"bbox": box})
    for image_id, number in ((5, 3), (7, 130)):  # the empty one; more than COCO takes
        for _ in range(number):
            box = [float(v) for v in rng.integers((0, 0, 8, 8), (24, 24, 40, 40))]
            results.append(detection(image_id, 2, 0) | {"bbox": box})
    for result in results:
        result["score"] = float(rng.choice([0.2, 0.4, 0.6, 0.8]))
        result["segmentation"] = rectangle(result["bbox"])
    return truth, results


def rectangle(box: list[float], text: bool = True) -> dict[str, Any]:
    """The mask of a box in an image of 64x64 pixels, compressed."""
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    rle = coco_mask.merge(coco_mask.frPyObjects(corners, 64, 64))
    return rle | {"counts": rle["counts"].decode()} if text else rle


def accumulated(evaluation: COCOeval) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_ap_is_cocos_and_the_four_groups_merge_to_it(iou_type, seed):
    content, results = random_case(np.random.default_rng(seed))
    truth = context_bias.load_ground_truth(content)
    detections = context_bias.load_detections(truth, results)
    companions = {2: 3, 3: 5, 5: 8, 8: 2, 9: 2}
    classes = context_bias.measure(truth, detections, companions, iou_type, 0.5)

    whole = COCOeval(truth, detections, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        whole.evaluate()
        whole.accumulate()
        whole.summarize()
    mean, number = context_bias.means(classes)["ap"]
    assert mean == pytest.approx(100 * whole.stats[0], abs=1e-9) and number == 4
    assert 5 < mean < 95  # or else the case shows nothing
    images = classes_by_image(content)
    for index, c in enumerate(classes):
        precision = whole.eval["precision"][:, :, index, 0, -1]
        if c.name == "never there":
            assert c.ap is c.ap_alone is c.ap_in_company is None and (precision == -1).all()
            continue
        assert c.ap == pytest.approx(100 * precision.mean(), abs=1e-9)
        parts = {}
        for image_ids in context_bias.split_images(images, c.category_id, c.companion_id):
            part = context_bias.evaluate(truth, detections, iou_type, c.category_id, image_ids)
            parts |= dict(zip(part.params.imgIds, part.evalImgs, strict=True))
        merged = context_bias.evaluate(
            truth, detections, iou_type, c.category_id, list(images)
        )  # for its parameters
        assert sorted(parts) == merged.params.imgIds == sorted(images)
        merged.evalImgs = [parts[image_id] for image_id in merged.params.imgIds]
        assert context_bias.average_precision(accumulated(merged)) == pytest.approx(c.ap, abs=1e-9)


def test_ap_of_a_side_is_that_of_a_file_with_its_images_only():
    content, results = random_case(np.random.default_rng(3))
    truth = context_bias.load_ground_truth(content)
    detections = context_bias.load_detections(truth, results)
    (c,) = context_bias.measure(truth, detections, {2: 3}, "bbox", 0.5)
    groups = context_bias.split_images(classes_by_image(content), 2, 3)
    for image_ids, ap in ((groups.in_company, c.ap_in_company), (groups.alone, c.ap_alone)):
        side = COCO()
        side.dataset = content | {
            "images": [image for image in content["images"] if image["id"] in image_ids],
            "annotations": [a for a in content["annotations"] if a["image_id"] in image_ids],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            side.createIndex()
            own = side.loadRes([dict(r) for r in results if r["image_id"] in image_ids])
            evaluation = COCOeval(side, own, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        expected = evaluation.eval["precision"][:, :, 0, 0, -1]  # of category 2
        assert ap == pytest.approx(100 * expected.mean(), abs=1e-9)


def test_images_without_objects_are_split_too():
    images = {4: {1, 2}, 3: {1}, 2: {2}, 1: set(), 5: {3}, 6: {1, 2, 3}}
    groups = context_bias.split_images(images, 1, 2)
    assert groups == ([4, 6], [3], [2], [1, 5])


# The companions


def test_companion_is_in_most_images_of_the_class_whatever_the_number_of_objects():
    # 2 is with 1 in two images, 3 with 1 in one, 4 in none
    assert frequent_companions([{1, 2}, {1, 2}, {1, 3}, {4}, {4}, set()]) == {
        1: 2,
        2: 1,
        3: 1,
    }


def test_companion_of_two_that_are_as_frequent_is_the_one_of_the_lower_id():
    companions = frequent_companions([{5, 9}, {5, 3}, {5, 7}])
    assert companions[5] == 3


def test_without_pairs_companions_are_of_the_ground_truth_and_that_is_said(inputs, capsys):
    evaluate_context_bias.main(inputs.options())
    text = capsys.readouterr().out
    rows = table(text)
    assert [rows[name]["companion"] for name in ("cup", "table", "lamp")] == [
        "table",
        "cup",
        "none",
    ]
    # The lamp shares no image with another class
    assert set(list(rows["lamp"].values())[2:]) == {"-"}
    assert rows["classes in the mean"]["AP"] == "2"
    (note,) = [line for line in text.splitlines() if line.startswith("Companions: ")]
    assert "truth.json" in note and "no --pairs or --train-annotations are given" in note


def test_companions_of_training_annotations_are_told_by_name(inputs, capsys):
    # There the ids are others, and the cup is with the lamp
    evaluate_context_bias.main(inputs.options("--train-annotations"))
    text = capsys.readouterr().out
    rows = table(text)
    assert [rows[name]["companion"] for name in ("cup", "table", "lamp")] == [
        "lamp",
        "none",
        "cup",
    ]
    assert rows["cup"]["objects alone"] == "4"
    (note,) = [line for line in text.splitlines() if line.startswith("Companions: ")]
    assert "train.json" in note and "truth.json" not in note


# The files


def test_files_hold_the_table_the_numbers_and_a_figure(inputs, capsys):
    out = inputs.folder / "new" / "out"
    inputs.pairs["companions"].append({"category_id": LAMP, "companion_id": CUP})
    evaluate_context_bias.main(inputs.options("--pairs", "--out", str(out)))
    printed = capsys.readouterr().out
    assert sorted(os.listdir(out)) == FILES
    assert table((out / "context_bias.md").read_text()) == table(printed)
    content = json.loads((out / "context_bias.json").read_text())
    assert content["settings"] == {
        "annotations": str(inputs.folder / "truth.json"),
        "results": str(inputs.folder / "results.json"),
        "pairs": str(inputs.folder / "pairs.json"),
        "train_annotations": None,
        "protocol": "detection",
        "iou_type": "bbox",
        "score_threshold": 0.5,
    }
    cup, lamp = content["classes"]
    assert (cup["name"], cup["companion_id"], cup["companion"]) == ("cup", TABLE, "table")
    groups = ("in_company", "alone", "companion_only", "neither")
    assert [cup[f"images_{group}"] for group in groups] == [2, 2, 2, 2]
    assert cup["gap"] == pytest.approx(100 - 100 * 51 / 101)
    assert lamp["ap_in_company"] is lamp["gap"] is None
    assert content["mean"]["ap_alone"] == {
        "value": pytest.approx(50 * 51 / 101),
        "classes": 2,
    }
    with Image.open(out / "context_bias.png") as figure:
        assert figure.size[0] == 1100 and figure.convert("L").getextrema() != (255, 255)


def test_figure_takes_names_that_look_like_formulas():
    classes = [context_bias.ClassBias(1, "$10_$20", ap_alone=1.0)]
    assert context_bias_report.draw(classes, "bbox", 0.5).startswith(b"\x89PNG")


def test_figure_grows_with_the_number_of_classes():
    few, many = (
        [context_bias.ClassBias(i, f"class {i}", ap_alone=float(i)) for i in range(number)]
        for number in (2, 7)
    )
    heights = []
    for classes in (few, many):
        picture = context_bias_report.draw(classes, "segm", 0.5)
        with Image.open(io.BytesIO(picture)) as figure:
            heights.append(figure.size[1])
    assert heights[1] - heights[0] == 5 * 30  # pixels a class


def test_file_that_cannot_be_finished_leaves_the_old_one(inputs, monkeypatch):
    for name in FILES:
        (inputs.folder / name).write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    options = inputs.options("--pairs", "--out", str(inputs.folder))
    monkeypatch.setattr(os, "replace", full_disk)
    assert "no space left" in error_of(*options)
    assert [(inputs.folder / name).read_text() for name in FILES] == ["old"] * 3
    expected = sorted([*FILES, "truth.json", "results.json", "pairs.json"])
    assert sorted(os.listdir(inputs.folder)) == expected


# The frameworks


def test_results_of_detectron2_are_read(inputs, run):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    import torch
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.structures import Boxes, Instances

    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, 10:30, 10:30] = True
    inputs.results = []
    for image_id in (1, 2, 3):
        instances = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[10.0, 10, 30, 30]])))
        instances.scores, instances.pred_classes = torch.tensor([0.75]), torch.tensor([CUP])
        instances.pred_masks = masks
        inputs.results += instances_to_coco_json(instances, image_id)
    check_boxes_and_masks(inputs, run)


def test_results_of_mmdetection_are_read(inputs, run):
    pytest.importorskip("mmdet", reason="MMDetection is not installed")
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(metric=["bbox", "segm"])
    metric.cat_ids = [CUP, TABLE, LAMP]
    predictions = [
        {
            "img_id": image_id,
            "bboxes": np.array([[10.0, 10, 30, 30]]),
            "scores": np.array([0.75]),
            "labels": np.array([0]),
            "masks": [rectangle(BOX, text=False)],
        }
        for image_id in (1, 2, 3)
    ]
    files = metric.results2json(predictions, str(inputs.folder / "mm"))
    inputs.results = json.loads(Path(files["bbox"]).read_text())
    assert run(*inputs.options("--pairs"))["cup"]["AP in company"] == "100.0"
    inputs.results = json.loads(Path(files["segm"]).read_text())
    check_boxes_and_masks(inputs, run)


def check_boxes_and_masks(inputs: Inputs, run: Any) -> None:
    for annotation in inputs.truth["annotations"]:
        annotation["segmentation"] = rectangle(annotation["bbox"])
    for iou_type in ("bbox", "segm"):
        rows = run(*inputs.options("--pairs", "--iou-type", iou_type))
        assert rows["cup"]["AP in company"] == "100.0"
        assert rows["cup"]["AP alone"] == "50.5"
    # Masks are all that counts for segm: boxes may be missing, and right ones do not help.
    del inputs.results[1]["bbox"]
    for result in inputs.results:
        result["segmentation"] = rectangle([40, 40, 10, 10])
    assert run(*inputs.options("--pairs", "--iou-type", "segm"))["cup"]["AP"] == "0.0"


def test_perfect_results_of_a_drawn_dataset_have_no_bias(tmp_path, capsys):
    data = tmp_path / "coco"
    options = {"size": 64, "classes": 4, "context_bias": 0.6, "progress": False}
    make_dataset(data, train=0, val=16, **options)
    annotations = data / "annotations"
    truth = json.loads((annotations / "instances_val2017.json").read_text())
    keys = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keys} | {"score": 1.0} for a in truth["annotations"]]
    (tmp_path / "results.json").write_text(json.dumps(results))
    argv = ["--annotations", str(annotations / "instances_val2017.json")]
    argv += ["--results", str(tmp_path / "results.json")]
    argv += ["--pairs", str(annotations / "context_bias.json")]
    evaluate_context_bias.main(argv)
    printed = capsys.readouterr().out
    rows = table(printed)
    partners = {name: rows[name]["companion"] for name in ("person", "disk", "square", "triangle")}
    assert partners == {
        "person": "disk",
        "disk": "person",
        "square": "triangle",
        "triangle": "square",
    }
    numbers = ["AP", "AP in company", "AP alone", "gap"]
    for name in (*partners, "mean"):
        assert [rows[name][n] for n in numbers] == ["100.0", "100.0", "100.0", "+0.0"]
        assert rows[name]["FP rate companion only"] == rows[name]["FP rate neither"] == "0.0"
    assert "Evaluate annotation type" not in printed  # pycocotools' own prints


def test_pairs_of_a_detection_report_leave_out_classes_without_companion(inputs, run):
    out = inputs.folder / "out"
    run(*inputs.options("--out", str(out)))  # the lamp has none
    rows = run(*inputs.options(), "--pairs", str(out / "context_bias.json"))
    assert list(rows)[:-2] == ["cup", "table"]


# The errors


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--annotations", None, "No such file"),
        ("--annotations", "", "is empty"),
        ("--annotations", '{"images": [', "not JSON: "),
        ("--annotations", '{"images": [}', "not JSON"),
        ("--annotations", '{"images": [], "annotations": []}', "no list of images"),
        ("--annotations", '{"images": [{"id": 1}], "annotations": [{}]}', "no list of categories"),
        ("--train-annotations", None, "No such file"),
        ("--train-annotations", "{}", "no list of images"),
        ("--results", None, "No such file"),
        ("--results", "[{", "not JSON"),
        ("--results", "{}", "expected a list of detections, not dict"),
        ("--results", "[3]", "detection 0: expected an object, not 3"),
        ("--pairs", None, "No such file"),
        ("--pairs", "1,2", "not JSON"),
        ("--pairs", "[[1, 2]]", "no list of companions"),
        ("--pairs", '{"companions": []}', "the list of companions is empty"),
        ("--pairs", '{"companions": [[1, 2]]}', "pair 0: expected an object, not [1, 2]"),
        ("--pairs", '{"companions": [{"category_id": 1}]}', "pair 0 has no companion_id"),
    ],
)
def test_file_of_another_kind_is_an_error_that_names_it(inputs, option, text, expected):
    path = inputs.folder / "bad.json"
    if text is not None:
        path.write_text(text)
    # The last of two equal options counts
    message = error_of(*inputs.options(), option, str(path))
    assert option in message and "bad.json" in message and expected in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("bbox", None, "--iou-type bbox: detection 1 has no bbox"),
        ("score", None, "detection 1 has no score"),
        ("category_id", None, "detection 1 has no category_id"),
        ("bbox", [1, 2, 3], "detection 1: bbox cannot be [1, 2, 3]"),
        ("bbox", [0, 0, 1, float("inf")], "detection 1: bbox cannot be"),
        ("score", float("nan"), "detection 1: score cannot be nan"),
        ("image_id", 500, "1 of 5 are of images that --annotations"),
        ("image_id", 500, "500 (it lists 1 to 8); are both of the same dataset and split?"),
        ("category_id", 90, "of category_id 90 (it lists 1 to 7)"),
        ("image_id", [1], "detection 1: image_id cannot be [1]"),
    ],
)
def test_detection_that_cannot_be_used_is_an_error(inputs, key, value, expected):
    inputs.results[1][key] = value
    if value is None:
        del inputs.results[1][key]
    message = error_of(*inputs.options("--pairs"))
    assert "results.json" in message and expected in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("iscrowd", None, "annotation 1 has no iscrowd"),
        ("area", None, "annotation 1 has no area"),
        ("bbox", [], "annotation 1: bbox cannot be []"),
        ("id", 1, "annotations: id 1 occurs twice"),
        ("image_id", 500, "1 of 10 are of images that the file does not list"),
        ("category_id", 90, "1 of 10 are of categories that the file does not list"),
    ],
)
def test_annotation_that_cannot_be_used_is_an_error(inputs, key, value, expected):
    inputs.truth["annotations"][1][key] = value
    if value is None:
        del inputs.truth["annotations"][1][key]
    message = error_of(*inputs.options("--pairs"))
    assert "--annotations" in message and "truth.json" in message and expected in message


def test_masks_that_are_not_there_are_an_error(inputs):
    segm = ("--pairs", "--iou-type", "segm")
    assert "--iou-type segm: annotation 0 has no segmentation" in error_of(*inputs.options(*segm))
    for annotation in inputs.truth["annotations"]:
        annotation["segmentation"] = rectangle(BOX)
    assert "--iou-type segm: detection 0 has no segmentation" in error_of(*inputs.options(*segm))
    inputs.results[0]["segmentation"] = [[1, 1, 9, 1, 9, 9]]  # which pycocotools does not read
    assert "detection 0: segmentation cannot be [[1," in error_of(*inputs.options(*segm))
    inputs.truth["annotations"][0]["segmentation"] = []
    assert "annotation 0: segmentation cannot be []" in error_of(*inputs.options(*segm))


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(CUP, 3)], "unknown companion_id 3; the ground truth lists 1, 2, 7"),
        ([(0, CUP)], "unknown category_id 0; the ground truth lists 1, 2, 7"),
        ([(CUP, CUP)], "category_id 1 is its own companion"),
        ([(CUP, TABLE), (TABLE, CUP), (CUP, LAMP)], "category_id 1 occurs twice"),
    ],
)
def test_pairs_that_make_no_sense_are_an_error(inputs, pairs, expected):
    inputs.pairs["companions"] = [{"category_id": c, "companion_id": d} for c, d in pairs]
    message = error_of(*inputs.options("--pairs"))
    assert "--pairs" in message and "pairs.json" in message and expected in message


def test_training_annotations_of_other_categories_are_an_error(inputs):
    inputs.train["categories"][2]["name"] = "desk"
    message = error_of(*inputs.options("--train-annotations"))
    assert "2 are in one of the two only, such as 'desk' in --train-annotations" in message


def test_training_annotations_with_a_name_that_is_not_unique_are_an_error(inputs):
    inputs.train["categories"][2]["name"] = "cup"
    message = error_of(*inputs.options("--train-annotations"))
    assert "train.json: categories: name 'cup' occurs twice" in message


def test_pairs_and_training_annotations_together_are_an_error(inputs, capsys):
    with pytest.raises(SystemExit):
        evaluate_context_bias.main(inputs.options("--pairs", "--train-annotations"))
    assert "not allowed with argument --pairs" in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["-0.1", "1.5", "nan"])
def test_threshold_that_is_no_score_is_an_error(inputs, threshold):
    message = error_of(*inputs.options("--pairs", f"--score-threshold={threshold}"))
    assert f"--score-threshold {threshold}: expected 0 to 1" in message


@pytest.mark.parametrize("out", ["results.json", "results.json/below"])
def test_folder_that_is_a_file_is_an_error_before_evaluating(inputs, monkeypatch, out):
    monkeypatch.delattr(evaluate_context_bias, "measure")
    message = error_of(*inputs.options("--pairs", "--out", str(inputs.folder / out)))
    assert "--out" in message and "is a file, not a folder" in message


def test_error_makes_no_folder(inputs):
    inputs.results[0]["image_id"] = 500
    error_of(*inputs.options("--pairs", "--out", str(inputs.folder / "out")))
    assert not (inputs.folder / "out").exists()
