"""Panoptic quality: a case worked out by hand, and an implementation of its own."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hotcoco", reason="hotcoco is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

from plugin_core.evaluation.panoptic_quality import (
    PanopticPrediction,
    encode_png,
    id_of_color,
    panoptic_quality,
)

THING, OTHER, STUFF, UNUSED = 1, 2, 8, 9
CATEGORIES = [
    {"id": i, "name": str(i), "isthing": int(i < STUFF)} for i in (THING, OTHER, STUFF, UNUSED)
]
Image = tuple[np.ndarray, dict[int, int]]  # ids, and the category of each


class Images:
    """Annotated images in a folder, and predictions of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.annotations: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": CATEGORIES,
        }
        self.predictions: list[PanopticPrediction] = []

    def add(self, truth: Image, crowds: set[int], found: Image | None) -> None:
        ids, categories = truth
        image = len(self.annotations["images"]) + 1
        (self.folder / f"{image}.png").write_bytes(encode_png(ids))
        segments = [
            {
                "id": i,
                "category_id": category,
                "iscrowd": int(i in crowds),
                "area": int((ids == i).sum()),
                "bbox": [0, 0, 1, 1],
            }
            for i, category in categories.items()
        ]
        height, width = ids.shape
        self.annotations["images"].append(
            {"id": image, "file_name": f"{image}.jpg", "height": height, "width": width}
        )
        self.annotations["annotations"].append(
            {"image_id": image, "file_name": f"{image}.png", "segments_info": segments}
        )
        if found is not None:
            infos = [{"id": i, "category_id": category} for i, category in found[1].items()]
            self.predictions.append(PanopticPrediction(image, infos, encode_png(found[0])))

    def quality(self) -> Any:
        return panoptic_quality(self.annotations, str(self.folder), self.predictions)


def rows(*lines: tuple[int, int]) -> np.ndarray:
    """Ids (H, 10): each line is how many rows have which id."""
    return np.concatenate([np.full((count, 10), i) for count, i in lines])


def test_annotations_that_name_their_pngs_by_whole_paths_are_only_read(tmp_path):
    images = Images(tmp_path)
    image = (rows((5, 1), (5, 2)), {1: THING, 2: OTHER})
    images.add(image, set(), (rows((10, 1)), {1: THING}))
    (annotation,) = images.annotations["annotations"]
    expected, file = images.quality(), tmp_path / annotation["file_name"]
    content, annotation["file_name"] = file.read_bytes(), str(file)
    assert images.quality().table() == expected.table()
    assert file.read_bytes() == content


def test_hand_worked_case_with_void_and_a_crowd(tmp_path):
    images = Images(tmp_path)
    # 10 rows: a thing of 4, a crowd of things of 3, stuff of 2, 1 without a label
    truth = (rows((4, 300), (3, 70000), (2, 5), (1, 0)), {300: THING, 70000: THING, 5: STUFF})
    # The thing lacks a row; the next one lies in the crowd with 2 of its 3 rows, and is ignored.
    # Stuff has its 2 rows and the one without a label, which does not count: IoU 1.
    found = (rows((3, 1), (3, 2), (1, 0), (3, 3)), {1: THING, 2: THING, 3: STUFF})
    images.add(truth, {70000}, found)
    # A second image, where the thing is missed and another is taken for it
    images.add((rows((10, 7)), {7: THING}), set(), (rows((10, 1)), {1: OTHER}))
    quality = images.quality()
    # Things 1: IoU 3/4, one of two found. Things 2: one too many. Stuff: all right.
    pq_of_thing = 100 * (3 / 4) / (1 + 0.5)
    assert quality.by_class[THING]["PQ"] == pytest.approx(pq_of_thing)
    assert quality.by_class[THING]["SQ"] == pytest.approx(75)
    assert quality.by_class[THING]["RQ"] == pytest.approx(100 / 1.5)
    assert quality.by_class[OTHER]["PQ"] == 0
    assert quality.scores["PQ_st"] == pytest.approx(100)
    assert quality.scores["PQ_th"] == pytest.approx(pq_of_thing / 2)
    assert quality.scores["PQ"] == pytest.approx((pq_of_thing + 0 + 100) / 3)
    assert math.isnan(quality.by_class[UNUSED]["PQ"])
    assert quality.counts == {"PQ": 3, "PQ_th": 2, "PQ_st": 1}
    assert quality.table()[1] == ["All", "50.000", "58.333", "55.556", "3"]


