"""What is wrong with a classifier's data is one line before the training, with the setting."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mm_plugins.mmpretrain.datasets import prepare
from mm_plugins.preflight import check_config

HEAD = {"type": "LinearClsHead", "num_classes": 3, "in_channels": 8}


def config(folder, **train) -> Config:
    """Settings of a classifier whose images are in ``folder``."""
    loaders = {
        f"{split}_dataloader": {
            "dataset": {"type": "CustomDataset", "data_root": f"{folder}/{split}"}
        }
        for split in ("train", "val")
    }
    loaders["train_dataloader"]["dataset"].update(train)
    return Config({"default_scope": "mmpretrain", "model": {"head": HEAD}, **loaders})


def head(**settings) -> torch.nn.Module:
    model = torch.nn.Module()
    model.head = MODELS.build({**HEAD, **settings})
    return model


def test_good_folders_pass(image_folder):
    assert prepare(config(image_folder), head(), train=True) == {}


def test_good_lists_pass(image_folder):
    (image_folder / "train.txt").write_text("cat/0.png 0\nowl/1.png 2\n")
    cfg = config(image_folder, ann_file=str(image_folder / "train.txt"))
    cfg.train_dataloader.dataset.classes = ["cat", "dog", "owl"]
    assert prepare(cfg, head(), train=True) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"ann_file: there is no file .*train\.txt"),
        ("\n", r"ann_file: .* lists no image"),
        (
            "cat/0.png cat\n",
            r"line 1: expected a path and a label from 0 to 2, got 'cat/0.png cat'",
        ),
        ("cat/0.png 0\ncat/1.png 3\n", r"line 2: expected a path and a label from 0 to 2"),
        ("cat/9.png 0\n", r"lists 'cat/9.png', which is not in .*train.*\(data_prefix\)"),
    ],
)
def test_wrong_list_is_named_with_its_line(image_folder, text, message):
    path = image_folder / "train.txt"
    if text is not None:
        path.write_text(text)
    cfg = config(image_folder, ann_file=str(path), classes=["cat", "dog", "owl"])
    with pytest.raises(ValueError, match="train_dataloader.dataset.*" + message):
        prepare(cfg, head(), train=True)


def test_folder_without_images_is_named(image_folder):
    for path in (image_folder / "val" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"^val_dataloader.dataset: .*val.* has no image in dog;"):
        prepare(config(image_folder), head(), train=True)


def test_missing_folder_is_named(image_folder):
    with pytest.raises(ValueError, match=r"train_dataloader.dataset: there is no folder of images"):
        prepare(config(image_folder, data_root=str(image_folder / "none")), head(), train=True)


def test_images_without_folders_of_classes_are_told(image_folder):
    with pytest.raises(ValueError, match="has no folder for a class"):
        prepare(config(image_folder, data_prefix="cat"), head(), train=True)


def test_other_classes_than_the_first_ones_are_told(image_folder):
    shutil.move(image_folder / "val" / "owl", image_folder / "val" / "ant")
    message = (
        "val_dataloader.dataset: its classes, ant, cat, dog, are not those of train_dataloader"
    )
    with pytest.raises(ValueError, match=message):
        prepare(config(image_folder), head(), train=True)


def test_classes_in_another_order_than_their_folders_are_told(image_folder):
    cfg = config(image_folder, classes=["owl", "dog", "cat"])
    with pytest.raises(ValueError, match=r"not in the order of their labels, .*: cat, dog, owl; "):
        prepare(cfg, head(), train=True)
    cfg = config(image_folder, classes=["feline", "canine", "bird"])  # other names for the folders
    cfg.val_dataloader = None
    assert prepare(cfg, head(), train=True) == {}


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda inner: {"type": "RepeatDataset", "times": 2, "dataset": inner},
        lambda inner: {"type": "ConcatDataset", "datasets": [inner, inner]},
        lambda inner: {"type": "ClassBalancedDataset", "oversample_thr": 0.1, "dataset": inner},
        lambda inner: {"type": "KFoldDataset", "fold": 0, "num_splits": 3, "dataset": inner},
    ],
)
def test_datasets_that_others_wrap_are_checked(image_folder, wrapper):
    cfg = config(image_folder)
    cfg.train_dataloader.dataset = wrapper(cfg.train_dataloader.dataset.to_dict())
    assert prepare(cfg, head(), train=True) == {}
    shutil.rmtree(image_folder / "train")
    with pytest.raises(
        ValueError, match=r"train_dataloader.dataset.dataset\S*: there is no folder"
    ):
        prepare(cfg, head(), train=True)


def test_other_classes_than_the_checkpoint_s_are_told(image_folder, tmp_path):
    path = tmp_path / "epoch_1.pth"
    meta = {"dataset_meta": {"classes": ("dog", "cat", "owl")}}
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": meta}, path)
    message = re.escape(f"its classes, cat, dog, owl, are not the checkpoint's, {path}, dog, cat")
    with pytest.raises(ValueError, match=message):
        prepare(config(image_folder), head(), train=True, checkpoint=str(path))


def test_number_of_classes_must_be_the_data_s(image_folder):
    with pytest.raises(ValueError, match=r"model.head.num_classes: the model has 4 .* set it to 3"):
        prepare(config(image_folder), head(num_classes=4), train=True)


@pytest.mark.parametrize(("topk", "right"), [((1, 5), False), (4, False), ((1, 3), True)])
def test_top_k_of_more_than_the_classes_is_told(image_folder, topk, right):
    cfg = config(image_folder)
    cfg.val_evaluator = {"type": "Accuracy", "topk": topk}
    if right:
        assert prepare(cfg, head(), train=True) == {}
        return
    with pytest.raises(ValueError, match=r"^val_evaluator.topk: must be at most .* 3, got"):
        prepare(cfg, head(), train=True)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {
                "type": "RefCOCO",
                "data_root": "none",
                "data_prefix": "images",
                "ann_file": "instances.json",
                "split_file": "refs.p",
            },
            ": there is no file 'none/instances.json'",
        ),
        (
            {"type": "CIFAR100LT", "data_root": "none", "download": False},
            ": cannot be read: RuntimeError: Cannot find CIFAR100LT dataset in none",
        ),
        ({"type": "CIFAR100LT", "data_root": "none", "seed": -1}, ".seed: must be an integer"),
        ({"type": "VOC", "data_root": "none", "x": 1}, ": .*unexpected keyword argument 'x'"),
        ({"type": "VOC"}, ": .*missing 1 required positional argument: 'data_root'"),
        ({"type": "EagerDataset"}, ": .*no such samples"),
    ],
)
def test_dataset_that_cannot_be_read_is_told_in_a_line(dataset, message):
    if dataset["type"] == "EagerDataset":
        dataset = {"type": EagerDataset}
    cfg = Config({"train_dataloader": {"dataset": dataset}})
    with pytest.raises(ValueError, match="^train_dataloader.dataset" + message) as error:
        prepare(cfg, None, train=True)
    assert "\n" not in str(error.value)


class EagerDataset:
    """One that takes no ``lazy_init``."""

    def __init__(self, pipeline):
        raise OSError("no such samples")


def test_dataset_that_downloads_is_not_asked_for_its_files(tmp_path):
    node = {"type": "CIFAR100LT", "data_root": str(tmp_path / "none")}
    assert prepare(Config({"train_dataloader": {"dataset": node}}), None, train=True) == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "loss",
    [
        {"type": "CrossEntropyLoss"},
        {"type": "LabelSmoothLoss", "label_smooth_val": 0.1},
        {"type": "SeesawLoss", "num_classes": 3},
    ],
)
def test_loss_of_one_label_in_a_multi_label_head_is_refused(image_folder, loss):
    model = head(type="MultiLabelLinearClsHead", loss=loss)
    with pytest.raises(
        ValueError, match=r"model.head.loss: must be for several labels in an image"
    ):
        prepare(config(image_folder), model, train=True)


def test_data_of_several_labels_in_a_head_for_one_are_told(image_folder):
    cfg = config(image_folder)
    path = image_folder / "labels.json"
    image = {"img_path": str(image_folder / "val/cat/0.png"), "gt_label": [0, 2]}
    classes = {"classes": ["cat", "dog", "owl"]}
    path.write_text(json.dumps({"metainfo": classes, "data_list": [image]}))
    cfg.val_dataloader.dataset = {"type": "MultiLabelDataset", "ann_file": str(path)}
    with pytest.raises(ValueError, match="^val_dataloader.dataset: its images have several label"):
        prepare(cfg, head(type="BatchFormerClsHead"), train=True)
    soft = {"type": "CrossEntropyLoss", "use_soft": True}  # shares of one label
    assert prepare(cfg, head(loss=soft), train=True) == {}


def test_a_label_that_the_model_has_not_is_told_with_its_line(image_folder):
    (image_folder / "train.txt").write_text("cat/0.png 0\nowl/1.png 3\n")
    cfg = config(image_folder, ann_file=str(image_folder / "train.txt"))
    with pytest.raises(ValueError, match="line 2: expected a path and a label from 0 to 2"):
        prepare(cfg, head(), train=True)


@pytest.mark.parametrize("setting", ["val_evaluator", "model.head.loss"])
def test_counts_of_another_number_of_classes_are_told(image_folder, setting):
    cfg, loss = config(image_folder), {"type": "BalancedSoftmaxLoss", "counts": [5, 4, 0]}
    if setting == "val_evaluator":
        cfg.val_evaluator = {"type": "LongTailMetric", "counts": [5]}
    else:
        loss["counts"] = [5]
    message = rf"^{setting}.counts: must be the training images of each of the 3 classes, got 1 num"
    with pytest.raises(ValueError, match=message):
        prepare(cfg, head(loss=loss), train=True)


def test_backbone_that_takes_no_plugins_is_told_with_those_that_do():
    layer = {"cfg": {"type": "TripletAttention"}, "position": "after_conv2"}
    backbone = {"type": "ResNet", "depth": 18, "plugins": [layer]}
    cfg = Config({"default_scope": "mmpretrain"})
    cfg.model = {"type": "ImageClassifier", "backbone": backbone}
    message = r"model.backbone.type: 'ResNet' takes no plugins; type='PluginResNet'"
    with pytest.raises(ValueError, match=message):
        check_config(cfg, train=True, resumes=False)
