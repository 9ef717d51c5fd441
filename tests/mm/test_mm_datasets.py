"""What tools/train_mmdet.py and tools/test_mmdet.py find out about their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.datasets import CocoDataset
from mmengine.config import Config
from torch import nn

from mm_plugins.datasets import prepare

NAMES = ("cat", "dog")


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """A dataset that is there: its annotations and its folder of images."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "images" / "a.png")
    write(tmp_path)
    return {
        "type": "CocoDataset",
        "data_root": str(tmp_path),
        "ann_file": "annotations/train.json",
        "data_prefix": {"img": "images/"},
        "metainfo": {"classes": NAMES},
    }


def write(folder: Path, names: tuple[str, ...] = NAMES, **changed: Any) -> None:
    """Write an annotation file with an object of each class, by the order of ``names``."""
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    rest = {"image_id": 1, "bbox": [1, 1, 9, 8], "area": 72, "iscrowd": 0}
    annotations = [{"id": i, "category_id": i, **rest} for i in range(1, len(names) + 1)]
    images = [{"id": 1, "file_name": "a.png", "width": 20, "height": 16}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "train.json").write_text(json.dumps(content | changed))


def config(**top: Any) -> Config:
    return Config(top)


def check(cfg: Config, *, train: bool = True, model: nn.Module | None = None) -> dict[str, str]:
    return prepare(cfg, model, train=train)


def error_of(cfg: Config, *, train: bool = True, model: nn.Module | None = None) -> str:
    with pytest.raises(ValueError) as error:
        check(cfg, train=train, model=model)
    return " ".join(str(error.value).split())


def labels_of(dataset: dict[str, Any], changes: dict[str, str]) -> list[int]:
    """Load a dataset as MMDetection does, with an annotation file in place of its own."""
    rest = {key: value for key, value in dataset.items() if key != "type"}
    own = changes.get("train_dataloader.dataset.ann_file", dataset["ann_file"])
    built = CocoDataset(**rest | {"ann_file": own}, pipeline=[])
    return [instance["bbox_label"] for instance in built.get_data_info(0)["instances"]]


@pytest.mark.parametrize(
    ("train", "loaders"),
    [(True, ["train_dataloader", "val_dataloader"]), (False, ["test_dataloader"])],
)
def test_datasets_that_will_be_used_are_checked_and_no_others(dataset, tmp_path, train, loaders):
    wrong = dataset | {"ann_file": "none.json"}
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg = config(**{loader: {"dataset": wrong}})
        if loader in loaders:
            assert error_of(cfg, train=train) == (
                f"{loader}.dataset.ann_file: there is no annotation file "
                f"{str(tmp_path / 'none.json')!r}"
            )
        else:
            check(cfg, train=train)


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda d: {"type": "RepeatDataset", "times": 2, "dataset": d}, "dataset.dataset"),
        (lambda d: {"type": "ConcatDataset", "datasets": [d]}, "dataset.datasets[0]"),
        (
            lambda d: {"type": "MultiImageMixDataset", "dataset": {"datasets": [{}, d]}},
            "dataset.dataset.datasets[1]",
        ),
    ],
    ids=["repeated", "concatenated", "nested"],
)
def test_wrapped_datasets_are_checked(dataset, wrap, where):
    check(config(train_dataloader={"dataset": wrap(dataset)}))
    dataset["ann_file"] = "none.json"
    message = error_of(config(train_dataloader={"dataset": wrap(dataset)}))
    assert message.startswith(f"train_dataloader.{where}.ann_file: there is no annotation file")


def test_broken_annotations_are_found(dataset, tmp_path):
    (tmp_path / "annotations" / "train.json").write_text('{"images": [')
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: ")
    assert "is no JSON: it is cut off" in message


def test_missing_image_folder_is_found(dataset, tmp_path):
    dataset["data_prefix"] = {"img": "none/"}
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.data_prefix.img: there is no image folder")
    assert str(tmp_path / "none") in message


