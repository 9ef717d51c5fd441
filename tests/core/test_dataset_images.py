"""Image files of a dataset: limits of the readers, and names of which only some are found."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import pytest
from datasets_in_coco_format import content, make_images, with_image, write
from PIL import Image

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
