"""Writing a comparison as Markdown, HTML, JSON, LaTeX and pictures, and shortly for a terminal."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from plugin_core.evaluation.comparison.sections import Section, Table
from plugin_core.files import replacing

LONG = 25  # rows of a table that HTML shows only on demand
_NUMBER = re.compile(r"(< )?-?\d+\.\d+( ± \d+\.\d+)?")  # "< 0.001", "41.2 ± 0.3"


@dataclass(frozen=True)
class Report:
    """A comparison of detectors.

    Args:
        title: of the report.
        verdict: its first lines, plain text.
        sections: in order; the first table of the first one is the short table.
        settings: of the comparison, by name.
    """

    title: str
    verdict: str
    sections: Sequence[Section]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write report.md, report.html, report.json, tables.tex and figures/*.png.

        Each file is written whole or not at all, and all of them are made before the first is
        written. Figures of an earlier report in the folder are removed.

        Args:
            folder: made if it is missing.
        """
        files = {
            f"figures/{name}": section.figures[i].png
            for section, names in zip(self.sections, self._figures(), strict=True)
            for i, name in enumerate(names)
        }
        for name, text in {
            "report.md": self.markdown(),
            "report.html": self.html(),
            "report.json": self.json(),
            "tables.tex": self.latex(),
        }.items():
            files[name] = f"{text}\n".encode()
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with replacing(folder / name) as file:
                file.write(data)
        for earlier in (folder / "figures").glob("[0-9][0-9]-*.png"):
            if f"figures/{earlier.name}" not in files:
                earlier.unlink()

    def terminal(self) -> str:
        """Return the title, the verdict and the short table."""
        parts = [self.title, self.verdict]
        tables = [table for section in self.sections[:1] for table in section.tables[:1]]
        parts += [_lay_out(table, "simple", str) for table in tables]
        return "\n\n".join(part for part in parts if part)

    def markdown(self) -> str:
        """Return the report as Markdown; it shows the pictures of the folder figures."""
        parts = [f"# {_markdown(self.title)}", *map(_bold, self.verdict.splitlines())]
        for section, names in zip(self.sections, self._figures(), strict=True):
            parts += [f"## {_markdown(section.title)}", *map(_markdown, _paragraphs(section.text))]
            for table in section.tables:
                parts += [f"### {_markdown(table.title)}", _lay_out(table, "github", _markdown)]
                parts.append(_markdown(table.note))
            for figure, name in zip(section.figures, names, strict=True):
                parts.append(f"### {_markdown(figure.title)}")
                parts.append(f"![{_markdown(figure.title)}](figures/{name})")
                parts.append(_markdown(figure.note))
        if self.settings:
            parts += ["## Settings", _lay_out(self._settings(), "github", _markdown)]
        return "\n\n".join(part for part in parts if part)

    def html(self) -> str:
        """Return the report as one HTML page that loads nothing, with the pictures in it."""
        contents, body = [], []
        sections = [*self.sections]
        if self.settings:
            sections.append(Section("Settings", tables=[self._settings()]))
        for number, section in enumerate(sections, 1):
            heading = html.escape(section.title)
            contents.append(f'<li><a href="#s{number}">{heading}</a></li>')
            body.append(f'<section id="s{number}">\n<h2>{heading}</h2>')
            body += [f"<p>{html.escape(text)}</p>" for text in _paragraphs(section.text)]
            body += [_html_table(table) for table in section.tables]
            for figure in section.figures:
                title, note = html.escape(figure.title), html.escape(figure.note)
                data = base64.b64encode(figure.png).decode()
                body.append(
                    f'<figure>\n<img src="data:image/png;base64,{data}" alt="{title}">\n'
                    f"<figcaption><strong>{title}</strong> {note}</figcaption>\n</figure>"
                )
            body.append("</section>")
        title, verdict = html.escape(self.title), html.escape(self.verdict)
        return _PAGE.format(
            title=title, verdict=verdict, contents="\n".join(contents), body="\n".join(body)
        )

    def json(self) -> str:
        """Return all that was measured as JSON; null where there is no number."""
        content = {
            "title": self.title,
            "verdict": self.verdict,
            "settings": self.settings,
            "sections": [
                {
                    "title": section.title,
                    "text": section.text,
                    "tables": [
                        {"title": t.title, "headers": t.headers, "rows": t.rows, "note": t.note}
                        for t in section.tables
                    ],
                    "figures": [
                        {"title": figure.title, "file": f"figures/{name}", "note": figure.note}
                        for figure, name in zip(section.figures, names, strict=True)
                    ],
                    "data": section.data,
                }
                for section, names in zip(self.sections, self._figures(), strict=True)
            ],
        }
        return json.dumps(_plain(content), indent=2, allow_nan=False)

    def latex(self) -> str:
        r"""Return the tables for \input into a document that loads booktabs."""
        parts = [r"% Needs \usepackage{booktabs}"]
        taken: dict[str, int] = {}
        for section in self.sections:
            for table in section.tables:
                label = _slug(table.title)
                taken[label] = taken.get(label, 0) + 1
                if taken[label] > 1:
                    label += f"-{taken[label]}"
                parts.append(_latex_table(table, label))
        return "\n\n".join(parts)

    def _figures(self) -> list[list[str]]:
        """Name the file of each section's figures."""
        result, number = [], 0
        for section in self.sections:
            names = []
            for figure in section.figures:
                number += 1
                names.append(f"{number:02}-{_slug(figure.title)}.png")
            result.append(names)
        return result

    def _settings(self) -> Table:
        rows = [
            [name, value if isinstance(value, str) else json.dumps(_plain(value))]
            for name, value in self.settings.items()
        ]
        return Table("Settings of this comparison", ["setting", "value"], rows)


