"""Reading COCO-format annotation files: fast, tolerant of odd values, strict about encodings."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

# What a field holds that a record lacks
UNSET = msgspec.UNSET

_CONSTANT = re.compile(rb"-?Infinity|NaN")
_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Image(msgspec.Struct, gc=False):
    """A record of ``images``; every field may hold any JSON value."""

    id: Any = UNSET
    file_name: Any = UNSET
    width: Any = UNSET
    height: Any = UNSET
    coco_url: Any = UNSET


class Annotation(msgspec.Struct, gc=False):
    """A record of ``annotations``; every field may hold any JSON value."""

    id: Any = UNSET
    image_id: Any = UNSET
    category_id: Any = UNSET
    bbox: Any = UNSET
    area: Any = UNSET
    iscrowd: Any = UNSET
    ignore: Any = UNSET
    keypoints: Any = UNSET
    num_keypoints: Any = UNSET
    # Parsed when it is looked at: most of a file are polygons.
    segmentation: msgspec.Raw | msgspec.UnsetType = UNSET


class Category(msgspec.Struct):
    """A record of ``categories``; every field may hold any JSON value."""

    id: Any = UNSET
    name: Any = UNSET
    supercategory: Any = UNSET
    keypoints: Any = UNSET


_KINDS: dict[str, type] = {"images": Image, "annotations": Annotation, "categories": Category}


@dataclass
class CocoFile:
    """The content of an annotation file.

    Attributes:
        path: of the file.
        images: its records, without those that are no objects.
        annotations: likewise.
        categories: likewise.
        absent: those of the three lists that the file lacks.
        not_objects: places in a list that hold something else than an object, by list.
        rewritten: why the file cannot be read as it is by the frameworks, such as "a byte-order
            mark"; empty if it can.
    """

    path: str
    images: list[Image] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    not_objects: dict[str, list[int]] = field(default_factory=dict)
    rewritten: str = ""


def read_coco(path: str) -> CocoFile:
    """Read a COCO-format annotation file.

    Raises:
        ValueError: if the file is missing, empty, cut off, in another encoding than UTF-8, or no
            JSON object; says where.
    """
    data, rewritten = read_text(path)
    lists = split_lists(path, data)
    content = CocoFile(path, rewritten=rewritten)
    for name, kind in _KINDS.items():
        if name not in lists:
            content.absent.append(name)
            continue
        records, others = read_list(path, name, lists[name], kind)
        setattr(content, name, records)
        if others:
            content.not_objects[name] = others
    return content


def read_categories(path: str) -> list[Category]:
    """Read the categories of an annotation file alone; raises ValueError as :func:`read_coco`."""
    lists = split_lists(path, read_text(path)[0])
    if "categories" not in lists:
        return []
    return read_list(path, "categories", lists["categories"], Category)[0]


def check_whole(path: str) -> None:
    """Check the first and last letter of a JSON object, for files of which no more is known.

    Raises:
        ValueError: if the file is missing, empty or cut off.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no annotation file {path!r}")
    with open(path, "rb") as file:
        first = file.read(64).lstrip()[:1]
        file.seek(max(0, os.path.getsize(path) - 64))
        last = file.read().rstrip()[-1:]
    if (first, last) != (b"{", b"}"):
        raise ValueError(
            f"annotation file {path!r} is no whole JSON object "
            "(it must begin with '{' and end with '}')"
        )


_OTHERS = {
    b"\x1f\x8b": "compressed by gzip; unpack it (gunzip)",
    b"pk\x03\x04": "a zip archive; unpack it",
    b"<!doctype html": "a web page, not JSON; download the file itself",
    b"<html": "a web page, not JSON; download the file itself",
    b"<?xml": "XML, not JSON; export it in COCO's format",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
}


def read_text(path: str) -> tuple[bytes, str]:
    """Read a file of UTF-8, and say what has to go before other programs can read it.

    Raises:
        ValueError: if the file is missing, empty, or in another encoding; names the encoding.
    """
    if os.path.isdir(path):
        raise ValueError(f"annotation file {path!r} is a folder")
    if not os.path.isfile(path):
        raise ValueError(f"there is no annotation file {path!r}")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"annotation file {path!r} cannot be read: {error.strerror}") from error
    return check_text(data, f"annotation file {path!r}")


def check_text(data: bytes, what: str) -> tuple[bytes, str]:
    """Check that a file's content is UTF-8, as :func:`read_text` does; ``what`` names the file."""
    if not data.strip():
        raise ValueError(f"{what} is empty; expected JSON")
    for start, kind in _OTHERS.items():
        if data[:64].lstrip().lower().startswith(start):
            raise ValueError(f"{what} is {kind}")
    for bom, name in _BOMS.items():
        if data.startswith(bom):
            raise ValueError(f"{what} is in {name}; write it as UTF-8: iconv -f {name} -t UTF-8")
    first, second = data[:1000:2], data[1:1000:2]
    for name, zeros, letters in (("UTF-16BE", first, second), ("UTF-16LE", second, first)):
        if 2 * zeros.count(0) > len(zeros) > 2 * letters.count(0):
            raise ValueError(f"{what} is in {name}; write it as UTF-8: iconv -f {name} -t UTF-8")
    try:
        _check_utf8(data)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not in UTF-8: byte {error.start} is 0x{data[error.start]:02x}, as in "
            "Latin-1, Windows-1252, GBK or Shift-JIS; write it as UTF-8: "
            "iconv -f ENCODING -t UTF-8"
        ) from None
    if data.startswith(codecs.BOM_UTF8):
        return data[len(codecs.BOM_UTF8) :], "a byte-order mark"
    return data, ""


