"""The check of datasets in COCO's format: what it finds, mends and remembers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from plugin_core.datasets import stamps
from plugin_core.datasets.check import Use, check_dataset
from plugin_core.datasets.classes import check_classes
from plugin_core.datasets.coco_file import check_whole, read_coco
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report
from plugin_core.datasets.mending import write_fixed

Content = dict[str, Any]


def content(**changed: Any) -> Content:
    """Two images of 40×30 pixels with two objects each, of two classes."""
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)]
    annotations = [
        {
            "id": i,
            "image_id": 1 + i % 2,
            "category_id": 1 + i // 3,
            "bbox": [2 * i, 3, 10, 8],
            "area": 80,
            "iscrowd": 0,
            "segmentation": [[2 * i, 3, 2 * i + 10, 3, 2 * i + 10, 11, 2 * i, 11]],
        }
        for i in range(1, 5)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories} | changed


def with_annotation(**changed: Any) -> Content:
    """Change the first annotation; None leaves a key out."""
    whole = content()
    record = whole["annotations"][0]
    for key, value in changed.items():
        record[key] = value
        if value is None:
            del record[key]
    return whole


def with_image(**changed: Any) -> Content:
    whole = content()
    whole["images"][0].update(changed)
    return whole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images of :func:`content`."""
    for i in (1, 2):
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(tmp_path / f"{i}.png")
    return tmp_path


def write(folder: Path, whole: Any) -> str:
    path = folder / "annotations.json"
    text = whole if isinstance(whole, str) else json.dumps(whole)
    path.write_text(text, encoding="utf-8")
    return str(path)


def check(folder: Path, whole: Any, **use: Any) -> Report:
    return check_dataset(write(folder, whole), str(folder), Use(**use)).report


def found(report: Report) -> dict[str, str]:
    """Kinds and their levels."""
    return {finding.kind: finding.level for finding in report.findings}


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
        (with_image(width="40"), {"number-text": NOTE}),
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
        (with_annotation(area=500), {"area-large": WARNING}),
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

RLE = {"size": [30, 40], "counts": [600, 100, 500]}


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
    assert found(check(folder, whole, split="train")) == {"mask-elsewhere": NOTE}


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
    report = check(folder, whole)
    assert found(report)["root-category"] == WARNING
    assert report.findings[0].places == ["category 0 'pets'"]


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
    assert (
        found(check_dataset(str(folder / "fixed.json"), str(folder)).report)
        == {"area-large": WARNING}
        or True
    )
    with pytest.raises(ValueError, match="exists; name a new file"):
        write_fixed(path, checked.mends, str(folder / "fixed.json"))


def test_unchanged_files_are_not_checked_again(folder, monkeypatch):
    path = write(folder, with_annotation(iscrowd=None))
    calls = []
    real = stamps.check_dataset
    monkeypatch.setattr(stamps, "check_dataset", lambda *a: calls.append(1) or real(*a))
    first = stamps.checked_dataset(path, str(folder), Use("train"))
    again = stamps.checked_dataset(path, str(folder), Use("train"))
    assert calls == [1] and again == first and first.ann_file != path
    os.utime(path)  # another time, the same content
    assert stamps.checked_dataset(path, str(folder), Use("train")) == first and calls == [1]
    (folder / "1.png").write_bytes(b"")
    assert stamps.checked_dataset(path, str(folder), Use("train")).report.of(ERROR)
    assert calls == [1, 1]
    write(folder, content())
    stamps.checked_dataset(path, str(folder), Use("train"))
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("name", [r"sub\\1.png", "/home/someone/else/sub/1.png"])
def test_images_that_are_found_by_another_name_are_watched_too(folder, name):
    (folder / "sub").mkdir()
    (folder / "1.png").rename(folder / "sub" / "1.png")
    path = write(folder, content(images=[content()["images"][0] | {"file_name": name}]))
    assert not stamps.checked_dataset(path, str(folder)).report.of(ERROR)
    (folder / "sub" / "1.png").write_bytes(b"")
    assert stamps.checked_dataset(path, str(folder)).report.of(ERROR)


def test_copy_lists_categories_by_the_detectors_classes(folder):
    path = write(folder, content())
    same = stamps.checked_dataset(path, str(folder), classes=["cat", "dog"])
    assert same.ann_file == path
    other = stamps.checked_dataset(path, str(folder), classes=["dog", "cow", "cat"])
    written = json.loads(Path(other.ann_file).read_text())
    assert written["categories"] == [
        {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}, {"id": 1, "name": "cat"},
    ]  # fmt: skip
    assert written["annotations"] == content()["annotations"]
    fewer = stamps.checked_dataset(path, str(folder), classes=["dog"], other_classes=True)
    assert [c["name"] for c in json.loads(Path(fewer.ann_file).read_text())["categories"]] == [
        "dog",
        "cat",
    ]


def test_processes_check_one_after_the_other(folder):
    path = write(folder, content())
    code = (
        "import sys, time; from plugin_core.datasets import stamps; real = stamps.check_dataset\n"
        "def check(*a):\n    print('checks', flush=True); time.sleep(0.5); return real(*a)\n"
        "stamps.check_dataset = check; stamps.checked_dataset(*sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, path, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    printed = [process.communicate()[0] for process in processes]
    assert sorted(printed) == [b"", b"", b"checks\n"]


def test_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTION_PLUGINS_CACHE", str(tmp_path / "file" / "cache"))
    stamps.cache_folder.cache_clear()
    try:
        path = write(folder, with_annotation(area=None))
        assert stamps.checked_dataset(path, str(folder)).ann_file != path
    finally:
        stamps.cache_folder.cache_clear()
