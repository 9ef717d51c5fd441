"""Labels of images from COCO's instances files, and the checks before a multi-label training."""

from __future__ import annotations

import copy
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmpretrain.registry import DATASETS, MODELS
from PIL import Image

from mm_plugins.mmpretrain.datasets import prepare

ROOT = Path(__file__).resolve().parents[2]
CATEGORIES = [(18, "dog"), (3, "car"), (90, "brush")]
ANNOTATIONS = [  # (image, category, crowd)
    *[(7, 90, 0), (7, 3, 0), (7, 3, 0)],
    *[(2, 18, 0), (2, 3, 1)],
]


def content(**changes: Any) -> dict[str, Any]:
    """Three images, of which the second, by id, has no object."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in (7, 5, 2)],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "iscrowd": crowd}
            for n, (image, category, crowd) in enumerate(ANNOTATIONS)
        ],
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in (2, 5, 7):
        Image.new("RGB", (6, 4), (name, 0, 0)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "all.json").write_text(json.dumps(content()))
    return tmp_path


def dataset(folder: Path, written: Any = None, **arguments: Any) -> Any:
    name = "all.json"
    if written is not None:
        name = "other.json"
        text = written if isinstance(written, str) else json.dumps(written)
        (folder / name).write_text(text)
    settings = {"ann_file": name, "data_root": str(folder), "data_prefix": "images"}
    return DATASETS.build({"type": "CocoMultiLabel", **settings, **arguments})


def labels(found: Any) -> dict[str, list[int]]:
    infos = [found.get_data_info(i) for i in range(len(found))]
    return {Path(info["img_path"]).name: info["gt_label"] for info in infos}


def test_classes_are_the_categories_by_id_and_images_come_by_id_with_and_without_objects(folder):
    found = dataset(folder)
    assert found.CLASSES == ("car", "dog", "brush")
    assert list(labels(found).items()) == [("2.png", [0, 1]), ("5.png", []), ("7.png", [0, 2])]
    assert found.get_cat_ids(2) == [0, 2]
    assert Path(found.get_data_info(0)["img_path"]) == folder / "images" / "2.png"


def test_images_without_objects_are_left_out_on_request_but_not_in_a_test(folder):
    filters = {"filter_cfg": {"filter_empty_gt": True}}
    assert list(labels(dataset(folder, **filters))) == ["2.png", "7.png"]
    assert len(dataset(folder, **filters, test_mode=True)) == 3


def test_crowds_tell_no_label_on_request(folder):
    assert labels(dataset(folder, crowds=False))["2.png"] == [1]


def test_given_classes_are_found_by_name_in_their_order_and_others_count_as_none(folder):
    found = dataset(folder, metainfo={"classes": ("brush", "car")})
    assert labels(found) == {"2.png": [1], "5.png": [], "7.png": [0, 1]}
    assert labels(dataset(folder, classes=["dog"]))["2.png"] == [0]


def test_an_image_without_objects_has_a_target_of_zeros(folder):
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "PackInputs"}]
    found = dataset(folder, pipeline=pipeline)
    settings = {"type": "ClsDataPreprocessor", "to_onehot": True, "num_classes": 3}
    preprocess = MODELS.build(settings)
    batch = preprocess(pseudo_collate([found[i] for i in range(3)]), training=True)
    scores = torch.stack([sample.gt_score for sample in batch["data_samples"]])
    assert scores.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_cocos_80_classes_get_labels_0_to_79(folder):
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    of_coco = content(
        categories=[{"id": i, "name": f"class {i}"} for i in reversed(ids)],
        annotations=[{"id": n, "image_id": 2, "category_id": i} for n, i in enumerate(ids)],
    )
    found = dataset(folder, of_coco)
    assert labels(found)["2.png"] == list(range(80)) and found.CLASSES[11] == "class 13"


@pytest.mark.parametrize(
    ("written", "arguments", "message"),
    [
        ('{"images": [', {}, "is no JSON: it is cut off"),
        ({"images": []}, {}, "has no 'annotations'; COCO's instances format has it"),
        (content(images=[]), {}, "has no images in its list of images"),
        (content(categories=[]), {}, "has no categories in its list of categories"),
        (content(images=2 * content()["images"]), {}, "has two images of the same id"),
        (content(images=[{"id": [1]}]), {}, "has two images of the same id, or one without an id"),
        (content(images=content()["images"][1:]), {}, "annotation 0 is of image 7 and category 90"),
        (
            content(categories=content()["categories"][:2]),
            {},
            "annotation 0 is of image 7 and category 90, and the file lacks one of them",
        ),
        (
            content(categories=[{"id": i, "name": "car"} for i in (3, 18, 90)]),
            {},
            "has two categories of the same name",
        ),
        (
            content(images=[{"id": i} for i in (2, 5, 7)]),
            {},
            "image 2 has no file_name",
        ),
        (
            content(),
            {"metainfo": {"classes": ("cars", "dog")}},
            "metainfo.classes must be categories of .*other.json', which are 'car', 'dog', "
            "'brush'; got 'cars'; did you mean 'car'",
        ),
        (
            content(annotations=[]),
            {"filter_cfg": {"filter_empty_gt": True}},
            "filter_cfg filter_empty_gt=True leaves none of the 3 images",
        ),
        (content(), {"crowds": 1}, "crowds must be True or False, got 1"),
        (content(), {"classes": ("car", "car")}, "metainfo.classes must be .* once, got 'car', 'c"),
        (content(), {"classes": ()}, "metainfo.classes must be .* once, got none"),
        (content(), {"filter_cfg": "x"}, r"filter_cfg must be None or dict\(.*\), got 'x'"),
        (
            content(),
            {"filter_cfg": {"filter_empty": True}},
            "filter_cfg.filter_empty is no key; .* did you mean 'filter_empty_gt'",
        ),
        (content(), {"filter_cfg": {"min_size": 8}}, "filter_cfg.min_size is no key; there is"),
        (
            content(),
            {"filter_cfg": {"filter_empty_gt": 1}},
            "filter_cfg.filter_empty_gt must be True or False, got 1",
        ),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_wrong_file_or_argument_is_told_in_a_line(folder, written, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        dataset(folder, written, **arguments)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(folder):
    with pytest.raises(ValueError, match=r"there is no annotation file '.*/none.json'"):
        dataset(folder, ann_file="none.json")


# ------------------------------------------------------------------------- before the training


SMALL = {
    "model.backbone.depth": 18,
    "model.backbone.init_cfg": None,
    "model.head.in_channels": 512,
    "model.head.num_classes": 3,
    "data_preprocessor.num_classes": 3,
}


@cache
def published(name: str) -> Config:
    return Config.fromfile(ROOT / "configs/mmpretrain/ida" / name)


def config(folder: Path, **options: Any) -> Config:
    cfg = copy.deepcopy(published("resnet101-ida_4xb32_coco2014-448px.py"))
    cfg.merge_from_dict(SMALL)
    for part in ("train", "val", "test"):
        cfg.merge_from_dict(
            {
                f"{part}_dataloader.dataset.data_root": str(folder),
                f"{part}_dataloader.dataset.ann_file": "all.json",
                f"{part}_dataloader.dataset.data_prefix": "images",
            }
        )
    cfg.merge_from_dict(options)
    return cfg


def check(cfg: Config, checkpoint: str | None = None, train: bool = True) -> None:
    prepare(cfg, MODELS.build(cfg.model), train=train, checkpoint=checkpoint)


def refusal(cfg: Config, **arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        check(cfg, **arguments)
    return str(error.value)


def test_right_config_passes(folder):
    for train in (True, False):
        check(config(folder), train=train)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model.head.num_classes": 4},
            "model.head.num_classes: the model has 4 classes, but the data has 3 ('car', 'dog', "
            "'brush'); set it to 3",
        ),
        (
            {"data_preprocessor.num_classes": 80},
            "data_preprocessor.num_classes: the model has 80 classes, but the data has 3 ('car', "
            "'dog', 'brush'); set it to 3",
        ),
        (
            {"model.neck": {"type": "GlobalAveragePooling", "_delete_": True}},
            "model.neck: must be None, as IDAClsHead classifies a map (B, C, H, W); "
            "GlobalAveragePooling gives ('B', 512)",
        ),
        (
            {"model.neck": {"type": "GeneralizedMeanPooling", "_delete_": True}},
            "model.neck: must be None, as IDAClsHead classifies a map (B, C, H, W); "
            "GeneralizedMeanPooling gives ('B', 512)",
        ),
        (
            {"model.backbone": {"type": "VisionTransformer", "arch": "deit-t", "_delete_": True}},
            "model.backbone: must give a map (such as out_type='featmap'), as IDAClsHead "
            "classifies a map (B, C, H, W); VisionTransformer gives ('B', 192)",
        ),
        (
            {"model.head.in_channels": 2048},
            "model.head.in_channels: must be 512, the channels of the backbone's last map, got "
            "2048",
        ),
        (
            {"train_dataloader.dataset.ann_file": "none.json"},
            "train_dataloader.dataset.ann_file: there is no annotation file '{folder}/none.json'",
        ),
        (
            {"train_dataloader.dataset.data_prefix": "pictures"},
            "train_dataloader.dataset.data_prefix: there is no image folder '{folder}/pictures'",
        ),
        (
            {"val_dataloader.dataset.metainfo": {"classes": ("dog", "car", "brush")}},
            "val_dataloader.dataset: its classes, dog, car, brush, are not those of "
            "train_dataloader.dataset, car, dog, brush; labels are places in this list, so all "
            "need the same (names of folders in their order, or classes=… of a dataset)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_constructor_sees_is_named_before_the_training(folder, options, message):
    assert refusal(config(folder, **options)) == message.format(folder=folder)


def test_missing_image_is_named(folder):
    (folder / "images" / "2.png").unlink()
    message = f"data_prefix: there is no image '{folder}/images/2.png'"
    assert refusal(config(folder)) == "\n".join(
        f"{part}_dataloader.dataset.{message}" for part in ("train", "val")
    )


def test_dataset_inside_of_others_is_checked(folder):
    inner = config(folder).train_dataloader.dataset
    cfg = config(folder)
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ConcatDataset", "datasets": [{**inner, "ann_file": "none.json"}]},
    }
    setting = "train_dataloader.dataset.dataset.datasets[0].ann_file"
    assert refusal(cfg) == f"{setting}: there is no annotation file '{folder}/none.json'"


def test_checkpoint_of_other_classes_is_refused(folder):
    checkpoint = folder / "epoch_1.pth"
    torch.save({"meta": {"dataset_meta": {"classes": ("cat", "car", "brush")}}}, checkpoint)
    found = refusal(config(folder), checkpoint=str(checkpoint), train=False)
    assert found.startswith("test_dataloader.dataset: its classes, car, dog, brush, are not the ")
    assert f"checkpoint's, {checkpoint}, cat, car, brush; " in found


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_backbone_of_another_kind_that_gives_maps_passes(folder, place):
    kind = {"type": "VisionTransformer", "arch": "deit-t", "out_type": "featmap", "_delete_": True}
    cfg = config(folder, **{"model.backbone": kind, "model.head.in_channels": 192})
    with torch.device(place):
        model = MODELS.build(cfg.model)
    before = copy.deepcopy(model.state_dict())
    prepare(cfg, model, train=True)
    assert model.training
    if place == "cpu":
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def write_voc(folder: Path) -> None:
    """An image with a cat, in both splits."""
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True)
    for split in ("trainval", "test"):
        (folder / f"ImageSets/Main/{split}.txt").write_text("000001\n")
    cat = "<object><name>cat</name><difficult>0</difficult></object>"
    (folder / "Annotations/000001.xml").write_text(f"<annotation>{cat}</annotation>")
    Image.new("RGB", (6, 4)).save(folder / "JPEGImages/000001.jpg")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (None, ""),
        ("ImageSets/Main/test.txt", ": there is no file '{0}/ImageSets/Main/test.txt'"),
        ("JPEGImages/000001.jpg", ".data_prefix: there is no image '{0}/JPEGImages/000001.jpg'"),
        ("Annotations/000001.xml", ": there is no file '{0}/Annotations/000001.xml'"),
    ],
)
def test_vocs_missing_file_is_named(tmp_path, missing, message):
    write_voc(tmp_path)
    cfg = copy.deepcopy(published("resnet101-ida-heavy_4xb32_voc07-448px.py"))
    cfg.merge_from_dict(
        {**SMALL, "model.head.num_classes": 20, "data_preprocessor.num_classes": 20}
    )
    cfg.test_dataloader.dataset.data_root = str(tmp_path)
    if missing is None:
        check(cfg, train=False)
        return
    (tmp_path / missing).unlink()
    assert refusal(cfg, train=False) == f"test_dataloader.dataset{message.format(tmp_path)}"


def test_vocs_number_of_classes_is_checked(tmp_path):
    write_voc(tmp_path)
    cfg = copy.deepcopy(published("resnet101-ida-heavy_4xb32_voc07-448px.py"))
    cfg.merge_from_dict(
        {**SMALL, "model.head.num_classes": 80, "data_preprocessor.num_classes": 20}
    )
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(tmp_path)
    assert refusal(cfg).startswith(
        "model.head.num_classes: the model has 80 classes, but the data has 20 ('aeroplane', "
    )


def test_loss_for_one_label_is_refused_on_the_command_line(monkeypatch, folder, tmp_path):
    from mm_plugins import command_line

    cfg = config(folder)
    cfg.model.head.loss = {"type": "CrossEntropyLoss"}
    path = tmp_path / "cfg.py"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in cfg.to_dict().items()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_mmpretrain.py", str(path)])
    with pytest.raises(SystemExit) as error:
        command_line.run("train", "mmpretrain")
    assert str(error.value).startswith(
        "error: model.head.loss: must be for several labels in an image, such as "
    )
    assert not (tmp_path / "work_dirs").exists()


@pytest.mark.parametrize(
    "block", ["backbone.0.body.layer1.0.conv1", "backbone.resnet_layer.4.0.conv1", "layer1.0.conv1"]
)
def test_checkpoint_with_other_names_is_to_be_converted(folder, block):
    from mm_plugins.preflight import check_config

    path = folder / "model_best.pth.tar"
    torch.save({"state_dict": {f"module.{block}.weight": torch.zeros(1)}}, path)
    cfg = config(folder, load_from=str(path))
    message = (
        f"^CHECKPOINT: '{path}' has .* convert it: tools/convert_checkpoint.py {path} .*pth --to"
    )
    with pytest.raises(ValueError, match=message + " mmpretrain"):
        check_config(cfg, train=False, resumes=False)
