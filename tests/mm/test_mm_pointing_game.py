"""The pointing game's metric, and the transform that makes a caption's phrases a text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.registry import METRICS, TRANSFORMS

from mm_plugins.pointing_game import points_into


def heatmap(x: int, y: int, size: tuple[int, int] = (10, 12)) -> torch.Tensor:
    heat = torch.zeros(size)
    heat[y, x] = 1.0
    return heat


def sample(heatmaps: dict[int, torch.Tensor], boxes: list, labels: list, **meta: Any) -> dict:
    """What a detector predicted for an image of 10×12, as an evaluator gives it to a metric."""
    return {
        "phrase_heatmaps": {
            "labels": torch.tensor(list(heatmaps), dtype=torch.long),
            "heatmaps": torch.stack(list(heatmaps.values()))
            if heatmaps
            else torch.zeros(0, 10, 12),
        },
        "gt_instances": {"bboxes": torch.tensor(boxes, dtype=torch.float), "labels": labels},
        "ori_shape": (10, 12),
        **meta,
    }


LEFT, RIGHT = [0, 0, 4, 4], [8, 4, 12, 10]


@pytest.mark.parametrize(
    ("x", "y", "hit"), [(0, 0, True), (3, 3, True), (4, 0, False), (8, 4, True), (7, 9, False)]
)
def test_a_point_is_the_centre_of_its_pixel(x, y, hit):
    assert points_into(heatmap(x, y), torch.tensor([LEFT, RIGHT]).float()) is hit


def test_a_heatmap_without_a_maximum_points_nowhere():
    boxes = torch.tensor([[0.0, 0, 12, 10]])
    assert not points_into(torch.zeros(10, 12), boxes)
    assert not points_into(None, boxes)


def evaluate(samples: list[dict], **settings: Any) -> dict[str, float]:
    metric = METRICS.build({"type": "PointingGameMetric", **settings})
    metric.process({}, samples)
    return metric.evaluate(len(samples))


def test_accuracy_of_classes_in_total_and_of_each(tmp_path):
    """A class with two boxes is one phrase; classes of one image count each."""
    annotations = tmp_path / "annotations.json"
    categories = [{"id": 4, "name": "disk"}, {"id": 7, "name": "square"}]
    annotations.write_text(json.dumps({"categories": categories}))
    out = tmp_path / "pointing_game.json"
    samples = [
        sample({4: heatmap(8, 4), 7: heatmap(8, 4)}, [LEFT, RIGHT, LEFT], torch.tensor([4, 4, 7])),
        sample({7: heatmap(1, 1)}, [LEFT], torch.tensor([7])),
    ]
    metrics = evaluate(samples, ann_file=str(annotations), out_file=str(out))
    assert metrics["pointing_game/accuracy"] == pytest.approx(2 / 3)
    assert metrics["pointing_game/accuracy/disk"] == 1.0
    assert metrics["pointing_game/accuracy/square"] == 0.5
    chance = [(16 + 24) / 120, 16 / 120, 16 / 120]
    assert metrics["pointing_game/chance"] == pytest.approx(sum(chance) / 3)
    written = json.loads(out.read_text())
    assert written["accuracy"] == pytest.approx(2 / 3) and written["phrases"] == 3
    assert written["categories"]["square"]["phrases"] == 2
    assert written["categories"]["disk"]["chance"] == pytest.approx(chance[0])


def test_flickr30ks_phrases_are_told_apart_by_their_ids():
    """Boxes of one category, and phrases in another order than the boxes."""
    of_image = sample(
        {0: heatmap(8, 4), 1: heatmap(8, 4)},
        [LEFT, RIGHT],
        torch.tensor([1, 1]),
        phrase_ids=[1, 0],
        tokens_positive=[[[0, 3]], [[4, 8]]],
    )
    metrics = evaluate([of_image])
    assert metrics["pointing_game/accuracy"] == metrics["pointing_game/accuracy/1"] == 0.5


def test_refcocos_image_has_one_expression():
    of_image = sample({0: heatmap(1, 1)}, [LEFT], torch.tensor([7]), tokens_positive=-1)
    metrics = evaluate([of_image])
    assert metrics["pointing_game/accuracy"] == metrics["pointing_game/accuracy/7"] == 1.0


def test_a_category_may_be_called_all():
    metric = METRICS.build({"type": "PointingGameMetric"})
    metric.dataset_meta = {"classes": ("all", "disk")}
    heatmaps = {0: heatmap(1, 1), 1: heatmap(9, 1)}
    metric.process({}, [sample(heatmaps, [LEFT, LEFT], torch.tensor([0, 1]))])
    results = metric.evaluate(1)
    assert results["pointing_game/accuracy"] == 0.5
    assert results["pointing_game/accuracy/all"] == 1.0


def test_a_phrase_without_a_heatmap_misses():
    of_image = sample({}, [LEFT], torch.tensor([0]))
    assert evaluate([of_image])["pointing_game/accuracy"] == 0.0


def test_names_are_those_of_the_dataset_or_numbers(tmp_path):
    """COCO's labels count the classes, whatever ids the annotation file has."""
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"categories": [{"id": 1, "name": "disk"}]}))
    metric = METRICS.build({"type": "PointingGameMetric", "ann_file": str(file)})
    metric.dataset_meta = {"classes": ("disk",)}
    metric.process({}, [sample({0: heatmap(1, 1)}, [LEFT, LEFT], torch.tensor([0, 5]))])
    assert {"pointing_game/accuracy/disk", "pointing_game/accuracy/5"} <= set(metric.evaluate(1))


def test_predictions_without_heatmaps_say_what_to_set():
    of_image = sample({}, [LEFT], torch.tensor([0]))
    del of_image["phrase_heatmaps"]
    with pytest.raises(ValueError, match=r"heatmap=dict\(in_test=True\)"):
        evaluate([of_image])
    with pytest.raises(ValueError, match="no image has an annotated phrase"):
        evaluate([sample({}, torch.zeros(0, 4).tolist(), torch.zeros(0))])


def test_a_result_that_was_there_stays_if_nothing_is_measured(tmp_path):
    out = tmp_path / "pointing_game.json"
    out.write_text("before")
    with pytest.raises(ValueError):
        evaluate([sample({}, [], torch.zeros(0))], out_file=str(out))
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


def test_phrases_become_the_text_and_labels_positions_in_it():
    transform = TRANSFORMS.build({"type": "PhrasesAsText"})
    results = transform(
        {
            "text": "A star, the Red Disk, and dots.",
            "phrases": {
                4: {"phrase": "the Red Disk", "tokens_positive": [[8, 20]]},
                1: {"phrase": ["a star", "dots"], "tokens_positive": [[0, 6], [26, 30]]},
            },
            "gt_bboxes_labels": np.array([4, 1, 4]),
        }
    )
    assert results["text"] == ("a star dots", "the red disk")
    assert results["gt_bboxes_labels"].tolist() == [1, 0, 1]
    assert results["custom_entities"] is True and "phrases" not in results


def test_an_image_without_phrases_has_an_empty_text():
    transform = TRANSFORMS.build({"type": "PhrasesAsText"})
    empty = np.zeros(0, np.int64)
    results = transform({"text": "grass.", "phrases": {}, "gt_bboxes_labels": empty})
    assert results["text"] == () and len(results["gt_bboxes_labels"]) == 0
