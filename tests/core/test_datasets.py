"""The check of datasets in COCO's format: what it finds, mends and remembers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets_in_coco_format import (
    Content,
    content,
    make_images,
    with_annotation,
    with_image,
    write,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as rle

from plugin_core.datasets.check import Use, check_dataset
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.coco_file import check_whole, read_coco
from plugin_core.datasets.findings import ERROR, FRAMEWORKS, NOTE, WARNING, Report
from plugin_core.datasets.masks import run_lengths
from plugin_core.datasets.mending import write_fixed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path)


def check(folder: Path, whole: Any, **use: Any) -> Report:
    return check_dataset(write(folder, whole), str(folder), Use(**use)).report


def found(report: Report) -> dict[str, str]:
    """Kinds and their levels; the worst one of each."""
    return {finding.kind: finding.level for finding in reversed(report.findings)}


def errors(report: Report) -> dict[str, str]:
    """Kinds of errors, and the frameworks that they matter in."""
    return {
        finding.kind: "".join(k[0] for k in FRAMEWORKS if finding.concerns(k))
        for finding in report.of(ERROR)
    }


def test_good_dataset_has_nothing_to_say(folder):
    report = check(folder, content(), split="train", masks="polygon")
    assert report.findings == [] and report.text() == ""
    assert report.classes == {"cat": 2, "dog": 2}
    assert report.counts["annotations"] == 4 and report.counts["images without annotations"] == 0


# ------------------------------------------------------------------------------- reading, encodings


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"images": [', "it is cut off after 12 bytes"),
        (b'{"images": [1 2]}', "an unexpected character in line 1, byte 14"),
        (b"[1, 2]", "holds a list; COCO's format is an object"),
        (b'{"images": 3}', "images is a int; expected a list"),
        (b'{"images": [], "x": "caf\xe9"}', "is not in UTF-8: byte 24 is 0xe9"),
        ('{"images": []}'.encode("utf-16-le"), "is in UTF-16LE; write it as UTF-8"),
        ('{"images": []}'.encode("utf-16-be"), "is in UTF-16BE; write it as UTF-8"),
        (b"[1,2", "is no JSON: it is cut off after 4 bytes"),
        (b'{"images": [{"width": 1e999}]}', "is no JSON: Number out of range"),
        (b'{"images": ' + b"[" * 9000 + b"]" * 9000 + b"}", "maximum recursion depth"),
        (b'{"images": [NaN 1]}', "is no JSON"),
        ('{"images": []}'.encode("utf-16"), "is in UTF-16; write it as UTF-8"),
        (b"\x00\x01\x02", "is no JSON"),
    ],
)
def test_file_that_cannot_be_read_is_told_in_a_line(tmp_path, data, said):
    path = tmp_path / "annotations.json"
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_coco(str(path))
    assert said in str(error.value) and repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ['{"a": 1}', '\n {"a": {}}\n'])
def test_whole_object_of_another_format_passes(tmp_path, text):
    check_whole(write(tmp_path, text))
    with pytest.raises(ValueError, match="is no whole JSON object"):
        check_whole(write(tmp_path, text.rstrip().rstrip("}")))


def test_constants_of_python_are_read_as_null_outside_of_texts(tmp_path):
    whole = '{"a": "NaN, \\"NaN\\" \\\\", "images": [{"id": NaN, "width": [-Infinity]}], "b": NaN}'
    images = read_coco(write(tmp_path, whole)).images
    assert images[0].id is None and images[0].width == [None]
    whole = whole.replace('"a"', '"images"').replace('"images": [', '"c": [')
    with pytest.raises(ValueError, match="images is a str"):
        read_coco(write(tmp_path, whole))


def test_masks_of_a_file_with_constants_are_checked(folder):
    whole = with_annotation(segmentation=[[22, 3, 32, 3, 32, 11]], area=float("nan"))
    assert found(check(folder, whole)) == {"mask-elsewhere": WARNING, "no-area": NOTE}


@pytest.mark.parametrize("key", ["area", "bbox", "image_id", "keypoints", "segmentation"])
def test_number_of_400_digits_ends_in_no_traceback(folder, key):
    large = 10**400
    values = {"bbox": [1, 1, large, 2], "keypoints": [large, 1, 2], "segmentation": [[large] * 6]}
    assert check(folder, with_annotation(**{key: values.get(key, large)})).findings


def test_byte_order_mark_is_read(folder):
    path = write(folder, content())
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    checked = check_dataset(path, str(folder))
    assert found(checked.report) == {"encoding": NOTE} and len(checked.content.images) == 2


def test_position_of_a_wrong_byte_in_a_large_file_is_right(tmp_path):
    path = tmp_path / "annotations.json"
    text = '{"x": "' + "é" * (1 << 23) + "."
    path.write_bytes(text.encode() + b'\xff"}')
    with pytest.raises(ValueError, match=f"byte {len(text.encode())} is 0xff"):
        read_coco(str(path))


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


# ------------------------------------------------------------------------------------------- images


def test_unreadable_images_are_named_and_reading_goes_on(folder):
    whole = (folder / "1.png").read_bytes()
    for data, said in (
        (b"", "is empty (0 bytes)"),
        (b"<html>404</html>", "is no image (it begins with b'<html>404</h')"),
        (whole[: len(whole) // 2], "is damaged"),
    ):
        (folder / "1.png").write_bytes(data)
        report = check(folder, content())
        assert found(report) == {"image-unreadable": ERROR}
        assert said in report.findings[0].places[0]


def test_unreadable_images_are_a_warning_where_they_are_left_out(folder):
    (folder / "1.png").write_bytes(b"")
    report = check(folder, content(), split="train", skips_unreadable=True)
    assert found(report) == {"image-unreadable": WARNING}
    assert report.findings[0].remedy == "they are left out, as the config says"


def test_damage_in_the_middle_is_found_where_images_are_read_whole(folder):
    data = bytearray((folder / "1.png").read_bytes())
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 30] = bytes(30)
    (folder / "1.png").write_bytes(data)
    path = write(folder, content())
    assert found(check_dataset(path, str(folder)).report) == {}
    assert "image-unreadable" in found(check_dataset(path, str(folder), decode=True).report)


@pytest.mark.parametrize(
    ("orientation", "size", "kinds"),
    [
        (1, (40, 30), {}),
        (6, (40, 30), {"exif-not-followed": ERROR}),
        (6, (30, 40), {}),
        (3, (40, 30), {"exif": WARNING}),
    ],
)
def test_orientation_is_compared_with_the_labels(folder, orientation, size, kinds):
    image = Image.open(folder / "1.png")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(folder / "1.png", exif=exif)
    whole = with_image(width=size[0], height=size[1])
    whole["annotations"] = []
    got = found(check(folder, whole, split="test"))
    assert {k: v for k, v in got.items() if k != "nothing-to-find"} == kinds


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_orientations_that_detectron2_alone_reads_otherwise_are_its_errors(folder, kind):
    image, options = Image.open(folder / "1.png"), {}
    if kind == "TIFF":
        exif = image.getexif()
        exif[0x0112] = 3
        options["exif"] = exif
    else:  # as ImageMagick writes it
        info = PngInfo()
        data = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
        info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n")
        options["pnginfo"] = info
    image.save(folder / "1.png", format=kind, **options)
    report = check(folder, content())
    kinds = {"TIFF": "exif-tiff", "PNG": "exif-text"}
    assert [f.kind for f in report.of(ERROR, "detectron2")] == [kinds[kind]]
    assert not report.of(ERROR, "mmdetection")


def test_missing_image_is_not_taken_for_another_one(folder):
    whole = content()
    whole["images"].append({"id": 3, "file_name": "camB/1.png", "width": 40, "height": 30})
    assert found(check(folder, whole)) == {"image-missing": ERROR}


def test_names_of_another_system_are_found_below_the_folder(folder):
    (folder / "sub").mkdir()
    for i in (1, 2):
        (folder / f"{i}.png").rename(folder / "sub" / f"{i}.png")
    whole = content()
    for image in whole["images"]:
        image["file_name"] = rf"C:\data\sub\{image['file_name']}"
    checked = check_dataset(write(folder, whole), str(folder))
    assert found(checked.report) == {"file-name-spelling": WARNING}
    assert checked.mends.read["images", "file_name"] == {0: "sub/1.png", 1: "sub/2.png"}


def test_letters_composed_in_another_way_are_the_same_name(folder):
    (folder / "1.png").rename(folder / "caf\u00e9.png")
    checked = check_dataset(write(folder, with_image(file_name="cafe\u0301.png")), str(folder))
    assert checked.mends.read["images", "file_name"] == {0: "caf\u00e9.png"}


def test_missing_image_is_an_error_that_names_a_near_one(folder):
    (folder / "1.png").rename(folder / "1.PNG")
    report = check(folder, content())
    assert found(report) == {"image-missing": ERROR}
    assert report.findings[0].places == ["image 1 '1.png' (there is '1.PNG')"]


def test_deep_pixels_are_an_error_in_detectron2_only(folder):
    Image.linear_gradient("L").resize((40, 30)).convert("I;16").save(folder / "1.png")
    report = check(folder, content())
    assert report.of(ERROR, "detectron2") and not report.of(ERROR, "mmdetection")


# --------------------------------------------------------------------------------- use, and classes


def test_objects_that_are_all_left_out_are_none(folder):
    whole = content()
    for annotation in whole["annotations"]:
        annotation["bbox"][2] = 0
    got = check(folder, whole, split="train")
    assert found(got) == {"no-objects": ERROR, "empty-box": WARNING}
    assert "crowds, or boxes that are left out" in got.text()


@pytest.mark.parametrize(
    ("changed", "use", "frameworks"),
    [
        ({"area": 0}, {}, "m"),
        ({"bbox": [2, 3, 0.5, 8], "area": 4}, {}, "m"),
        ({"ignore": 1}, {}, "m"),
        ({"segmentation": [[2, 3, 12, 11]]}, {}, "d"),
        ({"segmentation": [2, 3, 12, 11]}, {}, "d"),
        ({"segmentation": [[2, 3, 12, 11]]}, {"masks": "bitmask"}, "dm"),
        ({"segmentation": [[2, 3, 12, 11], [2, 3, 12, 3, 12, 11]]}, {}, ""),
        ({"area": 0}, {"keeps_empty": True}, ""),
    ],
)
def test_objects_that_a_framework_leaves_out_are_none(folder, changed, use, frameworks):
    whole = content()
    for annotation in whole["annotations"]:
        annotation |= changed
    report = check(folder, whole, split="train", **use)
    none = [f for f in report.of(ERROR) if f.kind == "no-objects"]
    assert "".join(key[0] for finding in none for key in finding.left) == frameworks
    whole["annotations"].append(content()["annotations"][0] | {"id": 9})
    assert "no-objects" not in found(check(folder, whole, split="train", **use))


def test_no_visible_keypoint_is_an_error_in_detectron2(folder):
    whole = content()
    for category in whole["categories"]:
        category["keypoints"] = ["head"]
    assert errors(check(folder, whole, split="train", keypoints=1)) == {"no-visible-keypoints": "d"}


def test_images_that_are_all_left_out_are_an_error(folder):
    for i in (1, 2):
        (folder / f"{i}.png").unlink()
    assert errors(check(folder, content(), split="train", skips_unreadable=True)) == {
        "image-missing": "dm"
    }


def test_objects_without_keypoints_get_coco_s_zeros(folder):
    whole = content()
    whole["categories"][0]["keypoints"] = whole["categories"][1]["keypoints"] = ["head", "tail"]
    whole["annotations"][0] |= {"keypoints": [1, 1, 2, 5, 5, 1], "num_keypoints": 2}
    checked = check_dataset(write(folder, whole), str(folder), Use("train", keypoints=2))
    assert found(checked.report) == {}
    assert checked.mends.read["annotations", "keypoints"] == dict.fromkeys((1, 2, 3), [0] * 6)


def test_keypoints_without_names_are_an_error_in_detectron2(folder):
    report = check(folder, with_annotation(keypoints=[1, 1, 2], num_keypoints=1), keypoints=1)
    assert [f.kind for f in report.of(ERROR, "detectron2")] == ["keypoint-names"]


@pytest.mark.parametrize(
    ("mask", "area"),
    [
        ({"size": [30, 40], "counts": [600, 60, 540]}, 60),
        ([2, 3, 8, 3, 8, 11, 2, 11], 48),
        ([[2, 3, 8, 3, "8", 11, 2, 11]], 48),
        ([["a"]], 80),
        ([], 80),
    ],
)
def test_missing_area_is_that_of_the_mask_or_else_the_box(folder, mask, area):
    whole = with_annotation(area=None, segmentation=mask)
    checked = check_dataset(write(folder, whole), str(folder))
    assert checked.mends.read["annotations", "area"] == {0: area}


@pytest.mark.parametrize("area", [None, 400, 300])
def test_fix_computes_the_area_of_a_box_that_it_clips(folder, area):
    whole = with_annotation(bbox=[30, 3, 40, 10], area=area, segmentation=None)
    write_fixed(
        write(folder, whole),
        check_dataset(write(folder, whole), str(folder)).mends,
        str(folder / "fixed.json"),
    )
    fixed = json.loads((folder / "fixed.json").read_text())
    assert fixed["annotations"][0]["area"] == 100
    assert found(check(folder, fixed)) == {}


@pytest.mark.parametrize(
    ("split", "keeps_empty", "kinds"),
    [
        ("train", False, {"no-objects": ERROR}),
        ("train", True, {}),
        ("test", False, {"nothing-to-find": WARNING}),
        ("", False, {"no-objects": WARNING}),
    ],
)
def test_no_objects_matter_by_use(folder, split, keeps_empty, kinds):
    report = check(folder, content(annotations=[]), split=split, keeps_empty=keeps_empty)
    assert found(report) == kinds


def test_group_of_roboflow_is_told(folder):
    whole = content()
    for category in whole["categories"]:
        category["supercategory"] = "pets"
    whole["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    checked = check_dataset(write(folder, whole), str(folder))
    assert found(checked.report)["root-category"] == WARNING
    assert checked.report.findings[0].places == ["category 0 'pets'"]
    assert checked.mends.dropped["categories"] == {0}
    whole["categories"][0]["supercategory"] = "animals"  # may be a class without objects here
    checked = check_dataset(write(folder, whole), str(folder))
    assert checked.report.findings[0].mended == "" and not checked.mends.dropped["categories"]


@pytest.mark.parametrize(
    ("classes", "may_leave_out", "kinds"),
    [
        (["dog", "cat"], False, {}),
        (["cat", "dgo"], True, {"class-names": ERROR}),
        (["cat"], True, {"class-left-out": WARNING}),
        (["cat"], False, {"class-left-out": ERROR}),
        (["cat", "dog", "cow"], False, {"class-missing": WARNING}),
    ],
)
def test_classes_are_compared_by_name(folder, classes, may_leave_out, kinds):
    report = check(folder, content())
    check_classes(report, classes, "the config", may_leave_out=may_leave_out)
    assert found(report) == kinds


# ------------------------------------------------------------------------- report, mending, stamps


def test_report_fits_a_screen_and_reads_back(folder):
    whole = content(annotations=[])
    kinds: list[dict[str, Any]] = [
        {"id": None}, {"image_id": 9}, {"category_id": 9}, {"iscrowd": 3}, {"ignore": 1},
        {"area": []}, {"bbox": []}, {"bbox": [1]}, {"bbox": [None] * 4}, {"bbox": [1, 1, -3, 3]},
        {"bbox": [1, 1, 0, 3]}, {"bbox": [99, 1, 3, 3]}, {"segmentation": "x"},
        {"segmentation": [[1]]}, {"keypoints": [1]},
    ]  # fmt: skip
    whole["annotations"] = [content()["annotations"][0] | kind for kind in kinds]
    report = check(folder, whole)
    lines = report.text().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert "more kinds, all in --json" in report.text()
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_fix_writes_what_needs_no_guess_and_leaves_the_file(folder):
    whole = content(info={"by": "me"})
    first, second, third, fourth = whole["annotations"]
    del first["area"], first["iscrowd"], first["segmentation"]
    first["note"] = "kept"
    second["bbox"], third["bbox"] = [30, 3, 20, 8], [1, 1, 0, 5]
    fourth["image_id"] = 77
    del whole["images"][0]["width"]
    path = write(folder, whole)
    before = Path(path).read_bytes()
    checked = check_dataset(path, str(folder))
    done = write_fixed(path, checked.mends, str(folder / "fixed.json"))
    assert "2 annotations left out" in done and Path(path).read_bytes() == before
    fixed = json.loads((folder / "fixed.json").read_text())
    assert fixed["info"] == {"by": "me"} and fixed["images"][0]["width"] == 40
    assert [a["id"] for a in fixed["annotations"]] == [1, 2]
    assert fixed["annotations"][0]["area"] == 80 and fixed["annotations"][0]["iscrowd"] == 0
    assert fixed["annotations"][0]["note"] == "kept"
    assert fixed["annotations"][1]["bbox"] == [30, 3, 10, 8]
    with pytest.raises(ValueError, match="exists; name a new file"):
        write_fixed(path, checked.mends, str(folder / "fixed.json"))


def test_objects_that_are_listed_twice_are_told(folder):
    whole = content()
    copies = [{**a, "id": a["id"] + 10} for a in whole["annotations"]]
    report = check(folder, whole | {"annotations": whole["annotations"] + copies})
    assert found(report) == {"object-twice": WARNING}
    assert report.findings[0].count == 4
    copies = [{**a, "category_id": 3 - a["category_id"]} for a in copies]  # of another class
    assert found(check(folder, whole | {"annotations": whole["annotations"] + copies})) == {}


def test_many_boxes_that_reach_out_are_not_clipped(folder):
    whole = content()
    first = whole["annotations"][0]
    del first["segmentation"], first["area"]
    boxes = [[30, 3 + i / 2, 20 + i, 10] for i in range(10)]
    whole["annotations"] = [{**first, "id": i, "bbox": b} for i, b in enumerate(boxes, 1)]
    report = check(folder, whole)
    (finding,) = [f for f in report.findings if f.kind == "box-over-image"]
    assert finding.mended == "" and "a center" in finding.remedy


def test_background_listed_as_a_class_is_told(folder):
    categories = [{"id": 0, "name": "_background_"}, *content()["categories"]]
    path = write(folder, content(categories=categories))
    checked = check_dataset(path, str(folder))
    assert found(checked.report)["background-category"] == WARNING
    text = check_number_of_classes(2, list(checked.report.classes), "N", checked.report)
    assert text.endswith("is the background, and no class; take it out of the file")
    write_fixed(path, checked.mends, str(folder / "fixed.json"))
    fixed = json.loads((folder / "fixed.json").read_text())
    assert fixed["categories"] == content()["categories"]


def test_shifted_categories_are_asked_for(folder):
    whole = content(categories=[{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}])
    report = check(folder, whole)
    assert "one too low" in next(f for f in report.findings if f.kind == "unknown-category").remedy


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip"),
        (b"<!DOCTYPE html><p>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, data, said):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        read_coco(str(tmp_path / "a.json"))
