"""The images in which two detectors differ most, drawn beside the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as masks

from plugin_core.evaluation.comparison.detections import Detections, Match
from plugin_core.evaluation.comparison.drawing import LARGEST, palette_png
from plugin_core.evaluation.comparison.sections import Cell, Figure, Section, Table

IOU = 0.5
SIDES = (328, 280, 240, 200)  # longest side of a panel, in pixels; three of 328 fill the page
CAPTION = 20  # height in pixels
RIGHT, WRONG, MISSED, CROWD = (30, 200, 60), (235, 40, 40), (255, 170, 0), (150, 150, 150)


def pictures(
    detectors: Mapping[str, Detections],
    folder: Path | None,
    score_threshold: float = 0.3,
    number: int = 6,
) -> Section:
    """Show the images in which the first detector and the next one differ most.

    The measure is the F-score of an image: 2 TP / (2 TP + FP + FN), at IoU 0.5, of the detections
    above the score threshold. It is 1 where there is nothing and nothing is detected. Of equal
    differences the one with more mistakes spared or made comes first.

    Args:
        detectors: by name; the first two are compared.
        folder: of the images; None to draw nothing.
        score_threshold: 0…1; detections below are left out.
        number: of images, half of them where the one is better, and half where the other is.
    """
    pair = dict([*detectors.items()][:2])
    truth = next(iter(pair.values())).truth
    found = {n: d.match(IOU, score_threshold=score_threshold) for n, d in pair.items()}
    scores, mistakes = zip(*(f_scores(d, found[name]) for name, d in pair.items()), strict=True)
    order = most_different(scores[1] - scores[0], mistakes[0] - mistakes[1], number)
    rows: list[list[Cell]] = []
    figures, skipped = [], []
    for image in order:
        file, (first, second) = (
            truth.images[image].get("file_name"),
            (100 * s[image] for s in scores),
        )
        about = str(file or f"image {truth.images[image]['id']}")
        rows.append([about, first, second, second - first])
        if folder is None:
            continue
        try:
            picture = read(folder, file)
        except (OSError, ValueError, TypeError, Image.DecompressionBombError):
            skipped.append(about)
            continue
        captions = [
            f"{name}, F {100 * values[image]:.0f}%"
            for name, values in zip(pair, scores, strict=True)
        ]
        figures.append(
            Figure(about, draw(picture, [*pair.values()], [*found.values()], captions, image))
        )
    notes = [
        "In percent and percentage points. Half of the images are those where the one detector is "
        "better, the other half where the other is."
    ]
    if skipped:
        notes.append(f"Not drawn, as they cannot be read in {folder}: {', '.join(skipped)}.")
    names = [*pair]
    return Section(
        "Images that differ most",
        f"By the F-score of detections with a score of at least {score_threshold:g} at "
        f"{truth.overlap} {IOU:g}. Green: right. Red: found nothing. Orange, in the ground truth: "
        "missed by one of them or both. Grey: crowd, or not labelled.",
        [
            Table(
                f"{names[0]} and {names[1]}",
                ["image", *(f"F-score, {name}" for name in names), "difference"],
                rows,
                " ".join(notes),
            )
        ],
        figures,
        {"images": [truth.images[i]["id"] for i in order], "not_drawn": skipped},
    )


def f_scores(detections: Detections, match: Match) -> tuple[np.ndarray, np.ndarray]:
    """Return the F-score of each image, 0…1, and its number of false detections and lost objects.

    The F-score is 1 where there is nothing to find and nothing is detected. Both are of shape (I,).
    """
    truth = detections.truth
    images = len(truth.images)
    right = np.bincount(detections.image[match.right], minlength=images)
    shown = np.bincount(detections.image[~match.ignored], minlength=images)
    objects = np.bincount(truth.image[match.counted], minlength=images)
    both = shown + objects
    return np.where(both, 2 * right / np.maximum(both, 1), 1.0), both - 2 * right


def most_different(scores: np.ndarray, mistakes: np.ndarray, number: int) -> list[int]:
    """Choose images with the largest and the smallest differences, half of each where there are.

    Args:
        scores: difference of scores in each image (I,); images with 0 are never chosen.
        mistakes: difference of mistakes, spared less made, that decides between equal scores (I,).
        number: of images at most.
    """
    order = np.lexsort((-np.abs(mistakes), -np.abs(scores)))
    better = [int(i) for i in order if scores[i] > 0]
    worse = [int(i) for i in order if scores[i] < 0]
    more = max((number + 1) // 2, number - len(worse))
    chosen = {*better[:more], *worse[: number - min(more, len(better))]}
    return [int(i) for i in order if int(i) in chosen]


def read(folder: Path, file: Any) -> Image.Image:
    """Read an image as the frameworks do: in RGB, turned as the camera says.

    Raises:
        OSError, TypeError or ValueError: if it cannot be read.
    """
    with Image.open(folder / file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def draw(
    picture: Image.Image,
    detectors: Sequence[Detections],
    matches: Sequence[Match],
    captions: Sequence[str],
    image: int,
) -> bytes:
    """Draw an image's objects, and its detections by each detector, side by side as PNG.

    The panels are as large as the size of the file allows.

    Args:
        picture: of the image, in RGB.
        detectors: of the detections.
        matches: of their detections.
        captions: above them.
        image: index of the image.
    """
    truth = detectors[0].truth
    found = np.all([match.found for match in matches], axis=0)
    for side in SIDES:
        small = shrink(picture, side)
        scale = small.width / picture.width
        panels = [Panel(small, scale)]
        for g in np.flatnonzero(truth.image == image):
            wanted = truth.wanted[0, g]
            colour = (RIGHT if found[g] else MISSED) if wanted else CROWD
            shape = truth.shapes[g]
            if truth.iou_type == "keypoints" and not wanted:  # without labels
                shape = truth.boxes[g]
            panels[0].draw(shape, colour, truth.names[truth.category[g]])
        for detections, match in zip(detectors, matches, strict=True):
            panels.append(Panel(small, scale))
            shown = np.flatnonzero((detections.image == image) & ~match.ignored)
            for i in shown[::-1]:  # the best on top
                name = f"{truth.names[detections.category[i]]} {detections.score[i]:.2f}"
                panels[-1].draw(detections.shapes[i], RIGHT if match.right[i] else WRONG, name)
        png = palette_png(side_by_side([p.image for p in panels], ["ground truth", *captions]))
        if len(png) <= LARGEST:
            break
    return png


def shrink(picture: Image.Image, side: int) -> Image.Image:
    """Return an image at a length of its longest side, in few colours.

    So those of the boxes drawn on it stay pure in the file's palette.
    """
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    return small.quantize(128, dither=Image.Dither.NONE).convert("RGB")


class Panel:
    """A small copy of an image to draw on.

    Args:
        small: the small image, in RGB; it is copied.
        scale: its pixels for one of the image.
    """

    def __init__(self, small: Image.Image, scale: float) -> None:
        self.image, self.scale = small.copy(), scale

    def draw(self, shape: Any, colour: tuple[int, int, int], text: str) -> None:
        """Draw and name a box (4,) in x, y, width and height, a compressed mask, or keypoints.

        Keypoints (17, 3) are drawn where their last number, the visibility or score, is above 0.
        """
        drawing = ImageDraw.Draw(self.image)
        if isinstance(shape, dict):
            mask = Image.fromarray(120 * masks.decode(shape)).resize(self.image.size)
            self.image.paste(colour, mask=mask)
            shape = masks.toBbox(shape)
        elif shape.ndim == 2:
            points = shape[shape[:, 2] > 0, :2] if (shape[:, 2] > 0).any() else shape[:, :2]
            for x, y in self.scale * points:
                drawing.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
            shape = [*points.min(axis=0), *np.ptp(points, axis=0)]
        x, y, width, height = (self.scale * float(value) for value in shape)
        drawing.rectangle((x, y, x + max(width, 0), y + max(height, 0)), outline=colour, width=2)
        room = self.image.width - drawing.textlength(text, font(9)) - 2
        place = (max(min(x + 2, room), 1), max(y - 10, 0))
        left, top, right, bottom = drawing.textbbox(place, text, font(9))
        drawing.rectangle((left - 2, top - 1, right + 1, bottom), fill=colour)
        drawing.text(place, text, fill="black", font=font(9))


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Arrange panels of one size in a row on white, with a caption above each."""
    width, height = panels[0].size
    step = width + 8
    result = Image.new("RGB", (step * len(panels) - 8, height + CAPTION), "white")
    drawing = ImageDraw.Draw(result)
    for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        result.paste(panel, (i * step, CAPTION))
        while len(caption) > 1 and drawing.textlength(caption, font(12)) > width:
            caption = f"{caption[:-2]}…"
        drawing.text((i * step, 2), caption, fill="black", font=font(12))
    return result


@cache
def font(size: int) -> Any:
    """Load Matplotlib's own font, which has more letters than PIL's."""
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
