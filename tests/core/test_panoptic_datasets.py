"""The check of panoptic datasets in COCO's format: what it finds in the file and its PNGs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_dataset as tool
import numpy as np
import pytest
from PIL import Image

from plugin_core.datasets.findings import ERROR, WARNING
from plugin_core.datasets.panoptic import PanopticReport, check_panoptic, is_panoptic

Content = dict[str, Any]
IDS = (300, 70_000)  # of each image's segments: its left and its right half


def content(**changed: Any) -> Content:
    """Two images of 20×10 pixels with a segment of a thing and one of stuff each."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10} for i in (1, 2)]
    annotations = [
        {
            "image_id": i,
            "file_name": f"{i}.png",
            "segments_info": [
                {
                    "id": IDS[c],
                    "category_id": c,
                    "area": 100,
                    "bbox": [10 * c, 0, 10, 10],
                    "iscrowd": 0,
                }
                for c in (0, 1)
            ],
        }
        for i in (1, 2)
    ]
    categories = [{"id": 0, "name": "cat", "isthing": 1}, {"id": 1, "name": "sky", "isthing": 0}]
    return {"images": images, "annotations": annotations, "categories": categories} | changed


def changed(*path: str | int, to: Any = ...) -> Content:
    """Change the value at a path; ... takes it out."""
    whole: Any = content()
    node = whole
    for key in path[:-1]:
        node = node[key]
    if to is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = to
    return whole


def segment(key: str, to: Any = ...) -> Content:
    return changed("annotations", 0, "segments_info", 0, key, to=to)


