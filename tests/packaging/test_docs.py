"""The pages hold together: links, anchors, the index, and the messages that they explain."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        ROOT / "configs" / "README.md",
        *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)
FENCED = re.compile(r"^ *(```+|~~~+).*?^ *\1 *$", re.M | re.S)


@functools.cache
def prose(page: Path) -> str:
    """A page's text without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


@functools.cache
def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one) is not None for one in found)
        found.append(f"{slug}-{count}" if count else slug)
    return set(found)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = re.findall(r"\]\(\s*([^()\s]+)\s*\)", text) + re.findall(r'(?:src|href)="(.+?)"', text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, f"{link}: leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: headings are {sorted(anchors(target))}"


def test_index_lists_every_page_once() -> None:
    listed = re.findall(r"^- \[[^]]+\]\(([\w/]+\.md)\)", prose(DOCS / "index.md"), re.M)
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    assert sorted(listed) == sorted(pages - {"index.md"})


@functools.cache
def texts_of_the_code() -> str:
    """All texts in the code; what is put into a text stands as "…"."""
    texts = []
    for folder in ("plugin_core", "d2_plugins", "mm_plugins", "tools", "packaging"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [getattr(part, "value", None) for part in node.values]
                    texts.append("".join(p if isinstance(p, str) else "…" for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return re.sub(r"[`\s]+", " ", "\n".join(texts))


@pytest.mark.parametrize(
    "page", ["installing.md", "troubleshooting.md"], ids=["installing", "troubleshooting"]
)
def test_explained_messages_are_the_codes(page: str) -> None:
    text, _, _ = prose(DOCS / page).partition("Messages of other packages")
    tables = re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    rows = [line.split(" | ")[0].strip("| ") for table in tables for line in table.splitlines()]
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert messages
    for message in messages:
        pieces = [piece.strip() for piece in message.split("…")]
        assert any(len(piece) > 8 for piece in pieces), f"{message}: says too little"
        assert all(piece in texts_of_the_code() for piece in pieces), message


def test_pictures_are_small() -> None:
    sizes = [p.stat().st_size for f in ("drawings", "pictures") for p in (DOCS / f).iterdir()]
    assert len(sizes) > 10 and max(sizes) < 150_000 and sum(sizes) < 3_000_000


def test_site_and_package_name_one_repository() -> None:
    found = {
        re.search(r'^REPOSITORY = "(.+)"$', (ROOT / file).read_text(encoding="utf-8"), re.M)[1]
        for file in ("setup.py", "docs/conf.py")
    }
    assert len(found) == 1