def independent_quality(images: list[tuple[Image, set[int], Image]]) -> dict[int, list[float]]:
    """PQ, SQ and RQ of each class that occurs, by the paper's definition, pixel sets in Python."""
    sums: dict[int, list[float]] = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    for (truth, categories), crowds, (found, classes) in images:
        pixels = {i: set(np.flatnonzero(truth == i)) for i in [0, *categories]}
        guesses = {i: set(np.flatnonzero(found == i)) for i in classes}
        missed, false = set(categories) - crowds, set(classes)
        for i in set(missed):
            for j in classes:
                union = (pixels[i] | guesses[j]) - (pixels[0] & guesses[j])
                iou = len(pixels[i] & guesses[j]) / len(union)
                if categories[i] == classes[j] and iou > 0.5:
                    sums[classes[j]][0] += iou
                    sums[classes[j]][1] += 1
                    missed.remove(i)
                    false.remove(j)
        for i in missed:
            sums[categories[i]][3] += 1
        for j in false:
            ignored = set(pixels[0]).union(
                *(pixels[i] for i in crowds if categories[i] == classes[j])
            )
            if len(guesses[j] & ignored) <= len(guesses[j]) / 2:
                sums[classes[j]][2] += 1
    return {
        category: [iou / (tp + (fp + fn) / 2), iou / tp if tp else 0.0, tp / (tp + (fp + fn) / 2)]
        for category, (iou, tp, fp, fn) in sums.items()
        if tp + fp + fn
    }


def test_random_images_have_the_quality_of_the_papers_definition(tmp_path):
    rng = np.random.default_rng(0)
    images, all_of = Images(tmp_path), []
    for _ in range(12):
        truth = np.zeros((16, 20), int)
        for number in range(1, rng.integers(2, 7)):
            y, x = rng.integers(0, 12, 2)
            truth[y : y + 9, x : x + 9] = 300 * number
        ids = [i for i in np.unique(truth).tolist() if i]
        categories = {i: int(rng.choice([THING, OTHER, STUFF])) for i in ids}
        # At most one crowd of a class, as in COCO
        crowds = set(
            {c: i for i, c in categories.items() if c < STUFF and rng.random() < 0.4}.values()
        )
        found = truth // 300
        y, x = rng.integers(0, 12, 2)
        found[y : y + 6, x : x + 6] = 9
        found[: rng.integers(0, 6)] = 0
        classes = {
            j: categories.get(300 * j, THING) if rng.random() < 0.8 else OTHER
            for j in np.unique(found).tolist()
            if j
        }
        all_of.append(((truth, categories), crowds, (found, classes)))
        images.add((truth, categories), crowds, (found, classes))
    quality, expected = images.quality(), independent_quality(all_of)
    assert len(expected) == 3 and any(crowds for _, crowds, _ in all_of)
    for category, numbers in expected.items():
        assert [*quality.by_class[category].values()] == pytest.approx([100 * n for n in numbers])
    for suffix, group in (("", [1, 2, 8]), ("_th", [1, 2]), ("_st", [8])):
        means = 100 * np.mean([expected[c] for c in group], axis=0)
        found = [quality.scores[f"{key}{suffix}"] for key in ("PQ", "SQ", "RQ")]
        assert found == pytest.approx(means.tolist())


def test_images_without_a_prediction_do_not_count(tmp_path):
    images = Images(tmp_path)
    images.add((rows((10, 7)), {7: THING}), set(), (rows((10, 1)), {1: THING}))
    images.add((rows((10, 7)), {7: THING}), set(), None)
    assert images.quality().scores["PQ"] == 100


def test_image_without_any_found_segment_misses_all(tmp_path):
    images = Images(tmp_path)
    images.add((rows((10, 7)), {7: THING}), set(), (rows((10, 0)), {}))
    assert images.quality().scores["PQ"] == 0


def test_prediction_of_an_unknown_image_is_an_error(tmp_path):
    images = Images(tmp_path)
    images.predictions.append(PanopticPrediction(5, [], encode_png(rows((2, 0)))))
    with pytest.raises(ValueError, match="no annotation of image 5"):
        images.quality()


def test_ids_survive_being_written_as_colors(drawn_coco):
    ids = np.array([[0, 255, 256], [65535, 65536, 256**3 - 1]])
    from PIL import Image as Pictures

    png = drawn_coco / "annotations" / "panoptic_val2017"
    content = json.loads((png.parent / "panoptic_val2017.json").read_text())["annotations"][0]
    pixels = np.asarray(Pictures.open(png / content["file_name"]))
    listed = {segment["id"] for segment in content["segments_info"]}
    assert set(np.unique(id_of_color(pixels)).tolist()) - {0} == listed
    assert (id_of_color(np.asarray(Pictures.open(io.BytesIO(encode_png(ids))))) == ids).all()
