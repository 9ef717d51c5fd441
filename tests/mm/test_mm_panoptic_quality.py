"""Panoptic data and panoptic quality in MMDetection, without panopticapi."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip("hotcoco", reason="hotcoco is not installed")

from mmdet.datasets import CocoPanopticDataset
from mmdet.evaluation.functional import INSTANCE_OFFSET
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.structures import PixelData
from torch import nn

from mm_plugins.datasets import prepare
from mm_plugins.preflight import check_config
from mm_plugins.training_settings import check_training_settings
from plugin_core.errors import ArgumentError
from plugin_core.evaluation.coco_files import Source
from plugin_core.evaluation.comparison import panoptic

THINGS = ("person", "disk", "square", "triangle", "star", "ring", "cross")
STUFF = ("grass", "sand", "water", "brick", "stone", "sky")
META = {"classes": THINGS + STUFF, "thing_classes": THINGS, "stuff_classes": STUFF}
VOID = len(THINGS + STUFF)


def dataset_of(folder: Path, *pipeline: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "CocoPanopticDataset",
        "data_root": str(folder),
        "ann_file": "annotations/panoptic_val2017.json",
        "data_prefix": {"img": "val2017/", "seg": "annotations/panoptic_val2017/"},
        "metainfo": META,
        "pipeline": list(pipeline),
    }


def metric_of(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "type": "PanopticQualityMetric",
        "ann_file": str(folder / "annotations" / "panoptic_val2017.json"),
        "seg_prefix": str(folder / "annotations" / "panoptic_val2017"),
        **changed,
    }


def built(folder: Path) -> CocoPanopticDataset:
    pipeline = ({"type": "LoadImageFromFile"}, {"type": "LoadPanopticSegments"})
    arguments = {k: v for k, v in dataset_of(folder, *pipeline).items() if k != "type"}
    return CocoPanopticDataset(**arguments, test_mode=True)


def samples(folder: Path) -> list[dict[str, Any]]:
    """Predictions that are the truth, as ``PanopticDETR`` and MMDetection's detectors give it."""
    found = []
    for loaded in built(folder):
        labels = torch.from_numpy(loaded["gt_seg_map"]).long()
        labels[labels == 255] = VOID
        for i, mask in enumerate(loaded["gt_masks"].masks, 1):
            labels[torch.from_numpy(mask).bool()] += INSTANCE_OFFSET * i
        segments = PixelData(sem_seg=labels[None])
        found.append({"img_id": loaded["img_id"], "pred_panoptic_seg": segments.to_dict()})
    return found


def evaluate(folder: Path, predictions: list[dict[str, Any]], **changed: Any) -> dict[str, float]:
    metric = METRICS.build(metric_of(folder, **changed))
    metric.dataset_meta = META
    for prediction in predictions:
        metric.process({}, [prediction])
    return metric.evaluate(len(predictions))