def record(key: str, to: Any = ...) -> Content:
    return changed("annotations", 0, key, to=to)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images, and their PNGs below ``pngs``."""
    (tmp_path / "pngs").mkdir()
    for i in (1, 2):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{i}.jpg")
        draw(tmp_path / "pngs" / f"{i}.png")
    return tmp_path


def draw(path: Path, ids: tuple[int, int] = IDS, size: tuple[int, int] = (20, 10)) -> None:
    pixels = np.repeat(ids, size[0] // 2)[None].repeat(size[1], 0)
    colors = np.stack([pixels % 256, pixels // 256 % 256, pixels // 256**2], -1)
    Image.fromarray(colors.astype(np.uint8)).save(path)


def write(folder: Path, whole: Any) -> str:
    (folder / "panoptic.json").write_text(json.dumps(whole), encoding="utf-8")
    return str(folder / "panoptic.json")


def check(folder: Path, whole: Any, **options: Any) -> PanopticReport:
    return check_panoptic(write(folder, whole), str(folder / "pngs"), str(folder), **options)


def found(report: PanopticReport) -> dict[str, str]:
    """Kinds and their levels."""
    return {finding.kind: finding.level for finding in report.findings}


def test_good_dataset_has_nothing_to_say(folder):
    report = check(folder, content())
    assert report.findings == [] and report.text() == ""
    assert [tuple(c) for c in report.categories] == [(0, "cat", True, 2), (1, "sky", False, 2)]
    assert report.counts["segments"] == 4 and report.counts["images without annotation"] == 0


def test_drawn_dataset_has_nothing_to_say(drawn_coco):
    pngs = drawn_coco / "annotations" / "panoptic_train2017"
    report = check_panoptic(f"{pngs}.json", str(pngs), str(drawn_coco / "train2017"), decode=True)
    assert report.findings == [] and report.counts["segments"] > 6


@pytest.mark.parametrize(
    ("whole", "kinds"),
    [
        (changed("images"), {"no-list": ERROR, "no-images": None, "unknown-image": WARNING}),
        (changed("categories"), {"no-list": ERROR, "category-id-of-segment": ERROR}),
        (changed("annotations"), {"no-annotations": ERROR, "no-segments": WARNING}),
        (changed("images", 0, to=7), {"no-object": ERROR, "unknown-image": WARNING}),
        (changed("images", 0, "id"), {"image-id": ERROR, "unknown-image": WARNING}),
        (changed("images", 0, "id", to=2), {"image-id-twice": ERROR}),
        (changed("images", 0, "file_name"), {"file-name": ERROR}),
        (changed("images", 0, "width"), {"no-size": ERROR}),
        (changed("images", 0, "width", to="20"), {"number-text": ERROR}),
        (changed("images", 0, "width", to=[20]), {"no-size": ERROR}),
        (changed("images", 0, "height", to=11), {"image-size": ERROR, "png-size": ERROR}),
        (record("image_id"), {"image-id-of-annotation": ERROR, "no-annotation": WARNING}),
        (record("image_id", {}), {"image-id-of-annotation": ERROR}),
        (record("image_id", 9), {"unknown-image": WARNING, "no-annotation": WARNING}),
        (record("image_id", 2), {"image-annotated-twice": ERROR, "no-annotation": WARNING}),
        (record("file_name"), {"png-name": ERROR}),
        (record("file_name", 5), {"png-name": ERROR}),
        (record("file_name", "2.png"), {"png-of-image": ERROR, "image-of-png": ERROR}),
        (record("file_name", "no.png"), {"png-missing": ERROR}),
        (record("segments_info"), {"segments-info": ERROR}),
        (record("segments_info", {}), {"segments-info": ERROR}),
        (record("segments_info", [None]), {"segment-no-object": ERROR, "unlisted-pixels": ERROR}),
        (segment("id"), {"segment-id": ERROR, "unlisted-pixels": ERROR}),
        (segment("id", 0), {"segment-id": ERROR}),
        (segment("id", -1), {"segment-id": ERROR}),
        (segment("id", 256**3), {"segment-id": ERROR}),
        (segment("id", "300"), {"segment-id": ERROR}),
        (segment("id", 300.0), {"segment-id": None}),
        (segment("id", IDS[1]), {"segment-id-twice": ERROR, "unlisted-pixels": ERROR}),
        (segment("id", 256**3 - 1), {"empty-segment": ERROR, "unlisted-pixels": ERROR}),
        (segment("category_id"), {"category-id-of-segment": ERROR}),
        (segment("category_id", 9), {"category-id-of-segment": ERROR}),
        (segment("category_id", "0"), {"category-id-of-segment": ERROR}),
        (segment("iscrowd"), {"iscrowd": ERROR}),
        (segment("iscrowd", 2), {"iscrowd": ERROR}),
        (segment("iscrowd", True), {"iscrowd": None}),
        (segment("area"), {"area": ERROR}),
        (segment("area", float("nan")), {"area": ERROR}),
        (segment("area", "100"), {"area": ERROR}),
        (segment("area", 0), {"small-segment": WARNING}),
        (segment("area", 90), {"area-of-pixels": WARNING}),
        (segment("bbox"), {"bbox": ERROR}),
        (segment("bbox", [0, 0, None, 1]), {"bbox": ERROR}),
        (segment("bbox", [0, 0, 0.5, 1]), {"small-segment": WARNING}),
        (changed("categories", 0, "name"), {"category-name": ERROR}),
        (changed("categories", 0, "name", to="sky"), {"category-name-twice": ERROR}),
        (changed("categories", 0, "id", to=1), {"category-id-twice": ERROR}),
        (changed("categories", 0, "isthing"), {"isthing": ERROR}),
        (changed("categories", 0, "isthing", to="1"), {"isthing": ERROR}),
    ],
)  # fmt: skip
def test_odd_record_is_named(folder, whole, kinds):
    got = found(check(folder, whole))
    assert {kind: got.get(kind) for kind in kinds} == kinds


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (lambda path: path.unlink(), "png-missing", "'1.png'"),
        (lambda path: path.write_bytes(b""), "png-unreadable", "'1.png' (is empty)"),
        (lambda path: path.write_bytes(b"<html>" * 9), "png-unreadable", "begins with b'<html>"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "png-unreadable", "is cut off"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX")),
            "png-unreadable",
            "is damaged",
        ),
        (
            lambda path: Image.open(path).save(path, format="JPEG"),
            "png-unreadable",
            "is no PNG: it begins with b'\\xff\\xd8",
        ),
        (lambda path: Image.open(path).convert("L").save(path), "png-mode", "grey, 8 bits"),
        (lambda path: Image.open(path).convert("P").save(path), "png-mode", "palette, 8 bits"),
        (lambda path: Image.new("I;16", (20, 10)).save(path), "png-mode", "grey, 16 bits"),
        (lambda path: draw(path, size=(10, 20)), "png-size", "'1.png' (10×20)"),
        (lambda path: draw(path, (300, 7)), "unlisted-pixels", "7 in '1.png'"),
        (lambda path: draw(path, (300, 300)), "empty-segment", "segment 70000 of '1.png'"),
    ],
)
def test_odd_png_is_named(folder, spoil: Callable[[Path], Any], kind, said):
    spoil(folder / "pngs" / "1.png")
    report = check(folder, content())
    finding = next(f for f in report.findings if f.kind == kind)
    assert finding.level == ERROR and finding.count == 1 and said in finding.places[0]


def test_pixels_of_the_first_pngs_alone_are_compared(folder, monkeypatch):
    monkeypatch.setattr("plugin_core.datasets.panoptic_pngs.DECODED", 1)
    draw(folder / "pngs" / "2.png", (7, 8))
    assert found(check(folder, content())) == {}
    assert "unlisted-pixels" in found(check(folder, content(), decode=True))


def test_pixels_of_no_segment_are_zero(folder):
    draw(folder / "pngs" / "1.png", (300, 0))
    whole = content()
    del whole["annotations"][0]["segments_info"][1]
    assert found(check(folder, whole)) == {}


def test_images_of_other_names_are_what_one_framework_does_not_find(folder):
    for i in (1, 2):
        (folder / f"{i}.jpg").rename(folder / f"{i}.png")
    whole = content()
    for image in whole["images"]:
        image["file_name"] = image["file_name"].replace(".jpg", ".png")
    report = check(folder, whole)
    assert [f.kind for f in report.of(ERROR, "detectron2")] == ["image-of-png"]
    assert not report.of(ERROR, "mmdetection")


def test_folders_that_are_missing_are_named(folder):
    path = write(folder, content())
    report = check_panoptic(path, str(folder / "none"), str(folder / "no"))
    assert found(report) == {"png-folder": ERROR, "image-folder": ERROR}
    assert found(check_panoptic(path, None, None)) == {}


def test_what_no_copy_says_right_is_an_error(folder):
    (folder / "1.jpg").rename(folder / "1.JPG")
    path = write(folder, changed("images", 0, "file_name", to="/old/1.JPG"))
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    report = check_panoptic(path, None, str(folder))
    kinds = found(report)
    assert kinds["file-name-spelling"] == kinds["encoding"] == ERROR
    assert not any(finding.mended for finding in report.findings)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"images": 3}', '{"images": [', '{"a": ' + "[" * 9000]
)
def test_file_that_cannot_be_read_is_told_in_a_line(tmp_path, text):
    (tmp_path / "panoptic.json").write_text(text)
    with pytest.raises(ValueError, match="^annotation file '.*panoptic.json'"):
        check_panoptic(str(tmp_path / "panoptic.json"), None, None)


def test_random_damage_ends_in_a_report_and_no_traceback(folder):
    odd = [None, True, "", "1", "a\0", -1, 1.5, float("nan"), float("inf"), 2**64, [], [[1]], {}]
    chance = random.Random(0)
    for _ in range(60):
        whole = content()
        for _ in range(chance.choice((1, 3, 9))):
            node, key = chance.choice(list(places(whole)))
            node[key] = chance.choice(odd)
        try:
            json.dumps(check(folder, whole).as_dict())
        except ValueError as error:
            assert str(error).startswith("annotation file ")


def places(node: Any) -> Any:
    """List all places in nested lists and dicts."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


# --------------------------------------------------------------------------------------------- tool


def test_tool_tells_panoptic_files_and_checks_them(folder, capsys):
    path = write(folder, segment("id", 0))
    assert is_panoptic(path) and not is_panoptic(str(folder / "none.json"))
    pngs = ["--segments", str(folder / "pngs")]
    assert tool.main([path, str(folder), *pngs, "--json", str(folder / "report.json")]) == 1
    assert "segments whose id is no whole number" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["categories"][0] == [0, "cat", True, 2]
    with pytest.raises(SystemExit, match="--fix: nothing can be mended"):
        tool.main([path, str(folder), *pngs, "--fix", str(folder / "fixed.json")])
    assert tool.main([write(folder, content()), str(folder), *pngs]) == 0
    assert "nothing was found that is wrong" in capsys.readouterr().out
