"""Image files of a dataset: what does not read, limits of the readers, turned images, names."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import pytest
from datasets_in_coco_format import check, content, found, make_images, with_image, write
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from plugin_core.datasets.check import check_dataset
from plugin_core.datasets.findings import ERROR, WARNING, Report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path)


def check_large(folder: Path, width: int, height: int) -> Report:
    """Check a dataset whose first image says in its header that it is large."""
    png = (folder / "1.png").read_bytes()
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    checked = zlib.crc32(header).to_bytes(4, "big")
    (folder / "1.png").write_bytes(png[:12] + header + checked + png[33:])
    return check_dataset(
        write(folder, with_image(width=width, height=height)), str(folder), decode=True
    ).report


def test_image_above_pillows_limit_is_an_error_in_detectron2_only(folder):
    report = check_large(folder, 20_000, 10_000)
    assert [f.kind for f in report.of(ERROR, "detectron2")] == ["image-unreadable"]
    assert not report.of(ERROR, "mmdetection")


def test_image_above_opencvs_limit_is_an_error_in_both(folder):
    report = check_large(folder, 40_000, 30_000)
    for framework in ("detectron2", "mmdetection"):
        assert [f.kind for f in report.of(ERROR, framework)] == ["image-unreadable"]


def test_settings_of_the_process_stay_as_they_were(folder):
    before = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as told:
        check_large(folder, 10_000, 10_000)
    assert not told
    many = [content()["images"][1] | {"id": i} for i in range(500)]
    check_dataset(write(folder, content(images=many)), str(folder))
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before


def test_a_missing_image_leaves_the_others_found(folder):
    whole = content()
    whole["images"].append({"id": 3, "file_name": "gone.png", "width": 40, "height": 30})
    for image in whole["images"]:
        image["file_name"] = rf"C:\data\{image['file_name']}"
    checked = check_dataset(write(folder, whole), str(folder))
    kinds = {f.kind: (f.level, f.count) for f in checked.report.findings}
    assert kinds == {"image-missing": (ERROR, 1), "file-name-spelling": (WARNING, 2)}
    assert checked.mends.read["images", "file_name"] == {0: "1.png", 1: "2.png"}


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
