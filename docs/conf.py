"""Sphinx's settings: ``make docs`` builds the site from the pages that GitHub shows as they are.

The pages are plain Markdown. What only the site needs is made while it is built: the sidebar from
the lists of index.md, addresses for links that leave docs/, and the model zoo from configs/.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docutils.nodes import math, math_block
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
REPOSITORY = "https://github.com/detection-plugins/detection-plugins"
sys.path.insert(0, str(ROOT))

project = "detection-plugins"
copyright = "the authors of detection-plugins"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "drawings/**", "pictures/**"]
nitpicky = True
# Only the project's own names must be found: other projects' would be looked up on the network.
nitpick_ignore_regex = [("py:.*", r"(?!(plugin_core|d2_plugins|mm_plugins)\b).*")]
# A shell line or a diff of yaml is no error of its lexer.
suppress_warnings = ["misc.highlighting_failure"]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
html_theme = "furo"
pygments_style = "friendly"  # of which a diff's lines have two colours
html_title = project
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
html_show_sphinx = False
html_copy_source = False

autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# --- what only the site needs ----------------------------------------------------------------- #

SHOWN = {ROOT / "configs" / "README.md": DOCS / "model_zoo.md"}
_FENCE = re.compile(r"^\s*(```+|~~~+)")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_ROW = re.compile(r"^\| ([^|]+?) \|(.*`tools/\w+\.py (?:--config-file )?(configs/\S+?)`.*)$", re.M)
_LANGUAGES = {".yaml": "yaml", ".py": "python"}


def setup(app: Sphinx) -> None:
    """Complete pages as Sphinx reads them, and write formulas as MathML."""
    app.connect("source-read", complete)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))


def write_formula(writer: HTML5Translator, node: math | math_block) -> None:
    """Write a formula as browsers read it themselves. MathJax would need a network."""
    from docutils.nodes import SkipNode
    from docutils.utils.math import latex2mathml

    block = node.tagname == "math_block"
    try:
        formula = latex2mathml.tex2mathml(node.astext(), as_block=block)
    except TypeError:  # docutils before 0.22
        formula = latex2mathml.tex2mathml(node.astext(), inline=not block)
    writer.body.append(f'<p style="text-align: center">{formula}</p>' if block else formula)
    raise SkipNode


def complete(app: Sphinx, name: str, source: list[str]) -> None:
    """Add to a page what only the site needs."""
    page = DOCS / f"{name}.md"
    if not page.is_file():
        return
    text = with_site_links(source[0], page)
    if name == "index":
        text += "\n".join(toctrees(text))
    elif name == "model_zoo":
        zoo = ROOT / "configs" / "README.md"
        app.env.note_dependency(str(zoo))
        tables = zoo.read_text(encoding="utf-8").partition("\n")[2]
        text += with_site_links(_ROW.sub(_with_link_to_config, tables), zoo)
    elif name == "config_files":
        text += "\n".join(config_texts(app))
    source[0] = text


def with_site_links(text: str, page: Path) -> str:
    """Let a page's relative links lead to the site's pages, or else to the repository.

    Args:
        text: of the page, in Markdown.
        page: the file that the links are relative to.
    """
    lines, fence = [], ""
    for line in text.split("\n"):
        if mark := _FENCE.match(line):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        lines.append(
            line if fence else _LINK.sub(lambda link: f"]({_target(link[1], page)})", line)
        )
    return "\n".join(lines)


def _target(link: str, page: Path) -> str:
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link
    file = (page.parent / path).resolve()
    if not file.exists():
        from sphinx.util import logging

        logging.getLogger(__name__).warning("%s links to %s, which does not exist", page, path)
        return link
    if page.name != "model_zoo.md":
        file = SHOWN.get(file, file)
    if DOCS in file.parents:
        here = page.parent if DOCS in page.parents else DOCS
        return Path(os.path.relpath(file, here)).as_posix() + mark + anchor
    kind = "tree" if file.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{file.relative_to(ROOT).as_posix()}{mark}{anchor}"


def toctrees(text: str) -> Iterator[str]:
    """Make the sidebar: a part for each heading of index.md, an entry for each link of its list."""
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        yield from ("", "```{toctree}", ":hidden:", f":caption: {section.splitlines()[0]}", "")
        yield from (
            f"{title} <{page}>"
            for title, page in re.findall(r"^- \[([^]]+)\]\(([\w/]+)\.md\)", section, flags=re.M)
        )
        yield "```"


def _label(config: str) -> str:
    return "config-" + re.sub(r"[^a-z0-9]+", "-", config.removeprefix("configs/").lower())


def _with_link_to_config(row: re.Match[str]) -> str:
    return f"| [{row[1]}](#{_label(row[3])}) |{row[2]}"


def config_texts(app: Sphinx) -> Iterator[str]:
    """Show every config, under the folders' names."""
    for folder in sorted({file.parent for file in (ROOT / "configs").rglob("*.*")}):
        files = sorted(file for file in folder.iterdir() if file.suffix in _LANGUAGES)
        if files:
            yield f"\n## {folder.relative_to(ROOT).as_posix()}\n"
        for file in files:
            app.env.note_dependency(str(file))
            config = file.relative_to(ROOT).as_posix()
            yield f"\n({_label(config)})=\n**[{file.name}]({REPOSITORY}/blob/main/{config})**\n"
            yield f"```{_LANGUAGES[file.suffix]}\n{file.read_text(encoding='utf-8').strip()}\n```"
