"""tools/compare_detectors.py: what it prints and writes, and bad input."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

import compare_detectors
import evaluate_context_bias
import pytest
from PIL import Image

from plugin_core.evaluation.comparison import bias
from plugin_core.evaluation.comparison.accuracy import Accuracy, accuracy
from plugin_core.evaluation.comparison.detections import Detections, Truth
from plugin_core.evaluation.comparison.evaluations import Checkpoint, read_seeds
from plugin_core.evaluation.comparison.inputs import named_files
from plugin_core.evaluation.comparison.sections import Section

BOXES = [[10 + 7 * i, 12, 20 + 3 * i, 30] for i in range(6)]


class Inputs:
    """Twelve images of a cup and a table, and results; a test changes and writes them again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth: Any = {
            "images": [
                {"id": i, "height": 100, "width": 100, "file_name": f"{i}.png"}
                for i in range(1, 13)
            ],
            "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "table"}],
            "annotations": [
                {
                    "id": 2 * i + category,
                    "image_id": i,
                    "category_id": category,
                    "bbox": BOXES[i % 6],
                    "area": BOXES[i % 6][2] * 30,
                    "iscrowd": 0,
                    "segmentation": [[1, 1, 9, 1, 9, 9]],
                }
                for i in range(1, 13)
                for category in (1, 2)
            ],
        }
        self.poor: Any = self.detections(found=range(0, 24, 3))
        self.other_poor: Any = self.detections(found=range(1, 24, 3))
        self.good: Any = self.detections(found=range(23))

    def detections(self, found: range) -> list[dict[str, Any]]:
        objects = [self.truth["annotations"][i] for i in found]
        return [
            {key: one[key] for key in ("image_id", "category_id", "bbox")}
            | {"score": 0.9 - 0.01 * n}
            for n, one in enumerate(objects)
        ]

    def write(self, name: str) -> str:
        path = self.folder / f"{name}.json"
        content = getattr(self, name)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def options(self, *detectors: str) -> list[str]:
        """The command line; a detector is NAME=CONTENT,CONTENT of this class."""
        options = [self.write("truth"), "--out", str(self.folder / "out"), "--resamples", "100"]
        for detector in detectors:
            name, contents = detector.split("=")
            files = [self.write(content) for content in contents.split(",")]
            options += ["--detector", f"{name}={','.join(files)}"]
        return options


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


@pytest.fixture
def numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_detectors, "analyses", lambda *_: [])


def of_boxes(truth: dict[str, Any], results: list[dict[str, Any]]) -> Accuracy:
    return accuracy(Detections(Truth(truth, "bbox"), results))


def report_of(inputs: Inputs) -> dict[str, Any]:
    return json.loads((inputs.folder / "out" / "report.json").read_text())


def error_of(inputs: Inputs, *argv: str) -> str:
    """The one line that it says of bad input, having written nothing."""
    with pytest.raises(SystemExit) as stop:
        compare_detectors.main(argv)
    message = stop.value.code  # a text: printed to stderr, exit status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert not (inputs.folder / "out").is_dir()
    return message


@pytest.mark.usefixtures("numbers_alone")
def test_the_better_detector_is_called_so(inputs, capsys):
    compare_detectors.main(inputs.options("plain=poor", "triplet=good"))
    printed = capsys.readouterr().out
    assert "triplet is better than plain: AP " in printed
    report = report_of(inputs)
    assert report["verdict"] in printed
    of_plain = of_boxes(inputs.truth, inputs.poor)
    measured, differences = (section["data"] for section in report["sections"][:2])
    assert measured["plain"][0]["metrics"]["AP"] == of_plain.metrics["AP"]
    assert f"{of_plain.metrics['AP']:.1f}" in printed
    ap = differences["triplet"]["differences"][0]
    assert ap["metric"] == "AP" and 0 < ap["low"] < ap["difference"] < ap["high"]
    classes = [d["class_name"] for d in differences["triplet"]["differences"] if d["class_name"]]
    assert classes == ["cup", "table"]
    assert report["sections"][0]["text"].endswith(" On 12 images with 24 objects.")
    of_classes = [section["tables"][-1] for section in report["sections"][:2]]
    assert all(table["headers"][:2] == ["class", "objects"] for table in of_classes)
    assert all(table["rows"][0][:2] == ["cup", 12] for table in of_classes)


