"""Checks of image files: headers and ends are read, and whole files only where these look odd."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from plugin_core.datasets.coco_file import CocoFile
from plugin_core.datasets.findings import ERROR, NOTE, WARNING, Report, both
from plugin_core.datasets.mending import Mends
from plugin_core.datasets.records import image_name, number
from plugin_core.training.unreadable_images import ends_well

_STOP = both("stops when it loads the image, or takes grey pixels for it")
_ORIENTATION = 0x0112  # EXIF tag
_SWAPPED = (5, 6, 7, 8)  # orientations that exchange width and height
# Pillow's names of formats that OpenCV reads, too
_OF_OPENCV = {"JPEG", "MPO", "PNG", "BMP", "DIB", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000"}
_OF_OPENCV |= {"SUN", "AVIF"}
_OPENCVS_LIMIT = 2**30  # pixels; CV_IO_MAX_IMAGE_PIXELS
_PILLOWS_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or _OPENCVS_LIMIT)
_MANY = 2000  # files for which a progress bar is worth it
_T = TypeVar("_T")


@dataclass
class _File:
    """What an image file says of itself."""

    problem: str = ""
    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    mode: str = "RGB"
    frames: int = 1
    format: str = ""
    turned: str = ""  # how the frameworks turn it differently

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def shown(self) -> tuple[int, int]:
        """Size after turning as EXIF says, as both frameworks do."""
        width, height = self.size
        return (height, width) if self.orientation in _SWAPPED else self.size


def check_images(
    content: CocoFile, folder: str, report: Report, mends: Mends, *, decode: bool = False
) -> None:
    """Check the image files of a dataset, several at a time.

    Args:
        content: the annotation file.
        folder: that the file names are relative to.
        report: takes what is found.
        mends: takes names and sizes that can be said right.
        decode: read every image whole, not only its header and end; those of more pixels than
            Pillow's limit are never read whole.
    """
    if not os.path.isdir(folder):
        report.add(
            "image-folder",
            ERROR,
            f"no image folder {folder!r}",
            [],
            count=1,
            left=both("stops at the first image"),
            remedy="name the folder that the file names are relative to",
        )
        return
    names = _find_files(content, folder, report, mends)
    paths = [None if name is None else os.path.join(folder, name) for name in names]
    seen = look_at(paths, lambda path: _look(path, decode) if path else None, "images")
    _report_unreadable(content, seen, report)
    _report_sizes(content, seen, report, mends)
    _report_modes(content, seen, report)


def look_at(paths: Sequence[Any], look: Callable[[Any], _T], what: str) -> list[_T]:
    """Look at files, several at a time, without Pillow's warnings and its limit of pixels.

    Both are settings of the process. So they are set aside here, not in the threads.

    Args:
        paths: of the files.
        look: called with each path.
        what: the files are, for a progress bar.
    """
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers=8) as pool:
        warnings.simplefilter("ignore")  # of large images and odd metadata
        Image.MAX_IMAGE_PIXELS = None
        try:
            seen, hidden = pool.map(look, paths), len(paths) < _MANY
            return list(tqdm(seen, what, len(paths), leave=False, unit=" files", disable=hidden))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _find_files(content: CocoFile, folder: str, report: Report, mends: Mends) -> list[str | None]:
    """Find each image's file; one that is written in another way than on this disk is mended."""
    names: list[str | None] = []
    missing = []
    there = _listing(folder)
    for i, image in enumerate(content.images):
        name = image.file_name if isinstance(image.file_name, str) else None
        if name is not None and not (name in there or os.path.isfile(os.path.join(folder, name))):
            missing.append(i)
            name = None
        names.append(name)
    if not missing:
        return names
    found: dict[int, tuple[str, str]] = {}  # place → (what is left out in front, name)
    for i in missing:
        for left_out, candidate in _spellings(content.images[i].file_name):
            if candidate in there or os.path.isfile(os.path.join(folder, candidate)):
                found[i] = left_out, candidate
                break
    # Leaving out the same folder in front of many is no guess. Anything else may be.
    taken = {candidate for _, candidate in found.values()} | {name for name in names if name}
    apart = len(taken) == len(found) + len({name for name in names if name})
    if found and apart:
        common = Counter(left_out for left_out, _ in found.values()).most_common(1)[0][0]
        found = {i: pair for i, pair in found.items() if pair[0] == common}
        missing = [i for i in missing if i not in found]
        for i, (_, candidate) in found.items():
            names[i] = candidate
            mends.set("images", i, "file_name", candidate)
        report.add(
            "file-name-spelling",
            WARNING,
            "file names of another system or folder",
            [f"{content.images[i].file_name!r} is {name!r}" for i, (_, name) in found.items()],
            left=both("does not find the images"),
            mended="read",
        )
    lower = {unicodedata.normalize("NFC", name).lower(): name for name in there}
    hints = []
    for i in missing[:3]:
        near = os.path.basename(content.images[i].file_name.replace("\\", "/"))
        near = lower.get(unicodedata.normalize("NFC", near).lower(), "")
        hints.append(image_name(content, i) + (f" (there is {near!r})" if near else ""))
    report.add(
        "image-missing",
        ERROR,
        f"images that are not in {folder!r}",
        hints,
        count=len(missing),
        left=both("stops when it loads the image"),
        remedy=(
            "file names are relative to the image folder"
            if len(missing) == len(content.images)
            else "restore the files, or take the images out of the annotations"
        ),
    )
    return names


