"""The pixels that the weights of a file or a catalog's address want."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from network_names import MOBILENET, caffe2, detectron2, resnet, write_pickle, zeros
from torch import Tensor

from plugin_core.checkpoints.pixel_format import (
    MSRA,
    TORCHVISION,
    PixelFormat,
    describe_mismatch,
    find_pixel_format,
)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", MSRA),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", TORCHVISION),
        ("torchvision://resnet50", TORCHVISION),
        ("open-mmlab://mmdet/mobilenet_v2", TORCHVISION),
        ("open-mmlab://detectron/resnet50_caffe", MSRA),
        ("open-mmlab://detectron2/resnet50_caffe", MSRA),
        ("open-mmlab://detectron2/resnet101_caffe", MSRA),
        ("open-mmlab://detectron2/resnext101_32x8d", None),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", None),
        ("https://example.org/resnet50.pth", None),
    ],
)
def test_pixel_format_of_a_catalogs_address(weights, expected):
    assert find_pixel_format(weights) == expected


def caffe2_arrays(inner: tuple[int, int] = (4, 4), norm: str = "bn") -> dict[str, np.ndarray]:
    shape = (*inner, 3, 3)
    return {n: np.zeros(shape) for n in [*caffe2(50), f"res_conv1_{norm}_s"]}


def classifier(depth: int, classes: int = 1000) -> dict[str, Tensor]:
    return resnet(depth) | {"fc.weight": torch.zeros(classes, 1)}


GREY = PixelFormat("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5), None)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"model": {}, "pixel_format": asdict(MSRA)}, MSRA),
        ({"state_dict": {}, "meta": {"pixel_format": asdict(GREY)}}, GREY),
        ({"state_dict": classifier(50), "meta": {"pixel_format": {"mean": "?"}}}, None),
        ({"state_dict": classifier(50), "meta": {"epoch": 3}}, TORCHVISION),
        (classifier(101), TORCHVISION),
        (classifier(18), replace(TORCHVISION, stride_in_1x1=None)),
        (classifier(50, classes=21841), None),
        ({n: t for n, t in classifier(50).items() if "running" not in n}, None),
        (resnet(50), None),
        ({"state_dict": zeros(["module.clf.head.0.weight"]) | resnet(50)}, TORCHVISION),
        (
            zeros(MOBILENET.values()) | {"classifier.1.weight": torch.zeros(1000, 1)},
            replace(TORCHVISION, stride_in_1x1=None),
        ),
        ({"model": zeros(detectron2(resnet(50))), "__author__": "torchvision"}, TORCHVISION),
        ({"model": zeros(detectron2(resnet(50))), "__author__": "MSRA"}, None),
        ({"model": zeros(["patch_embed.weight"]), "__author__": "torchvision"}, None),
    ],
    ids=[
        *("recorded for Detectron2", "recorded for MMDetection", "a broken record"),
        *("nested classifier", "classifier", "without a 1x1", "another data set", "no statistics"),
        *("no classifier", "IDA's reproduction", "MobileNetV2"),
        *("torchvision's pickle", "another's pickle", "another"),
    ],
)
def test_pixel_format_of_a_file(tmp_path, content, expected):
    torch.save(content, tmp_path / "weights.pth")
    assert find_pixel_format(str(tmp_path / "weights.pth")) == expected


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (caffe2_arrays(), MSRA),
        ({"model": caffe2_arrays(), "__author__": "Caffe2", "matching_heuristics": True}, MSRA),
        (caffe2_arrays(inner=(256, 8)), None),
        (caffe2_arrays(norm="gn"), None),
    ],
    ids=["MSRA", "wrapped", "ResNeXt", "GroupNorm"],
)
def test_pixel_format_of_caffe2s_pickles(tmp_path, arrays, expected):
    write_pickle(arrays, tmp_path / "R-50.pkl", protocol=2)
    assert find_pixel_format(str(tmp_path / "R-50.pkl")) == expected


@pytest.mark.parametrize(
    ("mean", "order"),
    [
        ((102.98, 115.95, 122.77), "BGR"),
        ((123.675, 116.28, 103.53), "RGB"),
        ((116.0, 123.0, 103.0), None),
        ((127.5, 127.5, 127.5), None),
    ],
)
def test_pixel_format_of_an_old_detectors_buffers(tmp_path, mean, order):
    buffers = {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": resnet(50) | buffers}, tmp_path / "model.pth")
    found = find_pixel_format(str(tmp_path / "model.pth"))
    if order is None:
        assert found is None
    else:
        assert found is not None and (found.channel_order, found.stride_in_1x1) == (order, None)
        assert found.mean == pytest.approx(mean) and found.std == (1, 1, 1)


def test_pixel_format_of_no_file_is_unknown(tmp_path):
    assert find_pixel_format(str(tmp_path / "none.pth")) is None
    assert find_pixel_format(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, []),
        ({"mean": (125.0, 115.0, 102.0), "std": (58.0, 58.0, 58.0)}, []),
        ({"channel_order": "BGR"}, ["channel_order"]),
        ({"mean": (103.53, 116.28, 123.675)}, ["mean"]),
        ({"std": (1.0, 1.0, 1.0)}, ["std"]),
        ({"mean": (120.0,)}, ["mean"]),
        ({"stride_in_1x1": True}, ["stride_in_1x1"]),
        ({"stride_in_1x1": None}, []),
    ],
)
def test_mismatch_names_what_has_to_change(changed, names):
    assert describe_mismatch(TORCHVISION, replace(TORCHVISION, **changed)) == names


def test_mismatch_of_the_two_usual_formats():
    every = ["channel_order", "mean", "std", "stride_in_1x1"]
    assert describe_mismatch(TORCHVISION, MSRA) == describe_mismatch(MSRA, TORCHVISION) == every
    detectron_1 = replace(MSRA, mean=(102.9801, 115.9465, 122.7717))
    assert describe_mismatch(MSRA, detectron_1) == []
