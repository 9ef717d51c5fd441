"""The files that a comparison is written to."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from plugin_core.evaluation.comparison.report import Report, cell
from plugin_core.evaluation.comparison.sections import Figure, Section, Table

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
ODD = "<b>50% & $x$_|`*\\"
VOID = {"meta", "img", "br", "hr", "link"}


def report() -> Report:
    table = Table(
        "AP of all",
        ["detector", "AP", "objects"],
        [[ODD, 41.26, 1234], ["plain", None, 5], ["other", float("nan"), np.int64(7)]],
        "In percent; ≥ 0.",
    )
    long = Table("By class", ["class", "AP"], [[f"c{i}", i / 3] for i in range(80)], decimals=2)
    return Report(
        ODD,
        "Not told apart.",
        [
            Section(
                ODD,
                f"One.\n\nTwo {ODD}.",
                [table, long],
                [Figure(f"Curve {ODD}", PNG, "Of both.")],
                {"ap": np.array([1.5, np.nan]), "n": np.int64(3), "classes": {1: (1, 2)}},
            ),
            Section("Empty", tables=[Table("Nothing", ["a", "b"], [])], figures=[Figure("P", PNG)]),
        ],
        {"iou_type": "bbox", "resamples": 1000, "note": ODD},
    )


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_all_files_are_written_into_a_new_folder_and_nothing_else(tmp_path):
    report().write(tmp_path / "new" / "folder")
    files = sorted(str(file.relative_to(tmp_path / "new/folder")) for file in tmp_path.rglob("*.*"))
    assert files == [
        "figures/01-curve-b-50-x.png",
        "figures/02-p.png",
        "report.html",
        "report.json",
        "report.md",
        "tables.tex",
    ]
    assert (tmp_path / "new/folder/figures/02-p.png").read_bytes() == PNG


def test_figures_of_an_earlier_report_do_not_stay(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("03-of-another-image.png", "own.png"):
        (tmp_path / "figures" / name).touch()
    report().write(tmp_path)
    names = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert names == ["01-curve-b-50-x.png", "02-p.png", "own.png"]


def test_html_is_well_formed_loads_nothing_and_shows_texts_as_they_are():
    text = report().html()
    page = Page(text)
    assert ODD in page.texts
    assert not page.all("b") and not page.all("script") and not page.all("link")
    assert "http:" not in text and "https:" not in text
    images = page.all("img")
    prefix = "data:image/png;base64,"
    assert [base64.b64decode(image["src"].removeprefix(prefix)) for image in images] == [PNG] * 2
    assert images[0]["alt"] == f"Curve {ODD}"
    anchors = {link["href"] for link in page.all("a")}
    assert anchors == {f"#{section['id']}" for section in page.all("section")}
    assert len(page.all("caption")) == len(page.all("table")) == 4  # with the settings
    assert len(page.all("details")) == 1  # the long table
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}


def test_markdown_names_the_pictures_and_no_text_breaks_its_tables(tmp_path):
    text = report().markdown()
    assert "(figures/01-curve-b-50-x.png)" in text
    assert "\\<b\\>50% & $x$_\\|\\`\\*\\\\" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    first = [line.replace("\\\\", "").replace("\\|", "").count("|") for line in rows[:5]]
    assert first == [4] * 5


def test_json_has_all_numbers_and_null_for_what_is_none():
    content = json.loads(report().json())
    first = content["sections"][0]
    assert first["data"] == {"ap": [1.5, None], "n": 3, "classes": {"1": [1, 2]}}
    assert first["tables"][0]["rows"] == [
        [ODD, 41.26, 1234],
        ["plain", None, 5],
        ["other", None, 7],
    ]
    assert first["figures"][0]["file"] == "figures/01-curve-b-50-x.png"
    assert content["settings"]["resamples"] == 1000
    assert content["verdict"] == "Not told apart."


def test_latex_escapes_texts_and_uses_booktabs():
    text = report().latex()
    row = r"\textless{}b\textgreater{}50\% \& \$x\$\_|`*\textbackslash{} & 41.3 & 1,234 \\"
    assert row in text
    assert r"\begin{tabular}{lrr}" in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 3
    assert r"In percent; $\geq$ 0." in text
    assert r"\label{tab:by-class}" in text


def test_tables_of_one_title_have_different_labels():
    table = Table("AP", ["a"], [["x"]])
    text = Report("t", "", [Section("s", tables=[table, table])]).latex()
    assert r"\label{tab:ap}" in text and r"\label{tab:ap-2}" in text


def test_columns_of_numbers_are_right_aligned_with_deviations_and_p_values():
    rows = [["a", "41.2 ± 0.3", "< 0.001", "0.0 to 0.1"], ["b", 40.0, None, "0.1 to 0.2"]]
    text = Report("t", "", [Section("s", tables=[Table("AP", [*"nApb"], rows)])]).latex()
    assert r"\begin{tabular}{lrrl}" in text


def test_each_line_of_the_verdict_stays_one():
    two = Report("t", "None beats it.\na is worse.", [])
    assert "**None beats it.**\n\n**a is worse.**" in two.markdown()
    assert "None beats it.\na is worse." in two.html() and "pre-line" in two.html()


def test_terminal_shows_the_verdict_and_the_first_table_alone():
    text = report().terminal()
    assert text.startswith(f"{ODD}\n\nNot told apart.\n\ndetector")
    assert "41.3" in text and "c79" not in text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (float("nan"), "-"),
        (-0.04, "0.0"),
        (1234567, "1,234,567"),
        (0.25, "0.2"),
        ("+0.3", "+0.3"),
        (np.float32(2.5), "2.5"),
        (float("inf"), "inf"),
    ],
)
def test_cells(value, text):
    assert cell(value, 1) == text


def test_a_report_that_cannot_be_made_writes_nothing(tmp_path):
    broken = Report("t", "v", [Section("s", tables=[Table("t", ["a", "b"], [["one"]])])])
    with pytest.raises((ValueError, IndexError)):
        broken.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
