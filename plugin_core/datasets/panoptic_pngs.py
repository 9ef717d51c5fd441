"""Checks of a panoptic dataset's PNGs: all headers and ends, and the pixels of the first ones."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image as Images

from plugin_core.datasets.coco_file import Image
from plugin_core.datasets.images import look_at
from plugin_core.datasets.panoptic_file import PanopticFile, finite, is_segment_id

DECODED = 16  # PNGs whose pixels are compared with the segments
_MODES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with transparency", 6: "RGBA"}


class _Png(NamedTuple):
    """What a PNG says of itself."""

    width: int = 0
    height: int = 0
    depth: int = 8
    color: int = 2
    problem: str = ""


def check_pngs(content: PanopticFile, folder: str, *, decode: bool = False) -> None:
    """Check the PNGs of a panoptic dataset, several at a time.

    Args:
        content: the annotation file, with the images of its records looked up.
        folder: that the records' file names are relative to.
        decode: compare all pixels with the segments, not those of the first 16 PNGs alone.
    """
    if not os.path.isdir(folder):
        content.add("png-folder", [folder], repr)
        return
    named = ((i, record.file_name) for i, record in enumerate(content.records))
    names = {i: name for i, name in named if isinstance(name, str) and name}
    paths = [os.path.join(folder, name) for name in names.values()]
    seen = look_at(paths, _look, "PNGs")
    missing, bad, other_size, other_mode, right = [], [], [], [], []
    for i, path, png in zip(names, paths, seen, strict=True):
        image = content.file.images[content.image[i]] if content.image[i] >= 0 else Image()
        size = finite(image.width), finite(image.height)
        if png is None:
            missing.append(i)
        elif png.problem:
            bad.append((i, png.problem))
        elif (png.depth, png.color) != (8, 2):
            other_mode.append((i, f"{_MODES.get(png.color, 'unknown')}, {png.depth} bits"))
        elif None not in size and size != (png.width, png.height):
            other_size.append((i, f"{png.width}×{png.height}"))
        else:
            right.append((i, path))
    bad += _compare(content, right if decode else right[:DECODED])
    content.add("png-missing", missing, content.record_name)
    for kind, odd in (
        ("png-unreadable", bad),
        ("png-mode", other_mode),
        ("png-size", other_size),
    ):
        content.add(kind, odd, lambda pair: f"{content.record_name(pair[0])} ({pair[1]})")


def _look(path: str) -> _Png | None:
    """Read the header and the end of a PNG; None if there is no file."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            start = file.read(26)
            file.seek(max(0, os.path.getsize(path) - 64))
            whole = b"IEND" in file.read()
    except (OSError, ValueError) as error:
        return _Png(problem=f"cannot be opened: {error}")
    if not start:
        return _Png(problem="is empty")
    if len(start) < 26 or not start.startswith(b"\x89PNG\r\n\x1a\n"):
        return _Png(problem=f"is no PNG: it begins with {start[:12]!r}")
    width, height, depth, color = struct.unpack(">IIBB", start[16:])
    return _Png(width, height, depth, color, "" if whole else "is cut off")


def _compare(content: PanopticFile, pngs: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Compare pixels with segments; returns the places of PNGs that cannot be decoded, and why."""
    bad, unlisted, empty, areas = [], [], [], []
    for i, path in pngs:
        try:
            with Images.open(path) as image:
                pixels = np.asarray(image.convert("RGB"), np.int64) @ [1, 256, 256**2]
        except Exception as error:  # Pillow's readers raise almost anything for a broken file
            bad.append((i, f"is damaged: {' '.join(str(error).split())[:80]}"))
            continue
        ids, numbers = np.unique(pixels, return_counts=True)
        counts = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
        listed = {0}
        for at in range(*np.searchsorted(content.owner, [i, i + 1])):
            segment = content.file.annotations[at]
            if not is_segment_id(segment.id):
                continue
            listed.add(int(segment.id))
            count, area = counts.get(int(segment.id), 0), finite(segment.area)
            if not count:
                empty.append(at)
            elif area is not None and abs(area - count) > 1:
                areas.append((at, f"{area:,} for {count:,} pixels"))
        unlisted += [f"{value} in {content.record_name(i)}" for value in counts.keys() - listed]
    content.add("unlisted-pixels", unlisted, str)
    content.add("empty-segment", empty, content.segment_name)
    content.add("area-of-pixels", areas, lambda p: f"{content.segment_name(p[0])} ({p[1]})")
    return bad