def test_loader_gives_masks_of_things_and_a_map_of_classes(drawn_coco):
    annotations = json.loads((drawn_coco / "annotations" / "panoptic_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    for loaded, annotation in zip(built(drawn_coco), annotations["annotations"], strict=True):
        masks, classes = loaded["gt_masks"].masks, loaded["gt_seg_map"]
        labels = loaded["gt_bboxes_labels"]
        segments = [s for s in annotation["segments_info"] if s["area"] > 0]
        things = [s for s in segments if names[s["category_id"]] in THINGS]
        assert [m.sum() for m in masks] == [s["area"] for s in things]
        assert [META["classes"][label] for label in labels] == [
            names[s["category_id"]] for s in things
        ]
        for segment in segments:
            label = META["classes"].index(names[segment["category_id"]])
            same = [s["area"] for s in segments if s["category_id"] == segment["category_id"]]
            assert (classes == label).sum() == sum(same)
        for mask, label in zip(masks, labels, strict=True):
            assert (classes[mask.astype(bool)] == label).all()


def test_predictions_are_written_for_a_comparison(drawn_coco, tmp_path):
    evaluate(drawn_coco, samples(drawn_coco), outfile_prefix=str(tmp_path / "results"))
    file = drawn_coco / "annotations" / "panoptic_val2017.json"
    segments = panoptic.read_truth(Source("", str(file)), None)
    results = Source("", str(tmp_path / "results.panoptic.json"))
    written = panoptic.read_predictions(results, segments)
    assert panoptic.measure(segments, {"it": [written]}, 100).mean("it") == 100


def test_true_segments_have_the_full_quality(drawn_coco, monkeypatch):
    printed: list[str] = []
    monkeypatch.setattr("mm_plugins.panoptic_quality.print_log", lambda t, _: printed.append(t))
    scores = evaluate(drawn_coco, samples(drawn_coco), classwise=True)
    assert set(scores) == {
        f"coco_panoptic/{key}{group}" for key in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")
    }
    assert all(score == 100 for score in scores.values())
    assert "100.0" in printed[0]
    assert all(name in printed[1] for name in (*THINGS, *STUFF))


def test_a_missing_segment_and_a_wrong_class_cost_quality(drawn_coco):
    predictions = samples(drawn_coco)
    labels = predictions[0]["pred_panoptic_seg"]["sem_seg"]
    instance = labels[labels > INSTANCE_OFFSET].unique()[0]
    labels[labels == instance] = VOID
    for prediction in predictions[1:]:
        labels = prediction["pred_panoptic_seg"]["sem_seg"]
        stuff = labels[(labels >= len(THINGS)) & (labels < VOID)].unique()[0]
        labels[labels == stuff] = len(THINGS) + (stuff - len(THINGS) + 1) % len(STUFF)
    scores = evaluate(drawn_coco, predictions)
    for group in ("_th", "_st"):
        assert 0 < scores[f"coco_panoptic/RQ{group}"] < 100
        assert scores[f"coco_panoptic/PQ{group}"] < 100


@pytest.mark.parametrize("key", ["ann_file", "seg_prefix"])
def test_missing_file_is_an_error_that_names_the_argument(drawn_coco, key):
    with pytest.raises(ArgumentError, match="there is none at 'none'") as error:
        METRICS.build(metric_of(drawn_coco, **{key: "none"}))
    assert error.value.argument == key


# ---------------------------------------------------------------------------------------- preflight


def config_of(folder: Path, **changed: Any) -> Config:
    step = {"type": "LoadPanopticSegments"}
    return Config(
        {
            "test_dataloader": {"batch_size": 1, "dataset": dataset_of(folder, step)},
            "test_evaluator": metric_of(folder),
            **changed,
        }
    )


def test_good_settings_are_accepted(drawn_coco):
    cfg = config_of(drawn_coco)
    check_training_settings(cfg, train=False)
    assert prepare(cfg, None, train=False) == {}


@pytest.mark.parametrize("key", ["ann_file", "seg_prefix"])
@pytest.mark.parametrize("nested", [False, True])
def test_evaluator_of_another_dataset_is_an_error(drawn_coco, key, nested):
    other = str(drawn_coco / "annotations" / "panoptic_train2017")
    metrics = [metric_of(drawn_coco, **{key: other})]
    cfg = config_of(drawn_coco, test_evaluator={"metrics": metrics} if nested else metrics)
    where = rf"test_evaluator{'.metrics' if nested else ''}\[0\].{key}"
    with pytest.raises(ValueError, match=rf"{where}: '.*' is not what test_data"):
        prepare(cfg, None, train=False)


def test_evaluator_of_one_of_two_datasets_is_accepted(drawn_coco):
    cfg = config_of(drawn_coco)
    one, other = (copy.deepcopy(cfg.test_dataloader.dataset) for _ in range(2))
    other.ann_file = str(drawn_coco / "annotations" / "panoptic_train2017.json")
    other.data_prefix = {
        "img": str(drawn_coco / "train2017"),
        "seg": str(drawn_coco / "annotations" / "panoptic_train2017"),
    }
    cfg.test_dataloader.dataset = {"type": "ConcatDataset", "datasets": [other, one]}
    assert prepare(cfg, None, train=False) == {}


def test_segments_of_a_model_that_has_none_are_not_evaluated(drawn_coco):
    with pytest.raises(ValueError, match="test_evaluator: evaluates segments, which a model with"):
        prepare(config_of(drawn_coco), SimpleNamespace(trains="boxes"), train=False)


@pytest.mark.skipif(importlib.util.find_spec("panopticapi") is not None, reason="it is installed")
def test_types_that_need_panopticapi_are_refused_with_those_that_do_not(drawn_coco):
    metric = metric_of(drawn_coco, type="CocoPanopticMetric")
    cfg = config_of(drawn_coco, test_evaluator=metric)
    cfg.test_dataloader.dataset.pipeline[0].type = "LoadPanopticAnnotations"
    with pytest.raises(ValueError) as error:
        check_training_settings(cfg, train=False)
    message = str(error.value)
    assert "pipeline[0].type: LoadPanopticAnnotations needs panopticapi" in message
    assert "use type='LoadPanopticSegments' in its place" in message
    assert "test_evaluator.type: CocoPanopticMetric needs panopticapi" in message


def test_missing_package_of_the_metric_is_told_before_the_run(drawn_coco, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "hotcoco" else find_spec(name, *rest),
    )
    with pytest.raises(ValueError, match="test_evaluator.type: .* pip install 'hotcoco<2'"):
        check_training_settings(config_of(drawn_coco), train=False)


def test_mask_head_alone_is_not_trained_on_a_random_detector(monkeypatch):
    detector = nn.Module()
    detector.trains = "masks"
    monkeypatch.setattr("mm_plugins.preflight._check_model", lambda *_: detector)
    cfg = Config({"model": {"type": "PanopticDETR"}})
    with pytest.raises(ValueError, match="load_from: names no checkpoint"):
        check_config(cfg, train=True, resumes=False)
    assert check_config(cfg, train=False, resumes=False) is detector
    assert check_config(cfg, train=True, resumes=True) is detector