def cell(value: Any, decimals: int) -> str:
    """Write a cell of a table: "-" for None and NaN, no sign before a rounded 0."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    return f"{round(float(value), decimals) + 0.0:.{decimals}f}"


def _cells(table: Table, escape: Callable[[str], str]) -> list[list[str]]:
    return [[escape(cell(value, table.decimals)) for value in row] for row in table.rows]


def _numeric(table: Table) -> list[bool]:
    """Tell which columns hold numbers alone, as texts or not, and belong to the right."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.headers))]
    return [
        bool(column)
        and all(not isinstance(value, str) or _NUMBER.fullmatch(value) for value in column)
        for column in columns
    ]


def _lay_out(table: Table, form: str, escape: Callable[[str], str]) -> str:
    headers = [escape(header) for header in table.headers]
    if not table.rows:
        return tabulate([], headers, form)
    align = ["right" if numeric else "left" for numeric in _numeric(table)]
    cells = _cells(table, escape)
    return tabulate(cells, headers, form, disable_numparse=True, colalign=align)


def _html_table(table: Table) -> str:
    numeric = [' class="number"' if right else "" for right in _numeric(table)]
    headers = zip(table.headers, numeric, strict=True)
    head = "".join(f'<th scope="col"{kind}>{html.escape(x)}</th>' for x, kind in headers)
    rows = []
    for first, *others in _cells(table, html.escape):
        values = zip(others, numeric[1:], strict=True)
        data = "".join(f"<td{kind}>{value}</td>" for value, kind in values)
        rows.append(f'<tr><th scope="row"{numeric[0]}>{first}</th>{data}</tr>')
    title = html.escape(table.title)
    lines = [
        '<div class="wide">',
        f"<table>\n<caption>{title}</caption>",
        f"<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>",
        *rows,
        "</tbody>\n</table>\n</div>",
    ]
    if len(rows) > LONG:
        summary = f"<summary>{title} ({len(rows):,} rows)</summary>"
        lines = ["<details>", summary, *lines, "</details>"]
    if table.note:
        lines.append(f'<p class="note">{html.escape(table.note)}</p>')
    return "\n".join(lines)


def _latex_table(table: Table, label: str) -> str:
    columns = "".join("r" if numeric else "l" for numeric in _numeric(table))
    rows = [" & ".join(row) + r" \\" for row in _cells(table, _latex)]
    caption = _latex(f"{table.title}. {table.note}".strip())
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{label}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(_latex(header) for header in table.headers) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _bold(text: str) -> str:
    return f"**{_markdown(text)}**" if text else ""


def _markdown(text: str) -> str:
    """Escape what Markdown or HTML in it would take for its own, and line breaks."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


_LATEX = {
    **{character: rf"\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "→": r"$\rightarrow$",
    "²": "$^2$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def _slug(title: str) -> str:
    """Make a short file name or label of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "untitled"


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
 max-width: 62rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }}
h1 {{ line-height: 1.2; margin-bottom: 0.5rem; }}
h1, p, figcaption {{ overflow-wrap: anywhere; }}
h2 {{ margin-top: 3rem; padding-bottom: 0.25rem; border-bottom: 1px solid #ccc; }}
.verdict {{ font-size: 1.15rem; padding: 0.75rem 1rem; background: #eef4fb;
 border-left: 4px solid #2b6cb0; white-space: pre-line; }}
.verdict:empty {{ display: none; }}
nav ul {{ columns: 2; padding-left: 1.2rem; }}
a {{ color: #2b5f9e; }}
.wide {{ overflow-x: auto; margin-top: 1.5rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: 0.4rem; }}
th, td {{ padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; vertical-align: top; }}
thead th {{ border-top: 2px solid #1b1b1b; border-bottom: 1px solid #1b1b1b; }}
tbody th {{ font-weight: normal; }}
tbody tr:nth-child(even) {{ background: #f6f6f6; }}
tbody tr:last-child > * {{ border-bottom: 2px solid #1b1b1b; }}
.number {{ text-align: right; white-space: nowrap; }}
.note, figcaption {{ color: #555; font-size: 0.85rem; margin-top: 0.4rem; }}
figure {{ margin: 1.5rem 0; }}
img {{ max-width: 100%; height: auto; }}
summary {{ cursor: pointer; margin-top: 1.5rem; font-weight: 600; }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="verdict">{verdict}</p>
</header>
<nav aria-label="Contents">
<ul>
{contents}
</ul>
</nav>
<main>
{body}
</main>
</body>
</html>"""
