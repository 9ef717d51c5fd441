"""Reads the commands and files that the README and docs/ show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


class Command(NamedTuple):
    """A line of a shell block."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: Path) -> list[Command]:
    """Read the commands of a page's shell blocks, with its variables filled in."""
    found, variables = [], {}
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        quoted = re.sub(r'"[^"]*"', lambda m: " ".join(m[0].split()), block.replace("\\\n", " "))
        for line in quoted.splitlines():
            for name, value in variables.items():
                line = line.replace(f'"${{{name}[@]}}"', value).replace(f"${name}", value)
            if array := re.fullmatch(r"(\w+)=\((.*)\)", line):
                variables[array[1]] = array[2]
                continue
            words = shlex.split(line, comments=True)
            assigned = re.match(r"^(\w+)=(.*)$", words[0]) if len(words) == 1 else None
            if assigned and "$(" not in line:
                variables[assigned[1]] = assigned[2]
            elif words:
                found.append(Command(page.name, words))
    return found


def files(page: Path) -> dict[str, str]:
    """Read the blocks of a page that begin with a comment with a file's name."""
    blocks = re.findall(r"^```(?:yaml|python)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    named = ((re.match(r"# ([\w.-]+\.(?:yaml|py))\b", block), block) for block in blocks)
    return {match[1]: block for match, block in named if match}
