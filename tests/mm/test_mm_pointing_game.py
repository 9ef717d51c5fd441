"""The pointing game's metric, and the transform that makes a caption's phrases a text."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from grounding_detectors import build, model_config, regularized, write_text_model
from make_synthetic_coco import make_dataset
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.dataset import pseudo_collate

from mm_plugins.grounding.datasets import _phrases_alone
from mm_plugins.grounding.pointing_game import points_into


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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "coco"
    make_dataset(out, train=0, val=8, size=64, progress=False)
    return out


def pipeline(*keys: str) -> list[dict]:
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", *keys)
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (96, 96), "keep_ratio": True},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "PackDetInputs", "meta_keys": meta},
    ]


@pytest.mark.parametrize("kind", ["CocoDataset", "MDETRStyleRefCocoDataset"])
def test_datasets_of_mmdetection_are_evaluated(kind, scenes, tmp_path):
    """Every annotated class of an image is a phrase; every expression is one of an image."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    of_classes = kind == "CocoDataset"
    file = "instances_val2017" if of_classes else "grounding_val2017_refcoco"
    dataset = DATASETS.build(
        {
            "type": kind,
            "data_root": str(scenes),
            "ann_file": f"annotations/{file}.json",
            "data_prefix": {"img": "val2017/"},
            "metainfo": {"classes": CLASSES} if of_classes else {},
            "test_mode": True,
            "return_classes": True,
            "pipeline": pipeline("text", "tokens_positive", "custom_entities", "dataset_mode"),
        }
    )
    name = "retinanet" if of_classes else "grounding-dino"
    model = model_config(name, None if of_classes else write_text_model(tmp_path / "text"))
    if of_classes:
        model.bbox_head.num_classes = len(CLASSES)
    detector = build(regularized(model, heatmap={"in_test": True})).eval()
    annotations = json.loads((scenes / "annotations" / f"{file}.json").read_text())
    metric = METRICS.build(
        {
            "type": "PointingGameMetric",
            "ann_file": str(scenes / "annotations" / f"{file}.json"),
            "out_file": str(tmp_path / "pointing_game.json"),
        }
    )
    metric.dataset_meta = dataset.metainfo
    images = [dataset[i] for i in range(min(len(dataset), 4))]
    for data in images:
        with torch.no_grad():
            results = detector.test_step(pseudo_collate([data]))
        metric.process(data, [result.to_dict() for result in results])
    metric.evaluate(len(images))
    written = json.loads((tmp_path / "pointing_game.json").read_text())
    ids = {data["data_samples"].img_id for data in images}
    names = {c["id"]: c["name"] for c in annotations["categories"]}
    of_images = [a for a in annotations["annotations"] if a["image_id"] in ids]
    phrases = {(a["image_id"], names[a["category_id"]]) for a in of_images}
    expected = Counter(name for _, name in phrases)
    assert {k: v["phrases"] for k, v in written["categories"].items()} == expected
    assert written["phrases"] == len(phrases)


CLASSES = ("person", "disk", "square", "triangle", "star", "ring", "cross")


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


def test_each_phrase_alone_is_an_image_with_its_boxes(scenes):
    settings = {
        "data_root": str(scenes),
        "ann_file": "annotations/grounding_val2017_flickr30k.json",
        "data_prefix": {"img": "val2017/"},
        "test_mode": True,
        "pipeline": [],
    }
    together = DATASETS.build({"type": "Flickr30kDataset", **settings})
    alone = iter(DATASETS.build({"type": "Flickr30kPhraseDataset", **settings}))
    assert max(len(of_image["phrases"]) for of_image in together) > 1
    for of_image in together:
        boxes, phrases = of_image["instances"], np.array(of_image["phrase_ids"])
        for number, phrase in enumerate(of_image["phrases"]):
            found = next(alone)
            assert found["img_path"] == of_image["img_path"]
            assert found["text"] == phrase and found["phrases"] == [phrase]
            assert found["tokens_positive"] == [[[0, len(phrase)]]]
            own = [boxes[i] for i in np.flatnonzero(phrases == number)]
            assert found["instances"] == own and found["phrase_ids"] == [0] * len(own)
    with pytest.raises(StopIteration):
        next(alone)


