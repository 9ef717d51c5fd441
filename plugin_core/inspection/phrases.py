"""Drawing heatmaps of phrases for detectors that read a text."""

from __future__ import annotations

import textwrap

import numpy as np

from plugin_core.errors import ArgumentError
from plugin_core.inspection.attention_maps import Caption, Detector, Grounder
from plugin_core.inspection.sheets import Panel, Row, with_box, with_colours, with_cross

ROW_TITLE = 32  # characters in a line


def choose_grounder(detector: Detector, caption: Caption, layer: str | None) -> Grounder:
    """Make a detector's grounder; raises ValueError as :meth:`Detector.grounder` does.

    Messages name the options of tools/visualize_attention.py.
    """
    if not detector.reads_text:
        kind = type(detector.model).__name__
        raise ValueError(f"--phrase: {kind} reads no text; choose by --class")
    try:
        return detector.grounder(caption, layer)
    except ValueError as error:
        raise _with_option(error) from error


def phrase_rows(detector: Detector, ground: Grounder, caption: Caption, path: str) -> list[Row]:
    """Draw a row for each phrase: its detection and its heatmap.

    Args:
        detector: reads the image.
        ground: from :func:`choose_grounder`.
        caption: the grounder's caption.
        path: of the image.

    Raises:
        ValueError: if there is no heatmap.
    """
    picture = detector.read(path)
    try:
        found = ground(picture)
    except ValueError as error:
        raise _with_option(error) from error
    rows = []
    for number, (phrase, heat) in enumerate(zip(caption.phrases, found.heatmaps, strict=True)):
        detected, coloured = picture.image, with_colours(picture.image, heat)
        title, best = "no detection", found.detections.best(number)
        if best is not None:
            title = f"score {found.detections.scores[best].item():.2f}"
            box = found.detections.boxes[best]
            detected, coloured = with_box(detected, box), with_box(coloured, box)
        about = "nowhere above 0"
        if heat.any():
            row, column = np.unravel_index(int(heat.argmax()), heat.shape)
            about, coloured = "its maximum marked", with_cross(coloured, int(row), int(column))
        file = f"phrase-{number + 1}" if number else "phrase"
        panels = [Panel(title, detected), Panel(f"heatmap, {about}\n{found.layer}", coloured, file)]
        rows.append(Row(textwrap.fill(phrase, ROW_TITLE), panels))
    return rows


def _with_option(error: ValueError) -> ValueError:
    """Name the option in place of the setting of a config."""
    if isinstance(error, ArgumentError) and error.argument == "heatmap.activation":
        return ValueError(f"--layer: {error.reason}")
    return error
