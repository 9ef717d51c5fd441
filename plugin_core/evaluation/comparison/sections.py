"""What every part of a comparison hands over to the writers of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | float | None


@dataclass(frozen=True)
class Table:
    """A table of texts and numbers.

    Attributes:
        title: above it.
        headers: of the columns.
        rows: cells. None and NaN are "nothing to measure", an integer is a count.
        note: below it, in one paragraph.
        decimals: of the numbers that are no integers.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    decimals: int = 1


@dataclass(frozen=True)
class Figure:
    """A picture, as the content of a PNG file."""

    title: str
    png: bytes
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: plain text; an empty line starts a new paragraph.
        tables: in order.
        figures: in order, after the tables.
        data: values for report.json, that JSON or numpy can hold.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