def _check_utf8(data: bytes, step: int = 1 << 24) -> None:
    """Check in pieces, as a text of the whole would take much memory."""
    if data.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        try:
            decoder.decode(piece, final=start + step >= len(data))
        except UnicodeDecodeError as error:
            # The decoder may hold the first bytes of a letter from the piece before.
            at = start + error.start - (len(error.object) - len(piece))
            raise UnicodeDecodeError("utf-8", data, max(at, 0), at + 1, error.reason) from None


def split_lists(path: str, data: bytes) -> dict[str, msgspec.Raw]:
    """Parse an object's outermost level; raises ValueError if it is none."""
    try:
        return _decode(path, data, dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        kind = type(_decode(path, data, Any)).__name__
        raise ValueError(
            f"annotation file {path!r} holds a {kind}; COCO's format is an object with lists of "
            "images, annotations and categories"
        ) from None
    except ValueError:
        if (standard := _without_constants(data)) == data:
            raise
        return split_lists(path, standard)


def _without_constants(data: bytes) -> bytes:
    """Write null for NaN and Infinity, which Python writes into JSON, where they are no text."""
    plain = data.replace(rb"\\", b"__").replace(rb"\"", b"__")  # quotes are those around texts
    pieces, start, at, quotes = [], 0, 0, 0
    for match in _CONSTANT.finditer(plain):
        quotes += plain.count(b'"', at, at := match.start())
        if quotes % 2 == 0:
            pieces += [data[start:at], b"null"]
            start = match.end()
    return b"".join([*pieces, data[start:]])


def _decode(path: str, data: bytes | msgspec.Raw, kind: Any) -> Any:
    """Parse JSON; raises ValueError that names the file, and ValidationError for another kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        if isinstance(error, msgspec.ValidationError) and kind is not Any:
            raise
        reason = _explain(bytes(data), error)
        raise ValueError(f"annotation file {path!r} is no JSON: {reason}") from error


def _explain(data: bytes, reason: Exception) -> str:
    """Say where a JSON text is broken."""
    if "truncated" in str(reason):
        return (
            f"it is cut off after {len(data):,} bytes, at {data[-30:].decode(errors='replace')!r}"
        )
    position = re.search(r"byte (\d+)", str(reason))
    if not position:
        return str(reason)
    at = int(position[1])
    line = data.count(b"\n", 0, at) + 1
    near = data[max(at - 15, 0) : at + 15].decode(errors="replace")
    return f"an unexpected character in line {line}, byte {at}, near {near!r}"


def read_list(path: str, name: str, value: Any, kind: type) -> tuple[list[Any], list[int]]:
    """Parse a list of records; returns them, and the places of what is no object.

    Raises:
        ValueError: if ``value`` is no list, or no JSON.
    """
    if isinstance(value, msgspec.Raw):
        try:
            return _decode(path, value, list[kind]), []  # type: ignore[valid-type]
        except msgspec.ValidationError:
            value = _decode(path, value, Any)
    if not isinstance(value, list):
        raise ValueError(
            f"annotation file {path!r}: {name} is a {type(value).__name__}; expected a list"
        )
    fields = kind.__struct_fields__  # type: ignore[attr-defined]
    records, others = [], []
    for place, record in enumerate(value):
        if isinstance(record, dict):
            records.append(kind(**{key: record[key] for key in fields if key in record}))
        else:
            others.append(place)
    return records, others


_POLYGONS = msgspec.json.Decoder(list[list[float]])


def polygons_of(annotation: Annotation) -> list[list[float]] | None:
    """Parse the mask of an annotation if it is a list of lists of numbers, and nothing else."""
    raw = annotation.segmentation
    try:
        return _POLYGONS.decode(raw) if isinstance(raw, msgspec.Raw) else None
    except msgspec.DecodeError:
        return None


def segmentation_of(annotation: Annotation) -> Any:
    """Parse the mask of an annotation: polygons, RLE, or whatever there is; None without one.

    What is no JSON, or has numbers past the range of float, is True.
    """
    raw = annotation.segmentation
    if isinstance(raw, msgspec.Raw):
        try:
            return msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            return True
    return None if raw is UNSET else raw


def read_records(path: str) -> dict[str, Any]:
    """Read a whole file for writing it again: lists of mappings, whose values stay unparsed.

    Raises:
        ValueError: as :func:`read_coco` does.
    """
    content: dict[str, Any] = dict(split_lists(path, read_text(path)[0]))
    record = list[dict[str, msgspec.Raw]]
    for name in _KINDS:
        if isinstance(content.get(name), msgspec.Raw):
            content[name] = _decode(path, content[name], record)
    return content


def encode(content: Mapping[str, Any]) -> bytes:
    """Write a file's content as JSON."""
    try:
        return msgspec.json.encode(content)
    except (TypeError, ValueError):  # integers of more than 64 bits
        return json.dumps(content, ensure_ascii=False).encode()


def class_names(categories: Iterable[Category]) -> list[str]:
    """List the names of a file's classes, by the order of their ids, as Detectron2 does."""
    return [str(category.name) for category in sort_categories(categories)]


def sort_categories(categories: Iterable[Category]) -> Sequence[Category]:
    """Sort categories by id: numbers, then texts, then whatever is no id."""

    def key(category: Category) -> tuple[int, Any]:
        value = category.id
        if isinstance(value, str):
            return 1, value
        return (0, value) if isinstance(value, (int, float)) else (2, 0)

    return sorted(categories, key=key)
