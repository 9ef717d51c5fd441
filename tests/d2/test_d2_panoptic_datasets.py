"""What tools/train_net.py finds out about panoptic data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic, register_coco_panoptic_separated

from d2_plugins.registered_datasets import check_datasets

pytestmark = pytest.mark.usefixtures("registered")


class Panoptic:
    """A drawn dataset, its annotation file and its metadata, which can be changed."""

    def __init__(self, coco: Path, folder: Path) -> None:
        self.coco, self.path = coco, folder / "panoptic.json"
        self.content = json.loads((coco / "annotations/panoptic_train2017.json").read_text())
        ids = {
            i: [c["id"] for c in self.content["categories"] if c["isthing"] == i] for i in (0, 1)
        }
        self.metadata: dict[str, Any] = {
            f"{kind}_dataset_id_to_contiguous_id": {key: n for n, key in enumerate(ids[i])}
            for i, kind in enumerate(("stuff", "thing"))
        }

    def check(self, *, separated: bool = False) -> None:
        self.path.write_text(json.dumps(self.content))
        pngs = str(self.coco / "annotations/panoptic_train2017")
        images = str(self.coco / "train2017")
        own: Any = (self.metadata, images, pngs, str(self.path))
        if separated:
            instances = str(self.coco / "annotations/instances_train2017.json")
            register_coco_panoptic_separated("drawn", *own, pngs, instances)
        else:
            register_coco_panoptic("drawn", *own)
        check_datasets("DATASETS.TRAIN", ("drawn_separated" if separated else "drawn",), train=True)

    def error(self) -> str:
        with pytest.raises(ValueError) as error:
            self.check()
        return " ".join(str(error.value).split())


@pytest.fixture
def panoptic(drawn_coco: Path, tmp_path: Path) -> Panoptic:
    return Panoptic(drawn_coco, tmp_path)


def test_good_dataset_is_loaded(panoptic, capsys):
    panoptic.check()
    assert capsys.readouterr().err == ""
    assert len(DatasetCatalog.get("drawn")) == 6


def test_mistakes_in_the_file_are_named_with_the_setting(panoptic):
    panoptic.content["annotations"][0]["segments_info"][0]["id"] = 0
    message = panoptic.error()
    assert message.startswith("DATASETS.TRAIN 'drawn': 2 kinds of mistakes in ")
    assert "segments whose id is no whole number from 1 to 16,777,215" in message


def test_file_that_is_cut_off_is_an_error(panoptic):
    panoptic.content = []
    assert panoptic.error().startswith("DATASETS.TRAIN 'drawn': annotation file ")


def test_mistakes_that_mmdetection_alone_makes_are_left_alone(panoptic, capsys):
    for record in panoptic.content["annotations"]:
        for segment in record["segments_info"]:
            del segment["bbox"]
    panoptic.check()
    assert capsys.readouterr().err == ""


def test_warnings_are_printed(panoptic, capsys):
    panoptic.content["annotations"].pop()
    panoptic.check()
    said = capsys.readouterr().err
    assert said.startswith("DATASETS.TRAIN 'drawn':\nwarning: images without annotation")


def test_category_that_the_metadata_does_not_know_is_an_error(panoptic):
    del panoptic.metadata["thing_dataset_id_to_contiguous_id"][1]
    message = panoptic.error()
    assert "id is in neither of thing_dataset_id_to_contiguous_id" in message
    assert "1 ('person', " in message


def test_thing_that_the_metadata_has_as_stuff_is_an_error(panoptic):
    del panoptic.metadata["thing_dataset_id_to_contiguous_id"][1]
    panoptic.metadata["stuff_dataset_id_to_contiguous_id"][1] = 6
    assert "things that the metadata has as stuff" in panoptic.error()


def test_images_of_a_separated_dataset_are_those_of_its_instances(panoptic):
    for record in panoptic.content["images"]:
        record["file_name"] = f"elsewhere/{record['file_name']}"
    panoptic.check(separated=True)


def test_file_of_a_loader_of_its_own_is_only_looked_at(panoptic):
    panoptic.path.write_text('{"a": 1}')
    MetadataCatalog.get("own").set(
        evaluator_type="cityscapes_panoptic_seg", panoptic_json=str(panoptic.path)
    )
    DatasetCatalog.register("own", list)
    check_datasets("DATASETS.TRAIN", ("own",), train=True)
    panoptic.path.write_text('{"a": 1')
    with pytest.raises(ValueError, match="is no whole JSON object"):
        check_datasets("DATASETS.TRAIN", ("own",), train=True)
