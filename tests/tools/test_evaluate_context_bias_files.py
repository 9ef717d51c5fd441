"""tools/evaluate_context_bias.py: the files that it writes, and errors that name what is wrong."""

from __future__ import annotations

import io
import json
import os

import evaluate_context_bias
import pytest
from context_bias_cases import BOX, CUP, FILES, LAMP, TABLE, error_of, rectangle, table
from PIL import Image

from plugin_core.evaluation import context_bias, context_bias_report

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