def test_dataset_whose_files_have_whole_paths_needs_no_root(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "a.png").rename(tmp_path / "a.png")
    path = str(tmp_path / "annotations" / "train.json")
    for changed in ({"data_prefix": {"img": ""}}, {"data_root": "", "data_prefix": {"img": ""}}):
        own = {"type": "CocoDataset", "ann_file": path, "metainfo": {"classes": NAMES}} | changed
        check(config(train_dataloader={"dataset": own}))


def test_whole_paths_are_not_looked_for_below_the_root(dataset, tmp_path):
    dataset["ann_file"] = str(tmp_path / "annotations" / "train.json")
    dataset["data_prefix"] = {"img": str(tmp_path / "images")}
    dataset["data_root"] = "none/"
    check(config(train_dataloader={"dataset": dataset}))


@pytest.mark.parametrize(
    "changed",
    [
        {"type": "VOCDataset"},
        {"type": "NoSuchDataset"},
        {"ann_file": ""},
        {"ann_file": ["none.json"]},
        {"data_root": "s3://bucket/coco"},
        {"ann_file": "https://example.com/none.json", "data_root": None},
        {"backend_args": {"backend": "petrel"}},
    ],
)
def test_annotations_of_another_kind_or_place_are_left_alone(dataset, changed):
    check(config(train_dataloader={"dataset": dataset | {"ann_file": "none.json"} | changed}))


def test_images_of_another_place_are_left_alone(dataset):
    dataset["data_prefix"] = {"img": "s3://bucket/"}
    check(config(train_dataloader={"dataset": dataset}))


@pytest.mark.parametrize("prefix", [{}, None])
def test_dataset_without_a_folder_of_images_is_an_error(dataset, prefix):
    dataset["data_prefix"] = prefix
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.data_prefix: must name the folder")


def test_every_dataset_in_cocos_format_is_checked(dataset):
    for kind in ("CocoDataset", "mmdet.CocoDataset", "LVISDataset", "CocoPanopticDataset"):
        wrong = dataset | {"type": kind, "ann_file": "none.json"}
        assert "there is no annotation file" in error_of(
            config(train_dataloader={"dataset": wrong})
        )


def test_only_training_without_empty_images_needs_annotations(dataset, tmp_path):
    write(tmp_path, annotations=[])
    check(config(train_dataloader={"dataset": dataset}))
    dataset["filter_cfg"] = {"filter_empty_gt": True}
    check(config(val_dataloader={"dataset": dataset}))
    both = {"type": "ConcatDataset", "datasets": [dataset, dataset]}
    check(config(train_dataloader={"dataset": both}))
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: ")
    assert "error: no annotations" in message


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("names", [("cat", "dog"), ("dog", "cat"), ("bird", "dog", "cat")])
def test_labels_are_places_in_the_configs_classes_whatever_the_files_order(
    dataset, tmp_path, names
):
    write(tmp_path, names)
    changes = check(config(train_dataloader={"dataset": dataset}))
    assert labels_of(dataset, changes) == [NAMES.index(n) for n in names if n in NAMES]
    assert bool(changes) == (names[:2] != NAMES)


def test_checkpoint_of_other_classes_is_not_tested_under_these(dataset, tmp_path):
    torch.save({"meta": {"dataset_meta": {"classes": NAMES[::-1]}}}, tmp_path / "model.pth")
    cfg = config(test_dataloader={"dataset": dataset})
    check(cfg, train=False)
    with pytest.raises(ValueError, match="in another order than the checkpoint's, ") as error:
        prepare(cfg, None, train=False, checkpoint=str(tmp_path / "model.pth"))
    assert str(error.value).startswith("test_dataloader.dataset.metainfo.classes: ('cat', 'dog')")


def test_everything_that_is_wrong_is_told_at_once(dataset, tmp_path):
    write(tmp_path, NAMES, annotations=[{"id": 1, "image_id": 1, "category_id": 9}])
    model = nn.Module()
    model.bbox_head = nn.Module()
    model.bbox_head.num_classes = 80
    cfg = config(train_dataloader={"dataset": dataset}, val_dataloader={"dataset": dataset})
    message = error_of(cfg, model=model)
    for part in ("train_dataloader.", "val_dataloader.", "model.bbox_head.num_classes: "):
        assert part in message


