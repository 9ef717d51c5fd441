"""Handing over to MMPretrain's scripts: what is checked before a training begins."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch

from mm_plugins import command_line

CONFIG = """
_base_ = "mmpretrain::resnet/resnet18_8xb32_in1k.py"
custom_imports = dict(imports=["mm_plugins"])
layer = dict(type="TripletAttention")
backbone = dict(type="PluginResNet", plugins=[dict(cfg=layer, position="after_conv2")])
model = dict(backbone=backbone, head=dict(num_classes=3))
images = dict(data_root="images", classes=["cat", "dog", "owl"])
train_dataloader = dict(dataset=images)
val_dataloader = dict(dataset=images)
val_evaluator = dict(topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
"""


class Begins(Exception):
    """Raised where the training would begin."""


@pytest.fixture
def answer(monkeypatch, image_folder, tmp_path):
    """What a command is stopped with before its training, or "", for a config and words."""

    def begin(*_: object) -> None:
        raise Begins

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command_line, "only_training", begin)

    def call(text: str, *words: str, package: str = "mmpretrain") -> str:
        (tmp_path / "config.py").write_text(text)
        monkeypatch.setattr(sys, "argv", ["train.py", "config.py", *words])
        try:
            command_line.run("train", package)
        except Begins:
            return ""
        except SystemExit as stopped:
            return str(stopped.code)
        raise AssertionError("neither begun nor stopped")

    return call


def test_a_good_config_begins(answer):
    assert answer(CONFIG) == ""


def test_data_that_is_not_used_for_validation_may_be_missing(answer, image_folder):
    shutil.rmtree(image_folder / "val")
    assert "val_dataloader.dataset: there is no folder of images" in answer(CONFIG)
    assert answer(CONFIG, "--no-validate") == ""


def test_config_of_the_other_package_names_the_right_command(answer):
    told = answer(CONFIG, package="mmdet")
    assert told.endswith("default_scope is 'mmpretrain'; use tools/train_mmpretrain.py")
    told = answer('_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"')
    assert told.endswith("default_scope is 'mmdet'; use tools/train_mmdet.py")


def test_config_without_a_scope_is_one_of_the_command_s_package(answer):
    assert answer(CONFIG + "default_scope = None\n") == ""


@pytest.mark.parametrize("setting", ["dict(typo=3)", 'dict(type="Nope")'])
def test_wrong_preprocessor_is_one_line(answer, setting):
    told = answer(CONFIG + f"data_preprocessor = {setting}\n")
    assert told.startswith("error: model.data_preprocessor") and "\n" not in told


def test_machine_whose_mmcv_has_no_cuda_operators_trains_on_its_gpu(answer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command_line, "has_cuda_operators", lambda: False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it was started anew on the CPU"))
    assert answer(CONFIG) == ""


def test_missing_text_model_is_told_with_its_setting(answer):
    told = answer('_base_ = "mmpretrain::blip/blip-base_8xb16_refcoco.py"\n')
    assert told.startswith(
        "error: model.tokenizer.name_or_path: must be the folder of a text model, got "
        "'bert-base-uncased', which cannot be loaded"
    )
