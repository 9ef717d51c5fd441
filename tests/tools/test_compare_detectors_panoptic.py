"""tools/compare_detectors.py --iou-type panoptic: hotcoco's numbers, resamples, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import compare_detectors
import numpy as np
import pytest

from plugin_core.evaluation.coco_files import Source
from plugin_core.evaluation.comparison import panoptic
from plugin_core.evaluation.comparison.published import published_results
from plugin_core.evaluation.panoptic_quality import (
    PanopticPrediction,
    encode_png,
    panoptic_quality,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
THING, OTHER, STUFF, UNUSED = 1, 2, 8, 9
SIZE = (24, 30)


class Inputs:
    """Ten images of rectangles, annotated and predicted; a test changes and writes them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        names = {THING: "cat", OTHER: "dog", STUFF: "grass", UNUSED: "sea"}
        self.contents: dict[str, Any] = {name: {"annotations": []} for name in ("truth", "a", "b")}
        self.contents["truth"]["images"] = [{"id": i} for i in range(1, 11)]
        self.contents["truth"]["categories"] = [
            {"id": i, "name": name, "isthing": int(i < STUFF)} for i, name in names.items()
        ]
        self.pixels: dict[tuple[str, int], np.ndarray] = {}
        for image in range(1, 11):
            truth = np.zeros(SIZE, int)
            for number in range(1, 6):
                y, x = rng.integers(0, 14, 2)
                truth[y : y + 10, x : x + 12] = 300 * number
            category = {i: int(rng.choice([THING, OTHER, STUFF])) for i in range(300, 1800, 300)}
            self.add("truth", image, truth, category)
            crowd = self.contents["truth"]["annotations"][-1]["segments_info"][-1]
            crowd["iscrowd"] = int(image % 3 == 0 and crowd["category_id"] < STUFF)
            for name, error in (("a", 4), ("b", 1)):  # b is better
                found = np.roll(truth, rng.integers(-error, error + 1), axis=1) // 100
                found[: rng.integers(0, 2 * error)] = 0
                guessed = {
                    i // 100: k if rng.random() > 0.05 * error else OTHER
                    for i, k in category.items()
                }
                self.add(name, image, found, guessed)

    def add(self, name: str, image: int, pixels: np.ndarray, category: dict[int, int]) -> None:
        self.pixels[name, image] = pixels
        infos = [
            {"id": i, "category_id": category[i], "iscrowd": 0, "area": int((pixels == i).sum())}
            for i in np.unique(pixels).tolist()
            if i
        ]
        record = {"image_id": image, "file_name": f"{image}.png", "segments_info": infos}
        self.contents[name]["annotations"].append(record)

    def write(self) -> list[str]:
        """Write all; returns the command line without --out."""
        for name, content in self.contents.items():
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / f"{name}.json").write_text(json.dumps(content))
        for (name, image), pixels in self.pixels.items():
            (self.folder / name / f"{image}.png").write_bytes(encode_png(pixels))
        detectors = [f"--detector={name}={self.folder / name}.json" for name in ("a", "b")]
        options = ["--iou-type", "panoptic", "--resamples", "100"]
        return [str(self.folder / "truth.json"), *detectors, *options]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def test_quality_is_that_of_hotcoco_and_the_better_detector_is_called_so(inputs, capsys):
    pytest.importorskip("hotcoco")
    compare_detectors.main([*inputs.write(), "--out", str(inputs.folder / "out")])
    report = json.loads((inputs.folder / "out" / "report.json").read_text())
    assert [section["title"] for section in report["sections"]] == [
        "Accuracy",
        "Is the difference real?",
    ]
    assert report["verdict"].startswith("In these trainings b is better than a: PQ ")
    assert report["verdict"] in capsys.readouterr().out
    names = {c["id"]: c["name"] for c in inputs.contents["truth"]["categories"]}
    for name in ("a", "b"):
        predictions = [
            PanopticPrediction(
                record["image_id"],
                record["segments_info"],
                encode_png(inputs.pixels[name, record["image_id"]]),
            )
            for record in inputs.contents[name]["annotations"]
        ]
        truth = inputs.contents["truth"]
        expected = panoptic_quality(truth, str(inputs.folder / "truth"), predictions)
        (found,) = report["sections"][0]["data"][name]
        assert found["metrics"] == pytest.approx(expected.scores)
        for category, of_class in expected.by_class.items():
            ours = {
                k: np.nan if v is None else v for k, v in found["by_class"][names[category]].items()
            }
            assert ours == pytest.approx(of_class, nan_ok=True)