def test_report_shows_where_the_difference_comes_from(inputs, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for image in inputs.truth["images"]:
        Image.new("RGB", (100, 100), "gray").save(folder / image["file_name"])
    options = inputs.options("plain=poor", "triplet=good")
    compare_detectors.main([*options, "--images", str(folder)])
    out = inputs.folder / "out"
    titles = [section["title"] for section in report_of(inputs)["sections"]]
    assert len(titles) == len(set(titles)) == 7
    page = (out / "report.html").read_text()
    assert all(html.escape(title) in page for title in titles)
    assert page.count("data:image/png;base64,") == len([*(out / "figures").iterdir()]) > 4
    assert (out / "report.md").is_file() and (out / "tables.tex").is_file()


@pytest.mark.usefixtures("numbers_alone")
def test_contextual_bias_is_that_of_the_tool_for_it_on_the_same_pairs(
    inputs, tmp_path, monkeypatch
):
    drawn: list[Any] = []
    monkeypatch.setattr(bias, "draw_bars", lambda *args: drawn.append(args) or b"")
    inputs.truth["annotations"] = [
        one
        for one in inputs.truth["annotations"]
        if one["category_id"] == 1 or one["image_id"] % 3  # tables in company alone
    ]
    inputs.poor = inputs.detections(range(0, 20, 2))
    inputs.good = inputs.detections(range(19))
    options = inputs.options("plain=poor,other_poor", "triplet=good")
    train = ["--train-annotations", options[0]]
    compare_detectors.main([*options, *train])
    section = report_of(inputs)["sections"][-1]
    assert section["title"] == "Contextual bias"
    assert drawn[0][0] == ["cup"]  # the other class has no gap
    mean, gaps = section["tables"]
    assert [row[0] for row in mean["rows"]] == ["plain", "triplet", "classes in the mean"]
    assert [row[:2] for row in gaps["rows"]] == [["cup", "table"], ["table", "cup"]]
    out, results = tmp_path / "bias", str(inputs.folder / "good.json")
    options_of_it = ["--results", results, "--score-threshold", "0.3", "--out", str(out)]
    evaluate_context_bias.main(["--annotations", options[0], *options_of_it, *train])
    expected = json.loads((out / "context_bias.json").read_text())
    found = section["data"]["triplet"]
    assert found["classes"] == expected["classes"] and found["classes"][0]["gap"] is not None
    assert found["mean"] == {number: one["value"] for number, one in expected["mean"].items()}
    assert mean["rows"][1][1:] == list(found["mean"].values())
    pairs = ["--pairs", str(tmp_path / "bias" / "context_bias.json")]
    compare_detectors.main([*options, *pairs])
    assert report_of(inputs)["sections"][-1]["data"] == section["data"]


@pytest.mark.usefixtures("numbers_alone")
def test_files_of_one_name_are_seeds(inputs, capsys):
    options = inputs.options("plain=poor", "triplet=good", "plain=other_poor")
    compare_detectors.main(options)
    first, second = (of_boxes(inputs.truth, r) for r in (inputs.poor, inputs.other_poor))
    mean = (first.metrics["AP"] + second.metrics["AP"]) / 2
    deviation = abs(first.metrics["AP"] - second.metrics["AP"]) / 2**0.5
    assert f"{mean:.1f} ± {deviation:.1f}" in capsys.readouterr().out
    spread = report_of(inputs)["sections"][1]["data"]["triplet"]["spread"]
    assert spread["over_seeds"] == [pytest.approx(deviation), None]
    compare_detectors.main(inputs.options("plain=poor,other_poor", "triplet=good"))
    assert report_of(inputs)["sections"][1]["data"]["triplet"]["spread"] == spread


def test_sections_of_a_first_seed_say_so_beside_means_over_seeds(inputs, monkeypatch):
    monkeypatch.setattr(compare_detectors, "analyses", lambda *_: [Section("Errors", "Of kinds.")])
    texts = []
    for plain in ("poor", "poor,other_poor"):
        compare_detectors.main(inputs.options(f"plain={plain}"))
        texts.append(report_of(inputs)["sections"][-1]["text"])
    assert texts[0] == "Of kinds."
    assert texts[1].startswith("Of kinds. Of the first seed of each detector")


@pytest.mark.usefixtures("numbers_alone")
def test_the_noise_of_the_baseline_comes_first(inputs):
    compare_detectors.main(
        inputs.options("plain=poor,other_poor", "triplet=good", "same=other_poor")
    )
    report = report_of(inputs)
    seeds, overview = report["sections"][1]["tables"][:2]
    first, second = seeds["rows"][0][1:3]
    deviation = abs(first - second) / 2**0.5
    assert seeds["rows"][0] == [
        "AP",
        first,
        second,
        *map(pytest.approx, (deviation, abs(first - second))),
    ]
    assert report["verdict"].startswith(
        f"1 of 2 detectors beats the noise of plain, whose AP varies by {deviation:.1f} "
        "(standard deviation over 2 seeds): triplet.\n"
        "In these trainings triplet is better than plain: AP "
    )
    assert overview["headers"] == ["detector", "difference", "low", "high", "p", "p (Holm)"]
    assert [row[0] for row in overview["rows"]] == ["triplet", "same"]
    of_both = [
        report["sections"][1]["data"][name]["differences"][0] for name in ("triplet", "same")
    ]
    assert of_both[0]["p_holm"] == pytest.approx(2 * of_both[0]["p"])


@pytest.mark.usefixtures("numbers_alone")
def test_control_is_compared_with_but_not_counted(inputs):
    detectors = ("plain=poor", "wide=other_poor", "triplet=good")
    compare_detectors.main([*inputs.options(*detectors), "--control", "wide"])
    report = report_of(inputs)
    assert report["verdict"].startswith("In these trainings triplet is better than plain: AP ")
    section = report["sections"][1]
    beside = next(t for t in section["tables"] if t["title"] == "AP less that of wide")
    assert [row[0] for row in beside["rows"]] == ["triplet"]
    found = section["data"]["triplet"]["difference_from_control"]
    expected = of_boxes(inputs.truth, inputs.good).metrics["AP"]
    expected -= of_boxes(inputs.truth, inputs.other_poor).metrics["AP"]
    assert found["difference"] == beside["rows"][0][1] == pytest.approx(expected)
    assert found["low"] < expected < found["high"] and found["p_holm"] == found["p"]
    assert section["data"]["wide"]["difference_from_control"] is None
    for name in ("wide", "triplet"):  # one comparison, so that Holm's correction changes nothing
        ap = section["data"][name]["differences"][0]
        assert ap["p_holm"] == ap["p"] > 0
    gate = ["--control", "wide", "--fail-below", "10"]  # which the control alone would not pass
    compare_detectors.main([*inputs.options(*detectors), *gate])
    alone = inputs.options("plain=poor", "wide=good")
    compare_detectors.main([*alone, "--control", "wide"])
    assert report_of(inputs)["verdict"].startswith("In these trainings wide is better than plain")
    compare_detectors.main([*inputs.options("plain=poor,other_poor", "wide=good"), *gate[:2]])
    assert "noise" not in report_of(inputs)["verdict"]
    with pytest.raises(SystemExit, match="--fail-below: expected a number, and a detector beside"):
        compare_detectors.main([*alone, *gate])


def test_one_detector_is_measured_without_a_comparison(inputs, capsys):
    compare_detectors.main(inputs.options("plain=poor"))
    titles = [section["title"] for section in report_of(inputs)["sections"]]
    assert len(titles) == 5 and not any("ifference" in title for title in titles)
    assert "better" not in capsys.readouterr().out


@pytest.mark.usefixtures("numbers_alone")
def test_no_detection_at_all_is_an_ap_of_zero(inputs):
    inputs.poor = []
    compare_detectors.main(inputs.options("plain=good", "triplet=poor"))
    assert report_of(inputs)["verdict"].startswith(
        "In these trainings triplet is worse than plain: AP 0.0 against"
    )


@pytest.mark.usefixtures("numbers_alone")
def test_fail_below_is_a_gate_that_still_writes_the_report(inputs):
    options = inputs.options("plain=poor", "triplet=good")
    compare_detectors.main([*options, "--fail-below", "10"])
    with pytest.raises(SystemExit) as stop:
        compare_detectors.main([*options, "--fail-below", "90"])
    assert str(stop.value.code).startswith("failed: AP of triplet is ")
    assert report_of(inputs)["settings"]["fail_below"] == 90
    worse = inputs.options("plain=good", "triplet=poor")
    compare_detectors.main([*worse, "--fail-below", "-90"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"image_id": 77},
            "detections: 1 of 23 are of images that annotations {truth} does not list, the first "
            "of image_id 77 (it lists 1 to 12); are both of the same dataset and split?",
        ),
        (
            {"category_id": 9},
            "detections: 1 of 23 are of categories that annotations {truth} does not list, the "
            "first of category_id 9 (it lists 1 to 2); are both of the same dataset and split?",
        ),
        ({"score": float("nan")}, "--iou-type bbox: detection 2: score cannot be nan"),
        ({"bbox": [1, 2, 3]}, "--iou-type bbox: detection 2: bbox cannot be [1, 2, 3]"),
    ],
)
def test_a_bad_detection_is_named_by_file_and_place(inputs, change, expected):
    inputs.good[2].update(change)
    message = error_of(inputs, *inputs.options("plain=poor", "triplet=good"))
    assert message.startswith(f"error: --detector triplet {inputs.folder}/good.json")
    assert message.endswith(expected.format(truth=inputs.folder / "truth.json"))


