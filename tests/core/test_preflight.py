"""Checks of checkpoints that both frameworks' sides make."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from plugin_core.checkpoints.resnet_names import (
    check_resnet_checkpoint,
    check_resnet_names,
    find_resnet_depths,
)

# -------------------------------------------------------------------------------------- checkpoints

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)
PREFIXES = {"torchvision": "", "detectron2": "backbone.bottom_up.", "caffe2": ""}
PREFIXES["sequential"] = "backbone.resnet_layer."  # of IDA's public reproduction


def resnet_names(depth: int, naming: str) -> list[str]:
    """Names of a ResNet's convolutions and their norms."""
    convolutions = 2 if depth < 50 else 3
    names = []
    for stage, count in enumerate(BLOCKS[depth], start=1):
        for block in range(count):
            for i in range(convolutions):
                if naming == "torchvision":
                    at = f"layer{stage}.{block}"
                    names += [f"{at}.conv{i + 1}.weight", f"{at}.bn{i + 1}.weight"]
                elif naming == "sequential":
                    names.append(f"{stage + 3}.{block}.conv{i + 1}.weight")
                elif naming == "detectron2":
                    at = f"res{stage + 1}.{block}.conv{i + 1}"
                    names += [f"{at}.weight", f"{at}.norm.weight"]
                else:
                    at = f"res{stage + 1}_{block}_branch2{'abc'[i]}"
                    names += [f"{at}_w", f"{at}_bn_s"]
    return [PREFIXES[naming] + name for name in names]


def checkpoint(depth: int, naming: str) -> dict[str, Any]:
    names = ["stem.conv1.weight", *resnet_names(depth, naming), "fc.weight"]
    state = dict.fromkeys(names, torch.zeros(1))
    return {"model": collections.OrderedDict(state), "iteration": 7}


