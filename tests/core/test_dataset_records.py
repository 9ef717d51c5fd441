"""The check of datasets in COCO's format: records, boxes, masks and keypoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets_in_coco_format import (
    Content,
    check,
    content,
    errors,
    found,
    make_images,
    with_annotation,
    with_image,
    write,
)
from pycocotools import mask as rle

from plugin_core.datasets.check import check_dataset
from plugin_core.datasets.findings import ERROR, NOTE, WARNING
from plugin_core.datasets.masks import run_lengths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path)


# ------------------------------------------------------------------------------------------ records

RLE = {"size": [30, 40], "counts": [600, 100, 500]}


@pytest.mark.parametrize(
    ("whole", "kinds"),
    [
        ({"images": [], "annotations": []}, {"no-list": ERROR, "no-images": ERROR}),
        (content(images=[1, 2]), {"no-object": ERROR, "no-images": ERROR}),
        (with_image(id=2), {"image-id-twice": ERROR, "unknown-image": WARNING}),
        (with_image(id=None), {"image-id": ERROR, "unknown-image": WARNING}),
        (with_image(file_name=7), {"file-name": ERROR}),
        (with_image(file_name=[]), {"file-name": ERROR}),
        (with_image(file_name="2.png"), {"file-twice": WARNING}),
        (with_image(file_name="./2.png"), {"file-twice": WARNING}),
        (with_image(file_name=None, coco_url="http://a/1.png"), {"lvis": ERROR}),
        (with_image(width="40"), {"number-text": NOTE}),
        (with_annotation(image_id="1.png"), {"number-text": NOTE}),
        (with_image(width=None), {"no-size": NOTE}),
        (with_image(height=31), {"image-size": ERROR}),
        (with_annotation(id=None), {"annotation-id": WARNING}),
        (with_annotation(id=2), {"annotation-id-twice": WARNING}),
        (with_annotation(id=0), {"annotation-id-zero": NOTE}),
        (with_annotation(id="a"), {"annotation-id-text": NOTE}),
        (with_annotation(image_id="1"), {"number-text": NOTE}),
        (with_annotation(category_id="1"), {"number-text": NOTE}),
        (with_image(id="a"), {"image-id-kinds": ERROR, "unknown-image": WARNING}),
        (with_annotation(iscrowd="1.0"), {"number-text": NOTE}),
        (with_annotation(image_id=[1]), {"image-id-of-annotation": ERROR}),
        (with_annotation(image_id=9), {"unknown-image": WARNING}),
        (with_annotation(category_id=None), {"category-id-of-annotation": ERROR}),
        (with_annotation(category_id=9), {"unknown-category": ERROR}),
        (with_annotation(iscrowd=None), {"no-iscrowd": NOTE}),
        (with_annotation(iscrowd=False), {"number-text": NOTE}),
        (with_annotation(id=1.0), {"annotation-id-text": NOTE}),
        (with_annotation(iscrowd=3), {"iscrowd": ERROR}),
        (with_annotation(ignore=1), {"ignore": ERROR}),
        (with_annotation(area=None), {"no-area": NOTE}),
        (with_annotation(area="80"), {"number-text": NOTE}),
        (with_annotation(area=[]), {"area": ERROR}),
        (with_annotation(area=0), {"area-zero": WARNING}),
        (with_annotation(area=500), {"area-large": WARNING, "area-of-mask": None}),
        (with_annotation(area=20), {"area-of-mask": WARNING}),
        (with_annotation(area=20, segmentation=RLE), {"area-of-mask": WARNING}),
        (with_annotation(area=20, segmentation=None), {"area-of-mask": None}),
        (content(categories=[]), {"no-categories": ERROR, "unknown-category": ERROR}),
        (
            content(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]),
            {"category-name-twice": ERROR},
        ),
        (content(categories=[{"id": 1, "name": "cat"}, {"id": 2}]), {"category-name": ERROR}),
        (
            content(categories=[{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]),
            {"category-id-twice": ERROR, "unknown-category": ERROR},
        ),
    ],
)  # fmt: skip
def test_odd_record_is_named(folder, whole, kinds):
    got = found(check(folder, whole))
    assert {kind: got.get(kind) for kind in kinds} == kinds
    assert not [k for k, level in got.items() if level == ERROR and k not in {*kinds, "no-objects"}]


def test_ignore_is_an_error_in_detectron2_alone(folder):
    report = check(folder, with_annotation(ignore=1))
    assert errors(report) == {"ignore": "d"}
    assert [f.kind for f in report.of(WARNING, "mmdetection")] == ["ignore"]


@pytest.mark.parametrize(
    ("box", "kind", "level"),
    [
        (None, "no-box", ERROR),
        ([], "no-box", ERROR),
        ([1, 2, 3], "box", ERROR),
        ("1 2 3 4", "box", ERROR),
        ([1, 2, None, 4], "box-number", ERROR),
        ([1, 2, float("nan"), 4], "box-number", ERROR),
        ([1, 2, float("inf"), 4], "box-number", ERROR),
        (["1", "2", "10", "8"], "number-text", NOTE),
        ([1, 2, -5, 4], "reversed-box", WARNING),
        ([1, 2, 0, 4], "empty-box", WARNING),
        ([50, 2, 5, 4], "outside-box", WARNING),
        ([1, 2, 0.5, 200 / 7], "tiny-box", WARNING),
        ([35, 2, 6, 14], "box-over-edge", NOTE),
        ([-10, -10, 60, 60], "box-over-image", WARNING),
    ],
)
def test_odd_box_is_named_with_its_place(folder, box, kind, level):
    report = check(folder, with_annotation(bbox=box))
    assert found(report).get(kind) == level
    finding = next(f for f in report.findings if f.kind == kind)
    assert finding.places == ["annotation 1 of '2.png'"]


def scaled(change: Any) -> Content:
    whole = content()
    for annotation in whole["annotations"]:
        annotation["bbox"] = change(*annotation["bbox"])
        del annotation["segmentation"]
    return whole


def test_relative_boxes_are_told_once_and_not_one_by_one(folder):
    report = check(folder, scaled(lambda x, y, w, h: [x / 40, y / 30, w / 40, h / 30]))
    assert found(report) == {"relative-boxes": ERROR}


@pytest.mark.parametrize(("number", "level"), [(1, WARNING), (2, ERROR), (20, ERROR)])
def test_share_of_relative_boxes_is_told(folder, number, level):
    whole = content()
    whole["annotations"] = [{**content()["annotations"][0], "id": i} for i in range(1, 41)]
    for annotation in whole["annotations"][:number]:
        annotation["bbox"] = [0.1, 0.1, 0.3, 0.3]
    whole["images"].append({"id": 3, "file_name": "3.png", "width": 2, "height": 2})
    report = check_dataset(write(folder, whole), None).report
    assert found(report)["relative-boxes"] == level and "tiny-box" not in found(report)
    assert report.findings[0].left.keys() == {"detectron2", "mmdetection"}


BOX = [20, 16, 36, 26]  # as corners in the image of 40×30, else out of it


@pytest.mark.parametrize(
    ("boxes", "area", "polygon", "is_corners"),
    [
        ([BOX] * 9, None, None, True),
        ([BOX] * 7, None, None, False),
        ([BOX] * 8 + [[3, 3, 5, 4]], 160, None, True),
        ([BOX] * 9, 50, None, True),
        ([BOX] * 4, 160, None, True),
        ([BOX] * 9, 36 * 26, None, False),
        ([BOX] * 3, None, [20, 16, 36, 16, 36, 26], True),
        ([BOX] * 9, 160, [20, 16, 56, 16, 56, 42], False),
        ([[2, 2, 36, 26]] * 9 + [[5, 2, 38, 26]], None, None, False),
        ([[2, 2, 36, 26]] * 9 + [[5, 2, 38, 26]], 400, None, False),
    ],
)
def test_corners_are_told_by_polygons_or_areas_or_else_the_image(
    folder, boxes, area, polygon, is_corners
):
    whole = content()
    record = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    whole["annotations"] = [{**record, "id": i, "bbox": b} for i, b in enumerate(boxes, 1)]
    for annotation in whole["annotations"]:
        annotation |= {"area": area} if area else {}
        annotation |= {"segmentation": [polygon]} if polygon else {}
    assert ("corners" in found(check(folder, whole))) == is_corners


def test_corners_are_told_where_areas_agree_with_corners(folder):
    report = check(folder, scaled(lambda x, y, w, h: [x + 19, y + 17, x + 19 + w, y + 17 + h]))
    assert found(report) == {"corners": ERROR}


def test_one_degenerate_box_does_not_hide_corners(folder):
    whole = content()
    whole["annotations"] = [
        {**content()["annotations"][0], "id": i, "bbox": [20, 16, 20 + i, 26], "area": 10 * i}
        for i in range(20)
    ]
    assert found(check(folder, whole))["corners"] == ERROR


def test_boxes_that_only_touch_the_edge_are_no_corners(folder):
    assert found(check(folder, scaled(lambda x, y, w, h: [8, 8, 32, 22]))) == {}


# ------------------------------------------------------------------------------ masks and keypoints


@pytest.mark.parametrize(
    ("mask", "kinds"),
    [
        (RLE, {}),
        ({"size": [40, 30], "counts": [600, 100, 500]}, {"mask-size": ERROR}),
        ({"size": [30, 40], "counts": [600, 100]}, {"mask-size": ERROR}),
        ({"size": [30, 40]}, {"mask": ERROR}),
        ("polygon", {"mask": ERROR}),
        ([["a"]], {"mask": ERROR}),
        ([[0.1, 0.1, 0.9, 0.1, 0.5, 0.5]], {"relative-polygons": ERROR}),
        ([["2", "3", "12", "3", "12", "11"]], {"number-text": NOTE}),
        ([[22, 3, 32, 3, 32, 11]], {"mask-elsewhere": WARNING}),
        ([[1, 1, 5, 5]], {"short-polygon": WARNING}),
        ([[1, 1, 5, 5, 6, 7, 8]], {"short-polygon": WARNING}),
        ([2, 3, 12, 3, 12, 11], {"flat-polygon": WARNING}),
        ([2, 3, 12, 11], {"short-polygon": WARNING}),
        ([22, 3, 32, 3, 32, 11], {"flat-polygon": WARNING, "mask-elsewhere": WARNING}),
        ([0.1, 0.1, 0.9, 0.1, 0.5, 0.5], {"flat-polygon": WARNING, "relative-polygons": ERROR}),
        ({"size": [30, 40], "counts": "hb0T3d?"}, {}),  # 600, 100, 500
        ({"size": [30, 40], "counts": "hb0T3"}, {"mask-size": ERROR}),
        ({"size": [30, 40], "counts": "hb0T"}, {"mask": ERROR}),
        ({"size": [30, 40], "counts": "é"}, {"mask": ERROR}),
        ({"size": [-30, -40], "counts": [600, 100, 500]}, {"mask": ERROR}),
        ([], {"no-mask": ERROR}),
        (None, {"no-mask": ERROR}),
    ],
)
def test_odd_mask_is_named(folder, mask, kinds):
    whole = with_annotation(segmentation=mask)
    assert found(check(folder, whole, split="train", masks="bitmask")) == kinds


def test_polygons_with_x_and_y_swapped_are_an_error(folder):
    whole = content()
    for annotation in whole["annotations"]:
        annotation["bbox"], annotation["area"] = [2, 20, 10, 6], 60
        annotation["segmentation"] = [[20, 2, 26, 2, 26, 12, 20, 12]]
    assert found(check(folder, whole)) == {"mask-elsewhere": ERROR}
    assert found(check(folder, whole, split="train")) == {"mask-elsewhere": ERROR}
    assert found(check(folder, whole, split="train", masks="")) == {"mask-elsewhere": NOTE}


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_those_of_pycocotools(seed):
    mask = np.random.default_rng(seed).random((60, 70)) < (0.001, 0.01, 0.5, 0.9, 0)[seed]
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    pixels = np.concatenate([[2], mask.T.ravel(), [2]])
    runs = np.diff(np.flatnonzero(np.diff(pixels))).tolist()
    assert run_lengths({"size": [60, 70], "counts": encoded}) == [0] * int(mask[0, 0]) + runs


@pytest.mark.parametrize(
    ("changed", "kinds"),
    [
        ({"segmentation": {"size": [30, 40]}}, {"mask": "d"}),
        ({"segmentation": {"size": [30, 40], "counts": [-1, 1201]}}, {"mask": "d"}),
        ({"segmentation": 5}, {"mask": "d"}),
        ({"segmentation": {"size": [30, 40], "counts": "é"}}, {}),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, {}),
        ({"segmentation": "polygon"}, {}),
        ({"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.5, 0.5]]}, {}),
        ({"keypoints": [1, None, 2]}, {"keypoints": "d"}),
        ({"keypoints": [1, 1, 3]}, {}),
        ({"keypoints": [1, 1]}, {}),
    ],
)
def test_masks_and_keypoints_that_are_not_read_stop_detectron2_at_most(folder, changed, kinds):
    report = check(folder, with_annotation(**changed), masks="", keypoints=0)
    assert errors(report) == kinds and report.findings
    assert errors(check(folder, with_annotation(**changed))).keys() == {report.findings[0].kind}


def test_encoded_masks_are_an_error_where_polygons_are_read(folder):
    report = check(folder, with_annotation(segmentation=RLE), split="train", masks="polygon")
    assert found(report) == {"mask-format": ERROR}
    assert report.of(ERROR, "mmdetection") == []


@pytest.mark.parametrize(
    ("points", "kinds"),
    [
        ([1, 1, 2, 5, 5, 1], {"num-keypoints": NOTE}),
        ([1, 1, 2], {"keypoint-number": ERROR}),
        ([1, 1, 2, 5], {"keypoint-number": ERROR}),
        ([1, 1, 7, 5, 5, 1], {"keypoints": ERROR}),
        (["1", 1, 2, 5, 5, 1], {"number-text": NOTE}),
        ([1, None, 2, 5, 5, 1], {"keypoints": ERROR}),
    ],
)
def test_odd_keypoints_are_named(folder, points, kinds):
    whole = with_annotation(keypoints=points)
    whole["categories"][0]["keypoints"] = ["head", "tail"]
    got = found(check(folder, whole, keypoints=2))
    assert {kind: got.get(kind) for kind in kinds} == kinds


def test_number_of_visible_keypoints_is_counted(folder):
    whole = with_annotation(keypoints=[1, 1, 2, 5, 5, 1, 0, 0, 0], num_keypoints=3)
    checked = check_dataset(write(folder, whole), str(folder))
    assert found(checked.report) == {"num-keypoints-other": WARNING}
    assert checked.mends.read["annotations", "num_keypoints"] == {0: 2}


def test_keypoints_of_another_number_than_the_models_are_an_error(folder):
    whole = with_annotation(keypoints=[1, 1, 2, 5, 5, 1], num_keypoints=2)
    assert "keypoints-of-model" in found(check(folder, whole, keypoints=17))
    assert found(check(folder, content(), keypoints=17))["no-keypoints"] == ERROR
