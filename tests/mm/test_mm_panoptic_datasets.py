"""What tools/train_mmdet.py and tools/test_mmdet.py find out about panoptic data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mmdet", reason="MMDetection is not installed")

from mmdet.datasets import CocoPanopticDataset
from mmengine.config import Config
from torch import nn

from mm_plugins.datasets import prepare

Content = dict[str, Any]


@pytest.fixture
def dataset(drawn_coco: Path, tmp_path: Path) -> dict[str, Any]:
    """A drawn dataset, whose annotation file can be changed."""
    source = drawn_coco / "annotations" / "panoptic_train2017.json"
    (tmp_path / "panoptic.json").write_bytes(source.read_bytes())
    categories = json.loads(source.read_text())["categories"]
    names = {i: tuple(c["name"] for c in categories if c["isthing"] == i) for i in (0, 1)}
    return {
        "type": "CocoPanopticDataset",
        "data_root": str(drawn_coco),
        "ann_file": str(tmp_path / "panoptic.json"),
        "data_prefix": {"img": "train2017/", "seg": "annotations/panoptic_train2017/"},
        "metainfo": {
            "classes": names[1] + names[0],
            "thing_classes": names[1],
            "stuff_classes": names[0],
        },
    }


def change(dataset: dict[str, Any], how: Any) -> None:
    path = Path(dataset["ann_file"])
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def check(dataset: dict[str, Any], model: Any = None, loader: str = "train_dataloader") -> None:
    cfg = Config({loader: {"dataset": dataset}})
    assert prepare(cfg, model, train=loader != "test_dataloader") == {}


def error_of(dataset: dict[str, Any], model: Any = None) -> str:
    with pytest.raises(ValueError) as error:
        check(dataset, model)
    return " ".join(str(error.value).split())


def test_good_dataset_is_loaded_with_the_labels_of_its_classes(dataset, capsys):
    check(dataset)
    assert capsys.readouterr().err == ""
    built = CocoPanopticDataset(**{k: v for k, v in dataset.items() if k != "type"}, pipeline=[])
    assert list(built.cat2label.values()) == list(range(len(dataset["metainfo"]["classes"])))


def test_mistakes_in_the_file_are_named_with_the_setting(dataset):
    change(dataset, lambda c: c["annotations"][0]["segments_info"][0].update(id=0))
    message = error_of(dataset)
    assert message.startswith("train_dataloader.dataset.ann_file: 2 kinds of mistakes in ")
    assert "segments whose id is no whole number from 1 to 16,777,215" in message


def test_mistakes_that_detectron2_alone_makes_are_left_alone(dataset):
    change(dataset, lambda c: [record.pop("file_name") for record in c["annotations"]])
    check(dataset)


def test_warnings_are_printed(dataset, capsys):
    change(dataset, lambda c: c["annotations"][0].update(image_id=999))
    check(dataset)
    said = capsys.readouterr().err
    assert said.startswith("train_dataloader.dataset.ann_file:\nwarning: ")
    assert "annotations of images that are not listed" in said


def test_file_without_segments_is_for_tests_only(dataset):
    change(dataset, lambda c: c.pop("annotations"))
    check(dataset, loader="test_dataloader")
    assert "no segments" in error_of(dataset)


@pytest.mark.parametrize("key", ["img", "seg"])
def test_missing_folder_is_found(dataset, key):
    dataset["data_prefix"][key] = "none/"
    message = error_of(dataset)
    assert message.startswith(f"train_dataloader.dataset.data_prefix.{key}: there is no folder")


def test_misspelt_class_is_an_error_with_the_likely_name(dataset):
    names = dataset["metainfo"]["classes"]
    dataset["metainfo"]["classes"] = tuple("squares" if n == "square" else n for n in names)
    message = error_of(dataset)
    assert "metainfo.classes that are no category of the file" in message
    assert "'squares'; did you mean 'square'?" in message


def test_default_classes_on_other_data_are_an_error(dataset):
    del dataset["metainfo"]
    message = error_of(dataset)
    assert "metainfo.classes (not set: those of CocoPanopticDataset)" in message
    assert "the file's are ('person', 'disk'" in message.replace("The file", "the file")


def test_categories_with_segments_that_are_no_class_are_an_error(dataset):
    dataset["metainfo"]["classes"] = dataset["metainfo"]["classes"][1:]
    message = error_of(dataset)
    assert "categories with segments that train_dataloader.dataset.metainfo.classes does" in message
    assert "'person' (" in message


def test_order_of_the_file_is_the_order_of_the_classes(dataset):
    change(dataset, lambda c: c["categories"].reverse())
    assert "the order of the categories in the file is another one" in error_of(dataset)
    dataset["metainfo"]["classes"] = dataset["metainfo"]["classes"][::-1]
    assert "things after stuff" in error_of(dataset)


def test_thing_that_is_listed_as_stuff_is_an_error(dataset, capsys):
    things = dataset["metainfo"].pop("thing_classes")
    check(dataset)  # the default's things are those of COCO, among them "person"
    said = capsys.readouterr().err
    assert "things that train_dataloader.dataset.metainfo.thing_classes does not have" in said
    dataset["metainfo"]["stuff_classes"] += things[:1]
    message = error_of(dataset)
    assert "lists as stuff, or stuff as things: 'person' (isthing 1 in the file)" in message


@pytest.mark.parametrize("head", ["panoptic_head", "panoptic_fusion_head"])
def test_things_and_stuff_of_the_detector_are_counted(dataset, head):
    model = nn.Module()
    setattr(model, head, nn.Module())
    model.num_things_classes, model.num_stuff_classes = 80, 53
    message = error_of(dataset, model)
    assert (
        f"model.{head}.num_things_classes: the model has 80 classes, but the data has 7" in message
    )
    assert (
        f"model.{head}.num_stuff_classes: the model has 53 classes, but the data has 6" in message
    )
    model.num_things_classes, model.num_stuff_classes = 7, 6
    check(dataset, model)


def test_classes_of_a_checkpoint_are_those_of_the_dataset(dataset, tmp_path):
    classes = dataset["metainfo"]["classes"]
    model = nn.Module()
    model.panoptic_head = nn.Module()
    model.num_things_classes, model.num_stuff_classes = 7, 6
    cfg, path = Config({"test_dataloader": {"dataset": dataset}}), tmp_path / "trained.pth"
    for known in (classes, classes[::-1]):
        torch.save({"state_dict": {}, "meta": {"dataset_meta": {"classes": known}}}, path)
        if known == classes:
            assert prepare(cfg, model, train=False, checkpoint=str(path)) == {}
            continue
        with pytest.raises(ValueError, match="in another order than the checkpoint's"):
            prepare(cfg, model, train=False, checkpoint=str(path))
