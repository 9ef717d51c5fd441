"""A case of contextual bias worked out by hand, as files of tools/evaluate_context_bias.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate_context_bias
import pytest
from pycocotools import mask as coco_mask

CUP, TABLE, LAMP = 1, 2, 7
BOX = [10, 10, 20, 20]
FILES = ["context_bias.json", "context_bias.md", "context_bias.png"]


def ground_truth(images: list[list[int]], names: dict[int, str]) -> dict[str, Any]:
    """COCO-format ground truth; ``images`` has the category id of each object of each image."""
    objects = [(i, category) for i, classes in enumerate(images, 1) for category in classes]
    return {
        "images": [{"id": i + 1, "height": 64, "width": 64} for i in range(len(images))],
        "categories": [{"id": id, "name": name} for id, name in names.items()],
        "annotations": [
            {
                "id": id,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": BOX,
                "area": 400,
                "iscrowd": 0,
            }
            for id, (image_id, category_id) in enumerate(objects, 1)
        ],
    }


def detection(image_id: int, category_id: int, score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": BOX, "score": score}


def rectangle(box: list[float], text: bool = True) -> dict[str, Any]:
    """The mask of a box in an image of 64x64 pixels, compressed."""
    x, y, w, h = box
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    rle = coco_mask.merge(coco_mask.frPyObjects(corners, 64, 64))
    return rle | {"counts": rle["counts"].decode()} if text else rle


class Inputs:
    """The hand-made case as files; a test changes the contents and writes them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # 1, 2: the cup on its table; 3, 4: alone; 5, 6: the table only; 7, 8: neither
        images = [[CUP, TABLE], [TABLE, CUP], [CUP], [CUP], [TABLE], [TABLE], [LAMP], []]
        self.truth = ground_truth(images, {CUP: "cup", TABLE: "table", LAMP: "lamp"})
        crowd = {"id": 99, "image_id": 2, "category_id": CUP, "bbox": [40, 40, 9, 9], "area": 81}
        self.truth["annotations"].append(crowd | {"iscrowd": 1})
        self.results: Any = [
            detection(1, CUP, 0.9),
            detection(2, CUP, 0.8),
            detection(3, CUP, 0.7),
            detection(5, CUP, 0.6),
            detection(6, CUP, 0.4),
        ]
        self.pairs: Any = {"companions": [{"category_id": CUP, "companion_id": TABLE}]}
        self.train = ground_truth([[21, 22]], {21: "cup", 22: "lamp", 23: "table"})

    def write(self, name: str) -> str:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(getattr(self, name)))
        return str(path)

    def options(self, *more: str) -> list[str]:
        """The command line: ``more`` may name files of this class, such as "--pairs"."""
        argv = []
        for option in ("--annotations", "--results", *more):
            name = {"--annotations": "truth", "--train-annotations": "train"}.get(option)
            name = name or option.removeprefix("--")
            argv.append(option)
            if option.startswith("--") and hasattr(self, name):
                argv.append(self.write(name))
        return argv


class Run:
    """The tool; returns the table's rows, each by header, by class."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *argv: str) -> dict[str, dict[str, str]]:
        evaluate_context_bias.main(argv)
        return table(self.capsys.readouterr().out)


def table(text: str) -> dict[str, dict[str, str]]:
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def error_of(*argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate_context_bias.main(argv)
    message = stop.value.code  # a text: printed to stderr, exit status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message