def test_crowds_alone_leave_nothing_to_measure(inputs):
    for annotation in inputs.truth["annotations"]:
        annotation["iscrowd"] = 1
    message = error_of(inputs, *inputs.options("plain=poor", "triplet=good"))
    assert message.endswith("truth.json: no object to be found; all are crowds")


@pytest.mark.usefixtures("numbers_alone")
def test_one_image_has_no_interval(inputs):
    inputs.truth["images"], inputs.truth["annotations"] = (
        inputs.truth[key][:n] for key, n in (("images", 1), ("annotations", 2))
    )
    inputs.poor, inputs.good = inputs.poor[:1], inputs.good[:2]
    compare_detectors.main(inputs.options("plain=poor", "triplet=good"))
    report = report_of(inputs)
    assert report["verdict"].startswith(
        "triplet and plain are not told apart: AP 100.0 against 50.0"
    )
    assert report["sections"][1]["data"]["triplet"]["differences"][0]["low"] is None


def test_an_empty_file_is_named(inputs):
    inputs.good = ""
    message = error_of(inputs, *inputs.options("plain=poor", "triplet=good"))
    assert message == (
        f"error: --detector triplet {inputs.folder}/good.json is empty; expected JSON"
    )


def test_a_missing_file_is_named(inputs):
    options = [*inputs.options("plain=poor"), "--detector", "triplet=none.json"]
    assert error_of(inputs, *options) == (
        "error: --detector triplet none.json: No such file or directory"
    )