def _listing(folder: str) -> set[str]:
    """List the files of a folder itself; much faster than asking for each."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def _spellings(name: str) -> Iterator[tuple[str, str]]:
    """List other spellings of a path: separators, Unicode forms, without folders in front."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    for start in range(len(parts)):
        left_out, rest = "/".join(parts[:start]), "/".join(parts[start:])
        for form in ("NFC", "NFD"):
            yield left_out, unicodedata.normalize(form, rest)


def _look(path: str, decode: bool) -> _File:
    try:
        length = os.path.getsize(path)
        if not length:
            return _File("is empty (0 bytes)")
        with Image.open(path) as image:
            # Of a PNG without EXIF Pillow would read all pixels to look for it.
            as_text = "Raw profile type exif" in image.info
            has_exif = image.format != "PNG" or as_text or _has_exif_chunk(path)
            file = _File(
                size=image.size,
                mode=image.mode,
                frames=1 if image.format == "MPO" else getattr(image, "n_frames", 1),
                format=image.format or "",
            )
            orientation = image.getexif().get(_ORIENTATION, 1) if has_exif else 1
            if orientation in range(2, 9):
                if image.format == "TIFF":  # its size is that of the turned image
                    file.turned = "turns them twice"
                elif as_text:
                    file.turned = "turns them, and MMDetection does not"
                else:
                    file.orientation = orientation
            if file.pixels > _OPENCVS_LIMIT:
                return _File(f"has {file.pixels:,} pixels; at most {_OPENCVS_LIMIT:,} are read")
            if file.pixels <= _PILLOWS_LIMIT and (decode or not _ends_well(path, length)):
                image.load()
    except UnidentifiedImageError:
        with open(path, "rb") as stream:
            return _File(f"is no image (it begins with {stream.read(12)!r})")
    except Exception as error:  # Pillow's readers raise almost anything for a broken file
        return _File(f"is damaged ({' '.join(str(error).split())[:80]})")
    return file


