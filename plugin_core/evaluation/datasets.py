"""Checks of a dataset's files that read as little as possible of them."""

from __future__ import annotations

import json
import mmap
import os
import re

_EMPTY_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[\s*\]')


def check_coco_json(path: str, setting: str, *, needs_annotations: bool = False) -> None:
    """Check that ``path`` is a whole COCO-format annotation file that lists images.

    Args:
        path: of the JSON file.
        setting: setting that the user has to change, for the message.
        needs_annotations: whether the file must list annotations too, as for a training.

    Raises:
        ValueError: if the file is missing, empty or cut off, or one of its lists is empty.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{setting}: there is no annotation file {path!r}")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{setting}: annotation file {path!r} is empty; expected COCO-format JSON")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:64].lstrip()[:1] != b"{" or data[-64:].rstrip()[-1:] != b"}":
            raise ValueError(
                f"{setting}: annotation file {path!r} is no whole COCO-format JSON object "
                "(it must begin with '{' and end with '}')"
            )
        if not _EMPTY_LIST.search(data):
            return
    # Some list is empty. Only parsing tells whether it is one of the file's own lists.
    try:
        with open(path, encoding="utf-8") as text:
            content = json.load(text)
    except ValueError as error:
        raise ValueError(f"{setting}: annotation file {path!r} is no JSON: {error}") from error
    for key in ("images", "annotations") if needs_annotations else ("images",):
        if content.get(key) == []:
            raise ValueError(
                f"{setting}: annotation file {path!r} has an empty list of {key}; "
                "expected at least one entry"
            )
