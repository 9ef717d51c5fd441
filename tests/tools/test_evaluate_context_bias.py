"""tools/evaluate_context_bias.py: its numbers against hand-made ones and COCO's, and companions."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import evaluate_context_bias
import numpy as np
import pytest
from context_bias_cases import (
    BOX,
    CUP,
    LAMP,
    TABLE,
    Inputs,
    detection,
    ground_truth,
    rectangle,
    table,
)
from make_synthetic_coco import make_dataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from plugin_core.evaluation import context_bias, context_bias_report
from plugin_core.evaluation.companions import classes_by_image, frequent_companions

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