def _has_exif_chunk(path: str) -> bool:
    """Tell whether a PNG has EXIF, wherever it stands, by the headers of its chunks."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            if header[4:] in (b"eXIf", b"IEND"):
                return header[4:] == b"eXIf"
            file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return False


def _ends_well(path: str, length: int) -> bool:
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(max(0, length - 64))
        return ends_well(start, file.read())


def _report_unreadable(content: CocoFile, seen: Sequence[_File | None], report: Report) -> None:
    bad = [(i, file.problem) for i, file in enumerate(seen) if file and file.problem]
    report.add(
        "image-unreadable",
        ERROR,
        "images that cannot be read",
        [f"{image_name(content, i)} {problem}" for i, problem in bad[:3]],
        count=len(bad),
        left=_STOP,
        remedy="restore the files, or take the images out of the annotations",
    )
    large = [i for i, file in enumerate(seen) if file and file.pixels > _PILLOWS_LIMIT]
    report.add(
        "image-unreadable",
        ERROR,
        f"images of more than {_PILLOWS_LIMIT:,} pixels, Pillow's limit",
        [image_name(content, i) for i in large],
        left={"detectron2": "stops when it loads the image"},
        remedy="cut or shrink the images, and their labels with them",
    )


def _report_sizes(
    content: CocoFile, seen: Sequence[_File | None], report: Report, mends: Mends
) -> None:
    turned, unknown, other = [], [], []
    no_size = []
    for i, file in enumerate(seen):
        image = content.images[i]
        if file is None or file.problem:
            if i in mends.sizes:
                no_size.append(i)
            continue
        if i in mends.sizes:
            mends.set("images", i, "width", file.shown[0])
            mends.set("images", i, "height", file.shown[1])
            if file.orientation in _SWAPPED:
                unknown.append(i)
            continue
        wanted = number(image.width), number(image.height)
        if wanted == file.shown:
            if file.orientation in range(2, 9) and file.shown == file.size:
                unknown.append(i)
        elif wanted == file.size:
            turned.append(i)
        else:
            other.append((i, file))
    _report_missing_sizes(content, mends, no_size, report)
    report.add(
        "exif-not-followed",
        ERROR,
        "images that EXIF turns, with labels of the image as it is stored",
        [image_name(content, i) for i in turned],
        left={
            "detectron2": "stops at an assertion about the size",
            "mmdetection": "turns the image and not its boxes",
        },
        remedy="label the image as a viewer shows it, or remove the tag (exiftool -Orientation= …)",
    )
    report.add(
        "exif",
        WARNING,
        "images that EXIF turns, where sizes do not tell whether the labels were turned, too",
        [image_name(content, i) for i in unknown],
        left=both("turns the image and not its boxes"),
        remedy="look at one of them (exiftool -Orientation= … removes the tag)",
    )
    report.add(
        "image-size",
        ERROR,
        "images of another size than the file says",
        [
            f"{image_name(content, i)} is {file.shown[0]}×{file.shown[1]}, not "
            f"{content.images[i].width}×{content.images[i].height}"
            for i, file in other
        ],
        left={
            "detectron2": "stops when it loads the image",
            "mmdetection": "trains on boxes of another scale",
        },
        remedy="label the images that are there, or put those back that were labelled",
    )


def _report_missing_sizes(
    content: CocoFile, mends: Mends, unread: Sequence[int], report: Report
) -> None:
    left = both("stops with a KeyError while it loads the file")
    report.add(
        "no-size",
        NOTE,
        "images without width and height",
        [image_name(content, i) for i in sorted(mends.sizes - set(unread))],
        left=left,
        mended="read",
    )
    report.add(
        "no-size-unread",
        ERROR,
        "images without width and height that cannot be read either",
        [image_name(content, i) for i in unread],
        left=left,
        remedy="set width and height in pixels",
    )


def _report_modes(content: CocoFile, seen: Sequence[_File | None], report: Report) -> None:
    places: dict[str, list[int]] = defaultdict(list)
    modes: Counter[str] = Counter()
    for i, file in enumerate(seen):
        if file is None or file.problem:
            continue
        if file.mode.startswith("I"):
            places["deep"].append(i)
        elif file.mode == "F":
            places["float"].append(i)
        elif file.mode not in ("RGB", "YCbCr"):
            modes[file.mode] += 1
            places["mode"].append(i)
        if file.frames > 1:
            places["frames"].append(i)
        if file.turned:
            places[file.turned].append(i)
        if file.format and file.format not in _OF_OPENCV:
            places["format"].append(i)

    def named(key: str) -> list[str]:
        return [image_name(content, i) for i in places[key]]

    rest: dict[str, Any] = {"remedy": "write the images with 8 bits for each colour"}
    report.add(
        "image-16-bit",
        ERROR,
        "images of 16 or 32 bits for each pixel",
        named("deep"),
        left={"detectron2": "sees nearly all pixels white, as it cuts values at 255"},
        **rest,
    )
    report.add(
        "image-float",
        ERROR,
        "images of floating-point pixels",
        named("float"),
        left=both("sees them black or white"),
        **rest,
    )
    for kind, left in (
        ("exif-tiff", "turns them twice"),
        ("exif-text", "turns them, and MMDetection does not"),
    ):
        report.add(
            kind,
            ERROR,
            "images with an orientation that the frameworks do not read alike",
            named(left),
            left={"detectron2": left},
            remedy="write the pixels as they are shown, without an orientation",
        )
    report.add(
        "image-format",
        ERROR,
        "images of a format that OpenCV does not read",
        named("format"),
        left={"mmdetection": "stops when it loads the image"},
        remedy="write them as JPEG or PNG",
    )
    report.add(
        "image-frames",
        WARNING,
        "images of several frames or pages",
        named("frames"),
        left={
            "detectron2": "takes the first frame",
            "mmdetection": "takes the first frame, or cannot read the format",
        },
    )
    kinds = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
    report.add(
        "image-mode",
        NOTE,
        f"images of other pixels than RGB ({kinds})",
        named("mode"),
        left=both("makes RGB of them; transparency is left out"),
    )
