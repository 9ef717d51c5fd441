"""Matching a file's categories to a detector's classes by name."""

from __future__ import annotations

from collections.abc import Sequence

from plugin_core.datasets.findings import ERROR, WARNING, Report
from plugin_core.errors import did_you_mean

_SHOWN = 8  # names in a message


def check_classes(
    report: Report, classes: Sequence[str], source: str, *, may_leave_out: bool
) -> None:
    """Check that a file's categories are a detector's classes.

    Args:
        report: of the file; takes what is found.
        classes: the detector's classes, by label.
        source: of the classes, such as "train_dataloader.dataset.metainfo.classes".
        may_leave_out: whether categories with objects may be none of the classes.
    """
    names = report.classes
    missing = [name for name in classes if name not in names]
    others = [name for name, objects in names.items() if name not in classes and objects]
    if missing and others:
        report.add(
            "class-names",
            ERROR,
            f"classes of {source} that are no category of the file",
            [f"{name!r}{did_you_mean(name, others)}" for name in missing],
            left={
                "detectron2": "takes objects of one class for another",
                "mmdetection": "takes objects of one class for another, or leaves them out",
            },
            remedy=(
                f"the file's are {tuple(names)!r}"
                if len(names) <= 20
                else f"the file has {_some(others)} instead"
            ),
        )
    elif others:
        report.add(
            "class-left-out",
            WARNING if may_leave_out else ERROR,
            f"categories with objects that {source} does not have",
            [f"{name!r} ({names[name]:,} objects)" for name in others],
            left={
                "detectron2": "takes them for other classes, or stops",
                "mmdetection": "leaves these objects out",
            },
            remedy="" if may_leave_out else "train on these classes, too, or take them out",
        )
    elif missing:
        report.add(
            "class-missing",
            WARNING,
            f"classes of {source} without a category in the file",
            [repr(name) for name in missing],
            left={
                "detectron2": "stops when it predicts one",
                "mmdetection": "counts the labels without them, and so gives others",
            },
            mended="read",
        )


def check_number_of_classes(
    number: int, names: Sequence[str], setting: str, report: Report | None = None
) -> str:
    """Say in a line that a model has another number of classes than its data; empty if not.

    Args:
        number: of the model.
        names: the data's classes.
        setting: that sets the number in the model.
        report: of the training data, if there is one.
    """
    if number == len(names):
        return ""
    kinds = {
        "root-category": "is only the group of the others",
        "background-category": "is the background, and no class",
    }
    found = [f for f in report.findings if f.kind in kinds] if report else []
    hints = [f"{f.places[0]} {kinds[f.kind]}; take it out of the file" for f in found]
    return (
        f"{setting}: the model has {number} classes, but the data has {len(names)} "
        f"({_some(names)}); {hints[0] if hints else f'set it to {len(names)}'}"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown + (", …" if len(names) > _SHOWN else "")
