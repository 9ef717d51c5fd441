"""The check of datasets in COCO's format: what it finds, mends and remembers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets_in_coco_format import (
    check,
    content,
    errors,
    found,
    make_images,
    with_annotation,
    write,
)

from plugin_core.datasets.check import Use, check_dataset
from plugin_core.datasets.classes import check_classes, check_number_of_classes
from plugin_core.datasets.coco_file import check_whole, read_coco
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report
from plugin_core.datasets.mending import write_fixed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path)


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