def test_a_weight_is_that_many_copies_of_the_image(inputs):
    inputs.write()
    truth = panoptic.read_truth(Source("", str(inputs.folder / "truth.json")), None)
    (counts,) = panoptic.count(
        truth, panoptic.read_detectors({"a": [str(inputs.folder / "a.json")]}, truth)["a"]
    )
    weights = np.array([2, 0, 1, 3, 0, 0, 1, 1, 1, 1])
    things = np.array([True, True, False, False])
    weighted = panoptic.qualities(weights @ counts, things)
    copies = panoptic.qualities(np.repeat(counts, weights, axis=1).sum(axis=1), things)
    for metric, value in copies.items():
        np.testing.assert_allclose(weighted[metric], value)
    assert np.isnan(weighted["classes"][:, 3]).all() and weighted["PQ"] > 0


def bad_prediction(inputs: Inputs, key: str, value: Any) -> None:
    inputs.contents["b"]["annotations"][3][key] = value


def bad_segment(inputs: Inputs, key: str, value: Any) -> None:
    inputs.contents["b"]["annotations"][3]["segments_info"][0][key] = value


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: bad_prediction(x, "image_id", 77), "does not list, the first of image_id 77"),
        (lambda x: bad_segment(x, "category_id", 5), "does not list, the first of category_id 5"),
        (lambda x: bad_segment(x, "id", 0), "annotation 3: segment 0: id cannot be 0"),
        (lambda x: x.contents["b"]["annotations"].pop(), "1 of the 10 images of annotations"),
        (lambda x: x.contents.update(b=[]), "b.json: no list of annotations; expected COCO's pan"),
        (lambda x: bad_prediction(x, "file_name", "none.png"), "b.json: there is no PNG "),
        (lambda x: bad_segment(x, "id", 1234), "4.png has pixels of id "),
        (
            lambda x: x.pixels.update({("b", 2): np.zeros((3, 3), int)}),
            "is of size (3, 3), the anno",
        ),
        (lambda x: x.pixels.update({("b", 2): np.zeros(SIZE, int)}), "has no pixel of segment "),
    ],
)
def test_bad_predictions_are_named(inputs, change, expected):
    change(inputs)
    with pytest.raises(SystemExit) as stop:
        compare_detectors.main([*inputs.write(), "--out", str(inputs.folder / "out")])
    message = str(stop.value.code)
    assert message.startswith("error: --detector b ") and "\n" not in message
    assert expected in message
    assert not (inputs.folder / "out").exists()


def test_config_with_published_numbers_has_them_beside(inputs):
    config = next(
        path for one in published_results() if "panoptic" in one.results for path in one.configs
    )
    given = ["--config", f"b={CONFIGS / config}", "--out", str(inputs.folder / "out")]
    compare_detectors.main([*inputs.write(), *given])
    *_, section = json.loads((inputs.folder / "out" / "report.json").read_text())["sections"]
    assert section["title"] == "Beside the papers" and "not COCO val2017" in section["text"]
    (((metric, here, published, difference), *_),) = (t["rows"] for t in section["tables"])
    assert (metric, published, difference) == ("PQ", 45.1, None) and here > 50
    given[1] += f":{inputs.folder / 'b.json'}"
    with pytest.raises(SystemExit, match="takes results files and configs, no checkpoints"):
        compare_detectors.main([*inputs.write(), *given])


def test_control_is_compared_with(inputs):
    command = inputs.write()
    shutil.copytree(inputs.folder / "a", inputs.folder / "c")
    shutil.copy(inputs.folder / "a.json", inputs.folder / "c.json")
    given = [f"--detector=c={inputs.folder / 'c.json'}", "--control", "c"]
    compare_detectors.main([*command, *given, "--out", str(inputs.folder / "out")])
    report = json.loads((inputs.folder / "out" / "report.json").read_text())
    assert report["verdict"].startswith("In these trainings b is better than a: PQ ")
    beside, from_control = (
        next(t for t in report["sections"][1]["tables"] if t["title"] == f"PQ less that of {name}")
        for name in ("a", "c")
    )
    assert from_control["rows"] == [row for row in beside["rows"] if row[0] == "b"]


def test_pngs_of_the_ground_truth_may_be_elsewhere(inputs, capsys):
    command = inputs.write()
    (inputs.folder / "truth").rename(inputs.folder / "masks")
    options = ["--out", str(inputs.folder / "out")]
    with pytest.raises(SystemExit, match="there is no folder .*truth with its PNGs"):
        compare_detectors.main([*command, *options])
    compare_detectors.main([*command, *options, "--gt-masks", str(inputs.folder / "masks")])
    assert "b is better than a: PQ " in capsys.readouterr().out
