"""Table of a detector's cost, also beside a baseline."""

from __future__ import annotations

from tabulate import tabulate

from plugin_core.inspection.cost import Cost, Report

# Attribute of a cost, header, unit and digits
QUANTITIES = [
    ("parameters", "parameters", 1, 0),
    ("flops", "GFLOPs", 1e9, 4),
    ("activations", "M activations", 1e6, 3),
]


def describe(report: Report, baseline: Report | None) -> str:
    """Lay out the costs as a table, and name its image size and numbers of boxes.

    Args:
        report: of the model.
        baseline: of a model to compare with; the table gets the differences.
    """
    other = Report(report.image_size, {}, {}, 0, Cost()) if baseline is None else baseline
    stages = dict.fromkeys([*report.stages, *other.stages])
    rows = [(s, report.stages.get(s, Cost()), other.stages.get(s, Cost())) for s in stages]
    rows.append(("total", report.total, other.total))
    attention = f"of it attention ({report.attention_modules} modules)"
    rows.append((attention, report.attention, other.attention))
    headers = ["stage"]
    for _, header, _, _ in QUANTITIES:
        headers += [header] if baseline is None else [header, "baseline", "difference"]
    cells = []
    for name, cost, base in rows:
        row = [name]
        for attribute, _, unit, digits in QUANTITIES:
            here, there = getattr(cost, attribute) / unit, getattr(base, attribute) / unit
            row.append(f"{here:,.{digits}f}")
            if baseline is not None:
                row += [f"{there:,.{digits}f}", f"{here - there:+,.{digits}f}"]
        cells.append(row)
    align = ["left", *["right"] * (len(headers) - 1)]
    table = tabulate(cells, headers, "github", disable_numparse=True, colalign=align)
    height, width = report.image_size
    notes = [f"one image of {height}x{width} pixels{_boxes(report)}"]
    if baseline is not None and baseline.regions != report.regions:
        notes.append(f"baseline{_boxes(baseline)}")
    return f"{table}\n\n{'; '.join(notes)}"


def _boxes(report: Report) -> str:
    return "".join(f", {number} {what}" for what, number in report.regions.items())