@pytest.mark.usefixtures("numbers_alone")
def test_results_of_few_of_the_images_are_doubted(inputs, capsys):
    inputs.poor = inputs.detections(range(10))  # five of twelve images
    compare_detectors.main(inputs.options("plain=good", "triplet=poor"))
    doubt = "poor.json has no detection in 7 of the 12 images with objects; is it of this dataset"
    assert capsys.readouterr().err.count("has no detection") == 1
    assert doubt in report_of(inputs)["sections"][0]["text"]


def test_boxes_have_no_masks_and_no_keypoints(inputs):
    options = inputs.options("plain=poor")
    assert f"plain {inputs.folder}/poor.json, --iou-type segm: detection 0 has no segment" in (
        error_of(inputs, *options, "--iou-type", "segm")
    )
    assert f"{inputs.folder}/truth.json, --iou-type keypoints: annotation 0 has no num_keyp" in (
        error_of(inputs, *options, "--iou-type", "keypoints")
    )


def test_keypoints_are_compared_with_all_analyses(inputs, capsys):
    for record in inputs.truth["annotations"] + inputs.poor + inputs.good:
        x, y, w, h = record["bbox"]
        record["keypoints"] = [v for i in range(17) for v in (x + w * i / 16, y + h * i / 16, 2)]
    for annotation in inputs.truth["annotations"]:
        annotation["num_keypoints"] = 17
    options = inputs.options("plain=poor", "triplet=good")
    compare_detectors.main([*options, "--iou-type", "keypoints"])
    assert "triplet is better than plain: AP " in capsys.readouterr().out
    report = report_of(inputs)
    assert len(report["sections"]) == 7
    assert report["sections"][0]["tables"][0]["headers"] == (
        ["detector", "AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
    )


def test_masks_of_another_size_are_of_another_dataset(inputs):
    inputs.poor[1]["segmentation"] = {"size": [50, 100], "counts": "`o0"}
    inputs.poor[0]["segmentation"] = {"size": [100, 100], "counts": "`l2"}
    inputs.poor = inputs.poor[:2]
    message = error_of(inputs, *inputs.options("plain=poor"), "--iou-type", "segm")
    assert "detection 1: its mask is of size [50, 100], image 2 of [100, 100]" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--detector", "good.json"], "--detector good.json: expected NAME=FILE or NAME=FILE,FILE"),
        (["--detector", "a="], "--detector a=: expected NAME=FILE or NAME=FILE,FILE"),
        (["--detector", "a=b,b"], "--detector a: b is given twice; a file is one seed"),
        (["--pairs", "none.json"], "--pairs none.json: No such file"),
        (
            ["--pairs", "p.json", "--iou-type", "keypoints"],
            "--pairs and --train-annotations: not of --iou-type keypoints",
        ),
        (["--resamples", "5"], "--resamples 5: expected at least 100"),
        (["--score-threshold", "nan"], "--score-threshold nan: expected a number from 0 to 1"),
        (["--images", "."], "--images .: has none of GT's images, as '1.png'"),
        (["--images", ".", "--iou-type", "panoptic"], "--images: --iou-type panoptic takes PNGs"),
        (["--gt-masks", "."], "--gt-masks: not of --iou-type bbox"),
        (["--out", "/proc/none/x"], "--out /proc/none/x: No such file or directory"),
        (["--fail-below", "1"], "--fail-below: expected a number, and a detector beside"),
        (["--control", "plain"], "--control plain: expected the name of a --detector that is not"),
        (["--control", "none"], "--control none: expected the name of a --detector that is not"),
    ],
)
def test_bad_options_are_named(inputs, options, expected):
    assert expected in error_of(inputs, *inputs.options("plain=poor"), *options)


