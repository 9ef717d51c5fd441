#!/usr/bin/env python
"""Count parameters and GFLOPs of every row of configs/README.md anew, and write what differs.

    docs/model_zoo.py                    count all rows, which takes long
    docs/model_zoo.py --check            write nothing; end with status 1 if a number differs
    docs/model_zoo.py --only r18 ssd     rows whose config has one of these in its path

Needs the frameworks of the rows. A row without a number of parameters is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plugin_core.inspection.config_kinds import side_of
from plugin_core.inspection.cost import Report
from plugin_core.inspection.opening import count

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "configs" / "README.md"
_CONFIG = re.compile(r"`tools/\w+\.py (?:--config-file )?(configs/\S+)`")


@dataclass(frozen=True)
class Row:
    """A config's line of a table.

    Args:
        line: number of the line, from 0.
        config: path below the repository.
        cells: texts by their columns' heads.
    """

    line: int
    config: str
    cells: dict[str, str]


def read_rows(text: str) -> list[Row]:
    """Find the rows that have a number of parameters."""
    rows, heads = [], []
    for number, line in enumerate(text.splitlines()):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        config = _CONFIG.search(line)
        if not cells:
            heads = []
        elif not heads:
            heads = cells
        elif config and dict(zip(heads, cells, strict=True)).get("parameters"):
            rows.append(Row(number, config[1], dict(zip(heads, cells, strict=True))))
    return rows


def count_row(row: Row) -> Report:
    """Count a row's config at its test size, or where it names none at the row's."""
    config = str(ROOT / row.config)
    side = side_of(config)
    try:
        return count(side, config, None, activations=False)
    except ValueError as error:
        if "say for which size to count" not in str(error):
            raise
    height, width = map(int, row.cells["image"].split("×"))
    return count(side, config, (height, width), activations=False)


def counted(row: Row, report: Report) -> dict[str, str]:
    """Write a row's cells with the numbers of a report."""
    is_classifier = row.config.startswith("configs/mmpretrain/")
    digits, digits_of_part = (3, 3) if is_classifier else (1, 2)
    cells = dict(row.cells)
    height, width = report.image_size
    for head in cells:
        if head == "parameters":
            cells[head] = f"{report.total.parameters:,}"
        elif head == "GFLOPs":
            cells[head] = f"{report.total.flops / 1e9:.{digits}f}"
        elif head == "image":
            cells[head] = f"{height}×{width}"
        elif head.startswith("of them"):
            flops = report.attention.flops
            part = f"{flops / 1e9:.{digits_of_part}f}" if flops else "0"
            cells[head] = f"{report.attention.parameters:,}; {part}"
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Count, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="of the configs' paths")
    args = parser.parse_args(argv)
    lines = README.read_text(encoding="utf-8").splitlines()
    rows = [
        row
        for row in read_rows("\n".join(lines))
        if not args.only or any(text in row.config for text in args.only)
    ]
    differing, start = 0, time.monotonic()
    for number, row in enumerate(rows, 1):
        cells = counted(row, count_row(row))
        told = [
            f"{head} {row.cells[head]} -> {cell}"
            for head, cell in cells.items()
            if cell != row.cells[head]
        ]
        minutes = (time.monotonic() - start) / 60
        print(
            f"[{number}/{len(rows)}, {minutes:.1f} min] {row.config}: {', '.join(told) or 'same'}"
        )
        sys.stdout.flush()
        if told:
            differing += 1
            lines[row.line] = f"| {' | '.join(cells.values())} |"
    print(f"{len(rows)} rows, {differing} differ")
    if differing and not args.check:
        README.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if differing and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
