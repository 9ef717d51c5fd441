"""What a check of a dataset has found, and how people are told."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
_LEVELS = (ERROR, WARNING, NOTE)
FRAMEWORKS = {"detectron2": "Detectron2", "mmdetection": "MMDetection"}
PLACES = 3  # named for each kind
_ON_A_SCREEN = 9  # kinds in a report on the terminal


def both(text: str) -> dict[str, str]:
    """Say the same of both frameworks."""
    return dict.fromkeys(FRAMEWORKS, text)


@dataclass
class Finding:
    """One kind of mistake in a dataset.

    Attributes:
        kind: its name, such as "unknown-category".
        level: "error" (a training fails or learns something wrong), "warning" (some of the data is
            lost) or "note" (nothing is lost).
        what: the mistake in words, without the count.
        count: how often it occurs.
        places: the first ones, by file name and id.
        left: what happens in Detectron2 and in MMDetection if it is left; a framework that is not
            named here accepts it as it is.
        remedy: what would be right, and where.
        mended: "read" if both trainings read it right by themselves, "fix" if only
            ``tools/check_dataset.py --fix`` mends it, "" if nobody can without guessing.
    """

    kind: str
    level: str
    what: str
    count: int
    places: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    remedy: str = ""
    mended: str = ""

    def concerns(self, framework: str | None) -> bool:
        """Tell whether it matters in a framework; in any of them for None."""
        return not (framework and self.left) or framework in self.left

    def lines(self, framework: str | None = None) -> list[str]:
        """Say it in a few lines of 100 columns, about one framework or both."""
        places = f": {'; '.join(self.places)}" if self.places else ""
        more = "; …" if self.places and self.count > len(self.places) else ""
        number = f"{self.count:,} × " if self.count > 1 else ""
        text = f"{self.level}: {number}{self.what}{places}{more}"
        left = {key: text for key, text in self.left.items() if framework in (None, key)}
        same = len(set(left.values())) == 1 and len(left) == len(FRAMEWORKS)
        says = (
            [f"Either framework {next(iter(left.values()))}"]
            if same
            else [f"{FRAMEWORKS[key]} {text}" for key, text in left.items()]
        )
        remedy = [f"{self.remedy[:1].upper()}{self.remedy[1:]}"] if self.remedy else []
        if self.mended == "read":
            remedy = ["The trainings here read a copy in which it is right"]
        elif self.mended == "fix":
            remedy.append("`tools/check_dataset.py … --fix OUT.json` mends it")
        rest = " ".join(
            sentence if sentence.endswith("?") else f"{sentence}." for sentence in says + remedy
        )
        return [
            *textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False),
            *textwrap.wrap(rest, 98, initial_indent="  ", subsequent_indent="  "),
        ]


@dataclass
class Report:
    """All findings of a dataset, worst first.

    Attributes:
        path: of the annotation file.
        findings: kinds of mistakes.
        counts: of images, annotations and classes.
        classes: number of annotations of each class, crowds left out, by name.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        kind: str,
        level: str,
        what: str,
        places: Sequence[str] | Iterable[str],
        **rest: Any,
    ) -> None:
        """Add a kind of mistake if there are places with it; ``count`` may tell how many."""
        places = list(places)
        count = rest.pop("count", len(places))
        if count:
            finding = Finding(kind, level, what, count, places[:PLACES], **rest)
            self.findings.append(finding)
            self.findings.sort(key=lambda f: _LEVELS.index(f.level))

    def of(self, level: str, framework: str | None = None) -> list[Finding]:
        """List the findings of a level that matter in a framework, or in any."""
        return [f for f in self.findings if f.level == level and f.concerns(framework)]

    def text(self, framework: str | None = None, levels: Sequence[str] = _LEVELS) -> str:
        """Write the report for a terminal: one screen at most."""
        found = [f for level in levels for f in self.of(level, framework)]
        lines = [line for f in found[:_ON_A_SCREEN] for line in f.lines(framework)]
        if len(found) > _ON_A_SCREEN:
            rest = [f"{f.what} ({f.count:,})" for f in found[_ON_A_SCREEN:]]
            more = f"{len(rest)} more kinds, all in --json: {', '.join(rest)}"
            lines += textwrap.wrap(more, 100, max_lines=4, subsequent_indent="  ")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Report:
        """Read what :meth:`as_dict` has made."""
        findings = [Finding(**finding) for finding in content["findings"]]
        return cls(**{**content, "findings": findings})


class DatasetError(ValueError):
    """A dataset has mistakes with which a training would fail or learn something wrong."""

    def __init__(self, setting: str, report: Report, framework: str | None) -> None:
        number = len(report.of(ERROR, framework))
        kinds = "a mistake" if number == 1 else f"{number} kinds of mistakes"
        super().__init__(
            f"{setting}: {kinds} in {report.path!r}\n{report.text(framework, (ERROR, WARNING))}"
        )
        self.report = report