def test_class_that_the_file_lacks_keeps_the_others_labels(dataset, tmp_path, capsys):
    write(tmp_path, ("dog",))
    changes = check(config(train_dataloader={"dataset": dataset}))
    assert labels_of(dataset, changes) == [1]
    assert "without a category in the file: 'cat'" in capsys.readouterr().err


def test_misspelt_class_is_an_error_with_the_likely_name(dataset):
    dataset["metainfo"] = {"classes": ("cat", "dogg")}
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: a mistake in ")
    assert "'dogg'; did you mean 'dog'?" in message and "file's are ('cat', 'dog')" in message


def test_classes_of_coco_on_other_data_name_the_files_classes(dataset, tmp_path):
    write(tmp_path, ("disk", "square"))
    del dataset["metainfo"]
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert "metainfo.classes (not set: those of CocoDataset)" in message
    assert "('disk', 'square')" in message


def test_text_in_place_of_classes_is_an_error(dataset):
    dataset["metainfo"] = {"classes": "cat"}
    assert error_of(config(train_dataloader={"dataset": dataset})) == (
        "train_dataloader.dataset.metainfo.classes: must be a tuple of names, got 'cat': ('cat',)"
    )


def test_classes_of_validation_are_those_of_training(dataset):
    other = dataset | {"metainfo": {"classes": NAMES[::-1]}}
    message = error_of(
        config(train_dataloader={"dataset": dataset}, val_dataloader={"dataset": other})
    )
    assert message.startswith("val_dataloader.dataset.metainfo.classes: ('dog', 'cat') in another")


def test_heads_classes_are_counted(dataset):
    model = nn.Module()
    model.bbox_head = nn.Module()
    model.bbox_head.num_classes = 80
    assert error_of(config(train_dataloader={"dataset": dataset}), model=model) == (
        "model.bbox_head.num_classes: the model has 80 classes, but the data has 2 "
        "('cat', 'dog'); set it to 2"
    )
    model.bbox_head.num_classes = 2
    check(config(train_dataloader={"dataset": dataset}), model=model)


def test_evaluator_reads_the_file_of_its_dataset(dataset, tmp_path):
    write(tmp_path, NAMES[::-1])
    own = str(tmp_path / "annotations" / "train.json")
    cfg = config(
        val_dataloader={"dataset": dataset}, val_evaluator={"type": "CocoMetric", "ann_file": own}
    )
    changes = check(cfg)
    assert changes["val_evaluator.ann_file"] == changes["val_dataloader.dataset.ann_file"]
    cfg.val_evaluator = [{"type": "CocoMetric", "ann_file": own}]
    assert "val_evaluator.0.ann_file" in check(cfg)
    cfg.val_evaluator = {"type": "CocoMetric", "ann_file": "other.json"}
    assert error_of(cfg).startswith(
        "val_evaluator.ann_file: 'other.json' is not what val_dataloader"
    )


@pytest.mark.parametrize(("min_size", "wrong"), [(16, ""), (17, "a side of less than 17 pixels")])
def test_images_that_the_filter_leaves_out_are_told(dataset, min_size, wrong):
    dataset["filter_cfg"] = {"filter_empty_gt": True, "min_size": min_size}
    cfg = config(train_dataloader={"dataset": dataset})
    assert wrong in error_of(cfg) if wrong else check(cfg) == {}


# --------------------------------------------------------------------------------------------- ODVG


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"filename": "a.png", "height": 16, "width": 20, "grounding": {}}\n\n{',
            "line 2 is blank",
        ),
        ('[{"filename": "a.png"}]', "is a JSON list; ODVG's format is one object in each line"),
        ('{"filename": "a.png"', "line 1 is no JSON"),
        ('{"filename": "a.png"}', "line 1 is no object with 'height'"),
        ("", "is empty"),
        (None, "there is no annotation file"),
    ],
)
def test_wrong_odvg_file_is_an_error_that_names_the_line(dataset, tmp_path, text, said):
    dataset = dataset | {"type": "ODVGDataset", "ann_file": "odvg.jsonl"}
    if text is not None:
        (tmp_path / "odvg.jsonl").write_text(text)
    message = error_of(config(train_dataloader={"dataset": dataset}))
    assert message.startswith("train_dataloader.dataset.ann_file: ") and said in message
