"""Of detectors that read a text, the heatmaps of its phrases: for tools/visualize_attention.py."""

from __future__ import annotations

import argparse
import textwrap

import numpy as np
from attention_sheet import Panel, Row, with_box, with_colours, with_cross
from config_kinds import FRAMEWORKS

from plugin_core.inspection.attention_maps import Caption, Detector, Grounder

ROW_TITLE = 32  # characters in a line


def choose_caption(args: argparse.Namespace, side: str) -> Caption | None:
    """What a detector is to read; None where no phrase is asked for.

    Raises ValueError if an argument is wrong, or is not for phrases.
    """
    if not args.phrase:
        if args.text is not None:
            raise ValueError("--text: the text that phrases stand in; name one by --phrase")
        return None
    if side != "mm_plugins":
        raise ValueError(
            f"--phrase: {args.config} is a config of {FRAMEWORKS[side]}, whose detectors read no "
            "text; choose by --class"
        )
    others = {"--class": args.class_, "--methods": args.methods, "--baseline": args.baseline}
    for option, value in others.items():
        if value is not None:
            raise ValueError(f"{option}: of detectors with classes; it does not go with --phrase")
    if len(args.layer) > 1:
        raise ValueError(f"--layer {args.layer[1]}: the heatmap of a phrase is made of one layer")
    try:
        # MMDetection takes these from the ends of phrases too.
        return Caption(tuple(phrase.strip(". ") for phrase in args.phrase), args.text)
    except ValueError as error:
        raise ValueError(f"--phrase: {error}") from error


def choose_grounder(detector: Detector, caption: Caption, layer: str | None) -> Grounder:
    if not detector.reads_text:
        kind = type(detector.model).__name__
        raise ValueError(f"--phrase: {kind} reads no text; choose by --class")
    try:
        return detector.grounder(caption, layer)
    except ValueError as error:
        raise _with_option(error) from error


def check_reads_no_text(detector: Detector) -> None:
    if detector.reads_text:
        kind = type(detector.model).__name__
        raise ValueError(f"{kind} reads a text; name what to look for by --phrase")


def phrase_rows(detector: Detector, ground: Grounder, caption: Caption, path: str) -> list[Row]:
    """A row of each phrase: what is detected, and the heatmap; raises ValueError without one."""
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
        panels = [
            Panel(title, detected),
            Panel(f"heatmap, {about}\n{found.layer}", coloured, None, file),
        ]
        rows.append(Row(textwrap.fill(phrase, ROW_TITLE), panels))
    return rows


def _with_option(error: ValueError) -> ValueError:
    """Name the option in place of the setting of a config."""
    return ValueError(str(error).replace("heatmap.activation", "--layer"))