def test_a_detector_reads_a_phrase_alone(scenes, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    dataset = DATASETS.build(
        {
            "type": "Flickr30kPhraseDataset",
            "data_root": str(scenes),
            "ann_file": "annotations/grounding_val2017_flickr30k.json",
            "data_prefix": {"img": "val2017/"},
            "test_mode": True,
            "pipeline": pipeline("text", "tokens_positive", "phrases", "phrase_ids"),
        }
    )
    text_model = write_text_model(tmp_path / "text")
    model = model_config("grounding-dino", text_model)
    detector = build(regularized(model, heatmap={"in_test": True})).eval()
    texts: list[str] = []
    detector.language_model.register_forward_hook(
        lambda _module, args, _output: texts.extend(*args)
    )
    (result,) = detector.test_step(pseudo_collate([dataset[1]]))
    assert [text.rstrip(". ") for text in texts] == result.phrases
    assert result.phrase_heatmaps.labels.tolist() == [0]
    metric = METRICS.build({"type": "PointingGameMetric"})
    metric.process({}, [result.to_dict()])
    assert metric.evaluate(1)["pointing_game/accuracy"] in (0, 1)


def test_a_phrase_in_pieces_alone_is_its_pieces_in_lower_case():
    instances = [{"bbox": [0, 0, 1, 1]}, {"bbox": [1, 1, 2, 2]}]
    of_image = {
        "text": "The Red and a large Disk.",
        "tokens_positive": [[[0, 7]], [[14, 19], [20, 24]]],
        "phrase_ids": [1, 1],
        "instances": instances,
    }
    (alone,) = _phrases_alone(of_image)
    assert alone["text"] == "large disk" and alone["instances"] == instances


def refer_files(folder: Path) -> dict[str, Any]:
    """Two images, of the first one two expressions, in REFER's layout."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in (1, 2)]
    boxes = [
        {"id": 10 * i, "image_id": i, "bbox": [i, 2, 3, 4], "category_id": 7 + i} for i in (1, 2)
    ]
    refs = [
        {
            "ref_id": 100 * i,
            "ann_id": 10 * i,
            "image_id": i,
            "split": split,
            "sentences": [{"raw": text} for text in texts],
        }
        for i, split, texts in ((1, "val", ["Red Disk", "the disk"]), (2, "test", ["a star"]))
    ]
    folder.joinpath("instances.json").write_text(
        json.dumps({"images": images, "annotations": boxes})
    )
    folder.joinpath("refs(unc).p").write_bytes(pickle.dumps(refs))
    return {
        "type": "ReferDataset",
        "data_root": str(folder),
        "ann_file": "instances.json",
        "split_file": "refs(unc).p",
        "data_prefix": {"img_path": "images"},
        "test_mode": True,
        "pipeline": [],
    }


def test_every_expression_of_refers_files_is_an_image_with_its_box(tmp_path):
    dataset = DATASETS.build({**refer_files(tmp_path), "split": "val"})
    first, second = dataset
    assert [first["text"], second["text"]] == ["red disk", "the disk"]
    assert first["img_path"] == str(tmp_path / "images" / "1.jpg")
    assert first["tokens_positive"] == -1 and first["custom_entities"] is False
    instance = {"bbox": [1, 2, 4, 6], "bbox_label": 8, "ignore_flag": 0}
    assert first["instances"] == second["instances"] == [instance]


def test_a_split_that_refers_files_lack_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"refs\(unc\).p, which has test, val, got 'testA'"):
        DATASETS.build({**refer_files(tmp_path), "split": "testA"})
