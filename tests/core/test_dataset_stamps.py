"""Datasets are checked once, and read from copies where their files say something oddly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from datasets_in_coco_format import content, make_images, with_annotation, write
from PIL import Image

from plugin_core.datasets import stamps
from plugin_core.datasets.check import Use
from plugin_core.datasets.findings import ERROR

checked_dataset = partial(stamps.checked_dataset, framework="detectron2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path)


def test_unchanged_files_are_not_checked_again(folder, monkeypatch):
    path = write(folder, with_annotation(iscrowd=None))
    calls = []
    real = stamps.check_dataset
    monkeypatch.setattr(stamps, "check_dataset", lambda *a: calls.append(1) or real(*a))
    first = checked_dataset(path, str(folder), Use("train"))
    again = checked_dataset(path, str(folder), Use("train"))
    assert calls == [1] and again == first and first.ann_file != path
    os.utime(path)  # another time, the same content
    assert checked_dataset(path, str(folder), Use("train")) == first and calls == [1]
    (folder / "1.png").write_bytes(b"")
    assert checked_dataset(path, str(folder), Use("train")).report.of(ERROR)
    assert calls == [1, 1]
    write(folder, content())
    checked_dataset(path, str(folder), Use("train"))
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("name", [r"sub\\1.png", "/home/someone/else/sub/1.png"])
def test_images_that_are_found_by_another_name_are_watched_too(folder, name):
    (folder / "sub").mkdir()
    (folder / "1.png").rename(folder / "sub" / "1.png")
    path = write(folder, content(images=[content()["images"][0] | {"file_name": name}]))
    assert not checked_dataset(path, str(folder)).report.of(ERROR)
    (folder / "sub" / "1.png").write_bytes(b"")
    assert checked_dataset(path, str(folder)).report.of(ERROR)


def test_copy_lists_categories_by_the_detectors_classes(folder):
    path = write(folder, content())
    same = checked_dataset(path, str(folder), classes=["cat", "dog"])
    assert same.ann_file == path
    other = checked_dataset(path, str(folder), classes=["dog", "cow", "cat"])
    written = json.loads(Path(other.ann_file).read_text())
    assert written["categories"] == [
        {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}, {"id": 1, "name": "cat"},
    ]  # fmt: skip
    assert written["annotations"] == content()["annotations"]
    fewer = checked_dataset(path, str(folder), classes=["dog"], other_classes=True)
    assert [c["name"] for c in json.loads(Path(fewer.ann_file).read_text())["categories"]] == [
        "dog",
        "cat",
    ]


def test_processes_check_one_after_the_other(folder):
    path = write(folder, content())
    code = (
        "import glob, os, sys, time; from plugin_core.datasets import stamps\n"
        "def check(*a):\n    print('checks', flush=True)\n"
        "    while len(glob.glob(sys.argv[1] + '.*')) < 2: time.sleep(0.01)\n"
        "    time.sleep(0.2); return real(*a)\n"
        "real = stamps.check_dataset; open(f'{sys.argv[1]}.{os.getpid()}', 'w').close()\n"
        "stamps.check_dataset = check\n"
        "stamps.checked_dataset(*sys.argv[1:], framework='detectron2')"
    )
    command = [sys.executable, "-c", code, path, str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert sorted(printed) == [b"", b"checks\n"]


def test_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTION_PLUGINS_CACHE", str(tmp_path / "file" / "cache"))
    stamps.cache_folder.cache_clear()
    try:
        path = write(folder, with_annotation(area=None))
        assert checked_dataset(path, str(folder)).ann_file != path
    finally:
        stamps.cache_folder.cache_clear()


def test_error_of_one_framework_takes_no_copy_from_the_other(folder):
    Image.new("I;16", (40, 30)).save(folder / "1.png")
    path = write(folder, content())
    classes = ["dog", "cat"]
    mm = stamps.checked_dataset(path, str(folder), classes=classes, framework="mmdetection")
    written = json.loads(Path(mm.ann_file).read_text())
    assert [category["name"] for category in written["categories"]] == classes
    assert checked_dataset(path, str(folder), classes=classes).ann_file == path


def test_images_that_were_missing_are_looked_for_again(folder):
    image = content()["images"][0] | {"file_name": "/home/someone/else/sub/3.png"}
    path = write(folder, content(images=[image]))
    assert checked_dataset(path, str(folder)).report.of(ERROR)
    (folder / "sub").mkdir()
    (folder / "1.png").rename(folder / "sub" / "3.png")
    assert not checked_dataset(path, str(folder)).report.of(ERROR)