def save_zip(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def save_legacy(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth", _use_new_zipfile_serialization=False)
    return folder / "weights.pth"


def save_pickle(content: Any, folder: Path, protocol: int = 4) -> Path:
    """Pickle a checkpoint's tensors as arrays, as Detectron2's model zoo has them."""
    arrays = {name: value.numpy() for name, value in content["model"].items()}
    (folder / "weights.pkl").write_bytes(pickle.dumps(content | {"model": arrays}, protocol))
    return folder / "weights.pkl"


def save_pickle_of_python_2(content: Any, folder: Path) -> Path:
    return save_pickle(content, folder, protocol=2)


FORMATS = pytest.mark.parametrize(
    "save", [save_zip, save_legacy, save_pickle, save_pickle_of_python_2]
)


@FORMATS
@pytest.mark.parametrize("naming", list(PREFIXES))
@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_depth_is_found_in_a_checkpoint(tmp_path, depth, naming, save):
    path = save(checkpoint(depth, naming), tmp_path)
    assert find_resnet_depths(str(path)) == {depth}


def test_depth_is_found_in_a_file_of_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    names = resnet_names(101, "torchvision")
    safetensors.save_file({name: torch.zeros(1) for name in names}, path)
    assert find_resnet_depths(str(path)) == {101}


@pytest.mark.parametrize(
    ("naming", "kind", "owner"),
    [
        ("torchvision", "layer", "torchvision's or MMDetection's"),
        ("detectron2", "res", "Detectron2's"),
        ("sequential", None, "an nn.Sequential's"),
    ],
)
def test_names_that_a_framework_does_not_know_are_told(tmp_path, naming, kind, owner):
    path = str(save_zip(checkpoint(18, naming), tmp_path))
    for spelling in ("res", "layer"):
        if spelling == kind:
            found = check_resnet_names(path, spelling, "WEIGHTS", "convert it")
            assert found == {PREFIXES[naming]}
            continue
        with pytest.raises(ValueError, match=f"^WEIGHTS: .* has {owner} names, .*: convert it$"):
            check_resnet_names(path, spelling, "WEIGHTS", "convert it")


def test_attention_in_the_blocks_does_not_hide_the_depth(tmp_path):
    content = checkpoint(50, "detectron2")
    for stage, count in enumerate(BLOCKS[50], start=2):
        for block in range(count):
            at = f"backbone.bottom_up.res{stage}.{block}.triplet_attention"
            content["model"][f"{at}.cw.conv.conv.weight"] = torch.zeros(1)
    path = save_zip(content, tmp_path)
    assert find_resnet_depths(str(path)) == {50}


def test_depth_is_found_where_only_parts_of_a_detector_are_a_resnet(tmp_path):
    # A C4 detector: res5 is in its RoI heads.
    names = [
        name.replace("backbone.bottom_up.", "roi_heads." if "res5" in name else "backbone.")
        for name in resnet_names(101, "detectron2")
    ]
    path = save_zip(dict.fromkeys(names, torch.zeros(1)), tmp_path)
    assert find_resnet_depths(str(path)) == {101}


@pytest.mark.parametrize(
    "names",
    [
        ["conv1.weight"],
        ["layers.0.blocks.1.attn.qkv.weight"],  # a Swin transformer
        ["layer1.0.conv1.weight", "layer1.1.conv1.weight"],  # one stage only
        [n for n in resnet_names(50, "torchvision") if "layer3" not in n],
    ],
)
def test_depth_of_another_network_is_unclear(tmp_path, names):
    path = save_zip(dict.fromkeys(names, torch.zeros(1)), tmp_path)
    assert find_resnet_depths(str(path)) == set()


def test_nothing_of_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = save_pickle(checkpoint(50, "torchvision") | {"trap": Trap()}, tmp_path)
    assert find_resnet_depths(str(path)) == set()
    assert not (tmp_path / "executed").exists()


def check(path: Any, depth: int) -> None:
    check_resnet_checkpoint(str(path), depth, "MODEL.WEIGHTS", "MODEL.RESNETS.DEPTH")


@pytest.mark.parametrize("naming", ["torchvision", "detectron2", "caffe2"])
def test_checkpoint_of_the_models_depth_is_accepted(tmp_path, naming):
    path = save_zip(checkpoint(50, naming), tmp_path)
    check(path, 50)


def test_checkpoint_without_a_resnet_is_accepted(tmp_path):
    path = save_zip({"linear.weight": torch.zeros(1)}, tmp_path)
    check(path, 50)


@FORMATS
@pytest.mark.parametrize("naming", ["torchvision", "detectron2", "caffe2"])
def test_checkpoint_of_another_depth_is_refused_by_name(tmp_path, naming, save):
    path = save(checkpoint(101, naming), tmp_path)
    with pytest.raises(ValueError) as error:
        check(path, 50)
    assert str(error.value) == (
        f"MODEL.WEIGHTS: {str(path)!r} holds a ResNet-101, but MODEL.RESNETS.DEPTH is 50; "
        "use a checkpoint of a ResNet-50 or set MODEL.RESNETS.DEPTH to 101"
    )


@FORMATS
def test_networks_beside_one_another_are_told_apart(tmp_path, save):
    networks = {"teacher.": 101, "student.": 50}
    names = [
        prefix + name
        for prefix, depth in networks.items()
        for name in resnet_names(depth, "torchvision")
    ]
    path = save({"model": dict.fromkeys(names, torch.zeros(1))}, tmp_path)
    assert find_resnet_depths(str(path)) == {50, 101}
    check(path, 50)
    check(path, 101)
    with pytest.raises(ValueError, match="holds a ResNet-50 and a ResNet-101, but"):
        check(path, 34)


@pytest.mark.parametrize(("depth", "other"), [(34, 50), (50, 34)])
def test_depths_with_equally_many_blocks_are_told_apart(tmp_path, depth, other):
    path = save_zip(checkpoint(depth, "torchvision"), tmp_path)
    with pytest.raises(ValueError, match=f"holds a ResNet-{depth}, but .* is {other}"):
        check(path, other)


def test_missing_checkpoint_names_setting_and_path(tmp_path):
    with pytest.raises(ValueError, match="^MODEL.WEIGHTS: there is no checkpoint '.*/none.pth'"):
        check(tmp_path / "none.pth", 50)


def test_empty_checkpoint_is_refused(tmp_path):
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="^MODEL.WEIGHTS: checkpoint '.*/empty.pth' is empty"):
        check(tmp_path / "empty.pth", 50)
