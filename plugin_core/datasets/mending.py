"""Writing an annotation file again with what can be mended without guessing."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from plugin_core.datasets.coco_file import encode, read_records
from plugin_core.files import replacing


class Mends:
    """Changes of a file's records.

    Attributes:
        read: new values that say the same in another way, by list and key, then by place. Both
            trainings read a file with them.
        fixed: new values that change the data, such as clipped boxes. Only a fix has them.
        dropped: places of records that a fix leaves out, by list.
        sizes: places of images whose size has to be read from the image file.
        texts: names of records whose numbers are texts.
    """

    def __init__(self) -> None:
        self.read: defaultdict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
        self.fixed: defaultdict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
        self.dropped: defaultdict[str, set[int]] = defaultdict(set)
        self.sizes: set[int] = set()
        self.texts: list[str] = []

    def set(self, records: str, place: int, key: str, value: Any) -> None:
        """Say a value in the way that both frameworks read."""
        self.read[records, key][place] = value

    def fix(self, records: str, place: int, key: str, value: Any) -> None:
        """Change a value, in a fix only."""
        self.fixed[records, key][place] = value

    def drop(self, records: str, *places: int) -> None:
        """Leave records out, in a fix only."""
        self.dropped[records].update(places)

    def summary(self) -> list[str]:
        """List what a fix changes, in words."""
        lines = []
        for source in (self.read, self.fixed):
            for (records, key), values in source.items():
                if values:
                    lines.append(f"{key} of {len(values):,} {records} set")
        lines += [
            f"{len(places):,} {records} left out"
            for records, places in self.dropped.items()
            if places
        ]
        return lines


def mended(path: str, mends: Mends, *, fix: bool) -> dict[str, Any]:
    """Read a file with its changes.

    Args:
        path: of the annotation file, which stays as it is.
        mends: the changes.
        fix: make the changes of a fix, too; otherwise only those that say the same.

    Returns:
        The content, for :func:`plugin_core.datasets.coco_file.encode`.
    """
    content = read_records(path)
    content.setdefault("annotations", [])
    for (records, key), values in mends.read.items():
        for place, value in values.items():
            content[records][place][key] = value
    if fix:
        for (records, key), values in mends.fixed.items():
            for place, value in values.items():
                content[records][place][key] = value
        for records, places in mends.dropped.items():
            content[records] = [r for i, r in enumerate(content[records]) if i not in places]
    return content


def write_fixed(path: str, mends: Mends, out: str) -> list[str]:
    """Write a mended copy of an annotation file, whole or not at all.

    Returns:
        What was done, in words.

    Raises:
        ValueError: if the copy would take the place of a file that exists, or cannot be written.
    """
    if os.path.exists(out):
        raise ValueError(f"--fix: {out!r} exists; name a new file")
    content = encode(mended(path, mends, fix=True))
    try:
        with replacing(out) as file:
            file.write(content)
    except OSError as error:
        raise ValueError(f"--fix: {out!r} cannot be written: {error.strerror}") from error
    return mends.summary()
