"""Checking each dataset once: what was found is kept until a file changes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from plugin_core.datasets.check import Checked, Use, check_dataset
from plugin_core.datasets.coco_file import Category, encode, sort_categories
from plugin_core.datasets.findings import Report
from plugin_core.datasets.mending import mended
from plugin_core.files import cache_folder, file_state, in_turn, replacing

# Goes up when checks change, as older results say nothing then.
_VERSION = 5


@dataclass
class Dataset:
    """A checked dataset.

    Attributes:
        report: what was found.
        ann_file: the file to read: the user's own, or a copy of it in the cache folder that says
            the same in a way that both frameworks read.
        categories: names and ids of its classes.
    """

    report: Report
    ann_file: str
    categories: list[tuple[str, Any]]


def checked_dataset(
    annotations: str,
    images: str | None,
    use: Use | None = None,
    classes: Sequence[str] | None = None,
    *,
    framework: str,
    other_classes: bool = False,
) -> Dataset:
    """Check a dataset, or look up what was found when its files were as they are now.

    Args:
        annotations: path of the file in COCO's format.
        images: folder of the images; None to check the annotations alone.
        use: what the dataset is for.
        classes: the detector's classes. The file to read lists its categories in this order, and
            those that it lacks as well. So a framework's labels do not depend on the file's order.
        framework: "detectron2" or "mmdetection", which is to read the file. Without errors that
            concern it, the file to read is right for it.
        other_classes: keep categories that are none of ``classes``.

    Raises:
        ValueError: if the file cannot be read at all.
    """
    wanted = {"version": _VERSION, "use": asdict(use or Use()), "classes": list(classes or ())}
    paths = [os.path.abspath(annotations), images and os.path.abspath(images)]
    place = [*paths, framework, other_classes]
    name = hashlib.sha256(json.dumps([wanted, place]).encode()).hexdigest()[:24]
    stamp_file = cache_folder() / "checked" / f"{name}.json"
    # A training's processes ask at the same time. The first one checks, the others find its stamp.
    with in_turn(stamp_file):
        known = _look_up(stamp_file, annotations, images)
        if known:
            return known
        # State and digest first: a change from here on is seen the next time.
        state, digest = _file_state(annotations), _digest(annotations)
        checked = check_dataset(annotations, images, use)
        copy = cache_folder() / "copies" / f"{digest[:12]}-{stamp_file.name}"
        ann_file = annotations
        if not checked.report.of("error", framework):
            ann_file = _write_copy(checked, copy, classes, other_classes)
        categories = [(str(c.name), c.id) for c in sort_categories(checked.content.categories)]
        stamp = {
            "file": state,
            "digest": digest,
            "report": checked.report.as_dict(),
            "ann_file": ann_file,
            "categories": categories,
        }
        _write_stamp(stamp_file, stamp, checked, annotations, images)
        return Dataset(checked.report, ann_file, categories)


def _look_up(stamp_file: Path, annotations: str, images: str | None) -> Dataset | None:
    stamp, state = _read_stamp(stamp_file), _file_state(annotations)
    if not (stamp and _is_unchanged(stamp, annotations, images, state)):
        return None
    if stamp["file"] != state:
        with suppress(OSError):
            _write(stamp_file, json.dumps({**stamp, "file": state}).encode())
    report = Report.from_dict(stamp["report"])
    return Dataset(report, stamp["ann_file"], [tuple(c) for c in stamp["categories"]])


def _write_stamp(
    stamp_file: Path,
    stamp: dict[str, Any],
    checked: Checked,
    annotations: str,
    images: str | None,
) -> None:
    if any(finding.kind == "image-missing" for finding in checked.report.findings):
        return  # they may come to a place that nobody watches
    spelled = checked.mends.read["images", "file_name"]
    names = [spelled.get(i, image.file_name) for i, image in enumerate(checked.content.images)]
    folders = sorted({os.path.dirname(str(name)) for name in names})
    stamp |= {"folders": folders, "images": _folder_state(annotations, images, folders)}
    # Ids may be of odd types, and the disk full. Then the data is checked again next time.
    with suppress(TypeError, ValueError, OSError):
        _write(stamp_file, json.dumps(stamp).encode())


def _write_copy(
    checked: Checked, copy: Path, classes: Sequence[str] | None, other_classes: bool
) -> str:
    """Write a file that both frameworks read right, where the user's own is none."""
    content, mends = checked.content, checked.mends
    categories = _categories_in_order(content.categories, classes, other_classes)
    if not (content.rewritten or any(mends.read.values()) or categories is not None):
        return content.path
    whole = mended(content.path, mends, fix=False)
    if categories is not None:
        records = whole["categories"]
        whole["categories"] = [records[c] if isinstance(c, int) else c for c in categories]
    try:
        _write(copy, encode(whole))
    except OSError as error:
        raise ValueError(
            f"annotation file {content.path!r} has to be read from a copy, and {str(copy)!r} "
            f"cannot be written: {error.strerror}; DETECTION_PLUGINS_CACHE names another folder"
        ) from error
    return str(copy)


def _categories_in_order(
    categories: Sequence[Category], classes: Sequence[str] | None, other_classes: bool
) -> list[int | dict[str, Any]] | None:
    """List the categories to write, by their places, and new ones; None if they are right."""
    if classes is None:
        return None
    places = {category.name: i for i, category in enumerate(categories)}
    unused = count(max((c.id for c in categories if isinstance(c.id, int)), default=0) + 1)
    order: list[int | dict[str, Any]] = []
    for name in classes:
        order.append(places[name] if name in places else {"id": next(unused), "name": name})
    if other_classes:
        named = set(classes)
        order += [i for i, category in enumerate(categories) if category.name not in named]
    return None if order == list(range(len(categories))) else order


def _file_state(path: str) -> list[int]:
    try:
        return list(file_state(path))
    except OSError:
        return []


def _folder_state(annotations: str, images: str | None, folders: Sequence[str]) -> str:
    """Digest names, sizes and times of the files in the folders that the images are in."""
    own = os.path.abspath(annotations)
    digest = hashlib.blake2b(digest_size=16)
    for folder in folders if images else ():
        try:
            with os.scandir(os.path.join(images or "", folder)) as entries:
                files = sorted(
                    (entry.name, *_file_state(entry.path))
                    for entry in entries
                    if os.path.abspath(entry.path) != own
                )
        except OSError:
            files = []
        digest.update(repr((folder, files)).encode())
    return digest.hexdigest()


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with suppress(OSError), open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _is_unchanged(
    stamp: dict[str, Any], annotations: str, images: str | None, state: list[int]
) -> bool:
    if not os.path.isfile(stamp["ann_file"]) or not state:
        return False
    same = stamp["file"] == state or (
        stamp["file"][0] == state[0] and stamp["digest"] == _digest(annotations)
    )
    return same and stamp["images"] == _folder_state(annotations, images, stamp["folders"])


def _read_stamp(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)