@pytest.mark.parametrize(
    ("detector", "expected"),
    [
        ("a=none.yaml:a.pth", "--detector a: none.yaml: there is no such config file"),
        ("a={0}/a.py:b.pth", "--detector a: there is no checkpoint 'b.pth'"),
        ("a={0}/a.yaml:{0}/a.pth,b.pth", "--detector a: there is no checkpoint 'b.pth'"),
        ("a={0}/a.yaml:{0}/a.pth,{0}/a.pth", "--detector a: {0}/a.pth is given twice"),
        ("a={0}/a.yaml", "--detector a: {0}/a.yaml is neither results (.json) nor CONFIG:WEIG"),
        ("a={0}/a.pth", "--detector a: {0}/a.pth is neither results (.json) nor CONFIG:WEIGHTS"),
        ("a={0}/a.yaml:{0}/a.pth", "--detector a: a checkpoint is evaluated on the images of --im"),
    ],
)
def test_checkpoints_are_checked_before_any_is_evaluated(inputs, detector, expected):
    for name in ("a.yaml", "a.py", "a.pth"):
        (inputs.folder / name).touch()
    options = [*inputs.options("plain=poor"), "--detector", detector.format(inputs.folder)]
    assert expected.format(inputs.folder) in error_of(inputs, *options)


def test_seeds_are_checkpoints_or_results(inputs):
    (config, weights) = (str(inputs.folder / name) for name in ("b.yaml", "b.pth"))
    for path in (config, weights):
        Path(path).touch()
    address = "https://host:80/a.pth"
    files = named_files([f"a=x.json,{config}:{weights},{address}", f"a={config}:{address}?x"])
    assert read_seeds({"a": [*files["a"], "y.json"]}) == {
        "a": [
            "x.json",
            Checkpoint(config, weights),
            Checkpoint(config, address),
            Checkpoint(config, f"{address}?x"),
            "y.json",
        ]
    }


def test_package_of_the_log_is_asked_for_before_the_work(inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    message = error_of(inputs, *inputs.options("plain=poor"), "--log", "wandb")
    assert message == "error: --log wandb: is not installed: pip install wandb"


@pytest.mark.usefixtures("numbers_alone")
def test_each_detector_is_a_run_of_tensorboard(inputs):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    compare_detectors.main([*inputs.options("a/b=poor,other_poor"), "--log", "tensorboard"])
    events = reader.EventAccumulator(str(inputs.folder / "out/tensorboard/a-b")).Reload()
    of_seeds = [
        of_boxes(inputs.truth, one).metrics["AP"] for one in (inputs.poor, inputs.other_poor)
    ]
    logged = [(event.step, event.value) for event in events.Scalars("AP")]
    assert logged == [(0, pytest.approx(of_seeds[0])), (1, pytest.approx(of_seeds[1]))]
    assert "AP50" in events.Tags()["scalars"]


def test_out_that_is_a_file_is_refused_before_the_work(inputs):
    (inputs.folder / "out").write_text("")
    message = error_of(inputs, *inputs.options("plain=poor"))
    assert message.endswith("is a file, not a folder")
