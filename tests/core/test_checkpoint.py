"""Reading checkpoints, the backbones in them, and the pixels that those want."""

from __future__ import annotations

import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from plugin_core import TripletAttention, build_block_plugin
from plugin_core.checkpoints.conversion import (
    FoundPlugin,
    convert,
    find_backbone,
    plugins_in,
)
from plugin_core.checkpoints.pixel_format import (
    MSRA,
    TORCHVISION,
    PixelFormat,
    describe_mismatch,
    find_pixel_format,
)
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS[152] = (3, 8, 36, 3)
# The same parameters in torchvision's, Detectron2's and Caffe2's names.
SPELLINGS = {
    "conv1.weight": ("stem.conv1.weight", "conv1_w"),
    "bn1.weight": ("stem.conv1.norm.weight", "res_conv1_bn_s"),
    "bn1.bias": ("stem.conv1.norm.bias", "res_conv1_bn_b"),
    "layer1.0.conv1.weight": ("res2.0.conv1.weight", "res2_0_branch2a_w"),
    "layer1.0.bn1.weight": ("res2.0.conv1.norm.weight", "res2_0_branch2a_bn_s"),
    "layer2.3.conv2.weight": ("res3.3.conv2.weight", "res3_3_branch2b_w"),
    "layer3.5.bn3.bias": ("res4.5.conv3.norm.bias", "res4_5_branch2c_bn_b"),
    "layer4.0.downsample.0.weight": ("res5.0.shortcut.weight", "res5_0_branch1_w"),
    "layer4.0.downsample.1.bias": ("res5.0.shortcut.norm.bias", "res5_0_branch1_bn_b"),
    "fc.weight": ("linear.weight", "fc1000_w"),
}
# MobileNetV2 in MMDetection's and torchvision's names.
MOBILENET = {
    "conv1.conv.weight": "features.0.0.weight",
    "conv1.bn.running_mean": "features.0.1.running_mean",
    "layer1.0.depthwise_conv.conv.weight": "features.1.conv.0.0.weight",
    "layer1.0.depthwise_conv.bn.bias": "features.1.conv.0.1.bias",
    "layer1.0.linear_conv.conv.weight": "features.1.conv.1.weight",
    "layer1.0.linear_conv.bn.weight": "features.1.conv.2.weight",
    "layer1.0.triplet_attention.cw.conv.conv.weight": "features.1.conv.3.cw.conv.conv.weight",
    "layer2.0.expand_conv.conv.weight": "features.2.conv.0.0.weight",
    "layer2.0.expand_conv.bn.weight": "features.2.conv.0.1.weight",
    "layer2.0.depthwise_conv.conv.weight": "features.2.conv.1.0.weight",
    "layer2.0.linear_conv.bn.bias": "features.2.conv.3.bias",
    "layer2.1.linear_conv.conv.weight": "features.3.conv.2.weight",
    "layer3.0.expand_conv.conv.weight": "features.4.conv.0.0.weight",
    "layer6.2.triplet_attention.hw.conv.bn.bias": "features.16.conv.4.hw.conv.bn.bias",
    "layer7.0.triplet_attention.alpha": "features.17.conv.4.alpha",
    "conv2.conv.weight": "features.18.0.weight",
    "conv2.bn.bias": "features.18.1.bias",
    "fc.weight": "classifier.1.weight",
}


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def write_pickle(content: Any, path: Path, protocol: int = 4) -> None:
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol)


def resnet(depth: int, *, attention: bool = False) -> dict[str, Tensor]:
    """Some of a ResNet's state dict in torchvision's names, all of one shape."""
    names = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            names += [f"{at}.conv{i}.weight" for i in range(1, 3 if depth < 50 else 4)]
            names += [f"{at}.bn1.{end}" for end in ("weight", "bias", "num_batches_tracked")]
            if attention:
                names += [f"{at}.triplet_attention.{n}" for n in TripletAttention().state_dict()]
    return {name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}


def detectron2(state_dict: Iterable[str]) -> list[str]:
    """The names of :func:`resnet` in Detectron2's spelling."""
    renamed = []
    for name in state_dict:
        if name.startswith("layer"):
            name = f"res{int(name[5]) + 1}{name[6:]}".replace(".bn1.", ".conv1.norm.", 1)
        else:
            name = "stem." + name.replace("bn1.", "conv1.norm.")
        renamed.append(name)
    return renamed


def sequential(state_dict: Iterable[str]) -> list[str]:
    """The names of :func:`resnet` as IDA's public reproduction has them, in an nn.Sequential."""
    children = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 3) for i in range(1, 5)}}
    split = [name.partition(".") for name in state_dict]
    return [f"{children[child]}.{rest}" for child, _, rest in split]


def caffe2(depth: int) -> list[str]:
    """Names of a ResNet's convolutions in Caffe2's spelling."""
    branches = "ab" if depth < 50 else "abc"
    return ["conv1_w"] + [
        f"res{stage}_{block}_branch2{branch}_w"
        for stage, blocks in enumerate(BLOCKS[depth], start=2)
        for block in range(blocks)
        for branch in branches
    ]


def zeros(names: Iterable[str]) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}


# ----------------------------------------------------------------------------------------- reading

CONTENT = {"epoch": 3, "arch": "resnet50", "state_dict": {"module.conv1.weight": torch.ones(2, 3)}}
ARRAYS = {"model": {"conv1_w": np.arange(3, dtype=np.float32)}, "__author__": "MSRA"}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pytorchs_files_are_read(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(str(path))
    assert content["arch"] == "resnet50"
    assert torch.equal(find_state_dict(content)["conv1.weight"], torch.ones(2, 3))


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.6", reason="PyTorch refuses it")
def test_metric_that_numpy_computed_does_not_keep_a_file_from_being_read(tmp_path):
    content = CONTENT | {"best_mAP": np.mean([82.0, 85.0]), "aps": np.ones(3)}
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert read_checkpoint(str(tmp_path / "model_best.pth.tar"))["best_mAP"] == 83.5


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_are_read(tmp_path, protocol):
    write_pickle(OrderedDict(ARRAYS, scalar=np.float64(2)), tmp_path / "R-50.pkl", protocol)
    content = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert content["__author__"] == "MSRA" and content["scalar"] == 2
    assert find_state_dict(content)["conv1_w"].tolist() == [0, 1, 2]


def test_pickle_of_python_2_is_read(tmp_path):
    values = np.array([1.5, -2.0], dtype="<f4")
    assert max(values.tobytes()) > 127  # what is no ASCII
    (tmp_path / "R-50.pkl").write_bytes(
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + values.tobytes() + b"tbs."
    )
    content = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert find_state_dict(content)["conv1_w"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("blobs",), ("model", "blobs")])
def test_state_dict_is_found_where_it_is_nested(keys):
    content: dict[str, Any] = {"module.fc.weight": torch.ones(1), "lr": 0.1, "words": np.array("a")}
    for key in keys:
        content = {key: content, "epoch": 3}
    assert find_state_dict(content) == {"fc.weight": torch.ones(1)}


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_file_that_would_run_something_is_refused_by_its_name_and_runs_nothing(tmp_path, kind):
    witness, path = tmp_path / "witness", tmp_path / ("t.pkl" if kind == "pickle" else "t.pth")
    weight = np.ones(1) if kind == "pickle" else torch.ones(1)
    content = {"model": {"conv1.weight": weight}, "trap": Trap(witness)}
    if kind == "pickle":
        write_pickle(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system, .* --trust lets it"):
        read_checkpoint(str(path))
    assert find_pixel_format(str(path)) is None
    assert not witness.exists()
    assert "conv1.weight" in read_checkpoint(str(path), trust=True)["model"]
    assert witness.exists()


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "numpy.load", "numpy.core.multiarray.frombuffer", "torch.load"]
)
def test_pickle_may_make_arrays_only(tmp_path, name):
    module, _, function = name.rpartition(".")
    (tmp_path / "t.pkl").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(ValueError, match=f"asks for {name}, "):
        read_checkpoint(str(tmp_path / "t.pkl"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>"])
def test_broken_file_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    torch.save(CONTENT, path) if suffix == ".pth" else write_pickle(ARRAYS, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        read_checkpoint(str(path))
    assert str(error.value).startswith(f"checkpoint {str(path)!r} cannot be read: it is cut off")
    assert find_pixel_format(str(path)) is None


def test_missing_file_and_file_of_something_else_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint '.*none.pth'"):
        read_checkpoint(str(tmp_path / "none.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="'.*list.pth' holds a list; expected a state dict"):
        read_checkpoint(str(tmp_path / "list.pth"))


def test_safetensors_are_read_by_their_library_if_it_is_there(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="cannot be read: it needs `pip install safetensors`"):
        read_checkpoint(str(path))
    library = SimpleNamespace(load_file=lambda file: {"fc.bias": torch.ones(1), "of": file})
    monkeypatch.setitem(sys.modules, "safetensors", library)
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)
    assert read_checkpoint(str(path)) == {"fc.bias": torch.ones(1), "of": str(path)}


# --------------------------------------------------------------------------------------- backbones


@pytest.mark.parametrize("depth", BLOCKS)
def test_depth_is_recognised_in_every_spelling(depth):
    ours = list(resnet(depth))
    for names in (ours, sequential(ours), detectron2(ours), caffe2(depth)):
        assert find_backbone(names).architecture == f"ResNet-{depth}"


@pytest.mark.parametrize(("index", "spelling"), [(0, "Detectron2"), (1, "Caffe2")])
def test_names_of_a_resnet_are_translated(index, spelling):
    names = {common: spelled[index] for common, spelled in SPELLINGS.items()}
    rest = detectron2(resnet(50)) if spelling == "Detectron2" else caffe2(50)
    backbone = find_backbone([*rest, *names.values()])
    assert (backbone.spelling, backbone.prefix) == (spelling, "")
    assert names.items() <= backbone.names.items()


def test_names_of_a_resnet_in_a_sequential_are_translated():
    prefix = "backbone.resnet_layer."
    theirs = [prefix + name for name in sequential(resnet(50))]
    backbone = find_backbone([*theirs, "clf.head.0.weight"])
    assert str(backbone) == f"ResNet-50, torchvision's names below {prefix!r}"
    assert backbone.names == dict(zip(resnet(50), theirs, strict=True))


def test_names_of_mobilenet_v2_are_translated():
    backbone = find_backbone(MOBILENET.values())
    assert backbone.architecture == "MobileNetV2" and backbone.spelling == "torchvision"
    assert backbone.names == MOBILENET
    of_mmdetection = [name for name in MOBILENET if not name.startswith("fc")]
    backbone = find_backbone(f"backbone.{name}" for name in of_mmdetection)
    assert (backbone.spelling, backbone.prefix) == ("MMDetection", "backbone.")
    assert backbone.names == {name: f"backbone.{name}" for name in of_mmdetection}


@pytest.mark.parametrize("child", ["triplet_attention", "triplet", "pcam"])
@pytest.mark.parametrize("old_gates", [False, True])
def test_all_published_spellings_of_the_attention_are_one(child, old_gates):
    published = {"cw.conv": "ChannelGateH", "hc.conv": "ChannelGateW", "hw.conv": "SpatialGate"}
    ours = resnet(18, attention=True)
    theirs = {k.replace("triplet_attention", child): v for k, v in ours.items()}
    for gate, name in published.items() if old_gates else ():
        theirs = {k.replace(f".{gate}.", f".{name}.spatial."): v for k, v in theirs.items()}
    gate = "SpatialGate.spatial" if old_gates else "hw.conv"
    assert f"layer1.0.{child}.{gate}.bn.bias" in theirs
    assert find_backbone(theirs).names.keys() == find_backbone(ours).names.keys()
    assert str(find_backbone(theirs)) == (
        "ResNet-18 with triplet attention in 8 blocks, torchvision's names"
    )
    mobilenet = [*MOBILENET.values(), "features.2.conv.4.ChannelGateW.spatial.conv.weight"]
    names = find_backbone(mobilenet).names
    assert "layer2.0.triplet_attention.hc.conv.conv.weight" in names


@pytest.mark.parametrize(
    ("backbone", "roi_head", "translate"),
    [
        ("backbone.", "roi_heads.", detectron2),
        ("backbone.", "roi_head.shared_head.", list),
    ],
    ids=["Detectron2", "MMDetection"],
)
def test_last_stage_of_a_c4_detector_is_found_in_its_roi_head(backbone, roi_head, translate):
    names = [
        (roi_head if name.startswith(("res5", "layer4")) else backbone) + name
        for name in translate(resnet(101))
    ]
    heads = ["roi_heads.box_predictor.conv1.weight", "backbone.fpn_lateral2.weight"]
    found = find_backbone([*names, *heads])
    assert (found.depth, found.prefix) == (101, "backbone.")
    assert found.names.keys() == resnet(101).keys()
    assert not set(heads) & set(found.names.values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "it holds no tensors"),
        (["patch_embed.weight", "head.weight"], "no ResNet and .* patch_embed.weight, head.weight"),
        (["conv1.0.weight", *[*resnet(50)][1:]], "a ResNet-D"),
        ([f"{n}.{name}" for n in ("student", "teacher") for name in resnet(50)], "'teacher.'"),
        ([n for n in resnet(50) if not n.startswith("layer3.5")], "have 3, 4, 5, 3 blocks"),
    ],
    ids=["empty", "another network", "deep stem", "two networks", "a block less"],
)
def test_what_is_no_known_backbone_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        find_backbone(names)


# -------------------------------------------------------------------------------------- conversion


def test_tensors_get_the_targets_names_and_the_rest_is_told():
    source = {f"backbone.{n}": t for n, t in resnet(50).items()} | zeros(["bbox_head.weight"])
    target = zeros(detectron2(resnet(50, attention=True)))
    target = {name: torch.zeros(2, 2) for name in target}
    conversion = convert(source, target)
    assert torch.equal(
        conversion.tensors["res4.5.conv1.norm.bias"], source["backbone.layer3.5.bn1.bias"]
    )
    assert len(conversion.matched) == len(conversion.tensors) == len(resnet(50))
    assert conversion.unused == ["bbox_head.weight"]
    assert len(conversion.fresh) == 16 * (3 * 5)  # no batch counters
    assert all(".triplet_attention." in name for name in conversion.fresh)


def test_batch_counters_are_nobodys_loss():
    def without(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in state_dict.items() if "num_batches_tracked" not in n}

    for source, target in ((resnet(18), without(resnet(18))), (without(resnet(18)), resnet(18))):
        conversion = convert(source, target)
        assert conversion.tensors.keys() == without(resnet(18)).keys()
        assert conversion.fresh == conversion.unused == []


def test_norm_without_statistics_is_no_batch_norm():
    source = resnet(50)
    del source["bn1.running_mean"], source["bn1.running_var"]
    with pytest.raises(ValueError, match="norm of bn1.weight has no running statistics"):
        convert(source, resnet(50))


def test_gates_without_alpha_are_the_published_function():
    target = resnet(18, attention=True) | {"layer1.1.triplet_attention.alpha": torch.zeros(())}
    conversion = convert(resnet(18, attention=True), target)
    assert conversion.implied == ["layer1.1.triplet_attention.alpha"]
    assert conversion.tensors["layer1.1.triplet_attention.alpha"] == 1
    plain = convert(resnet(18), target)
    assert "layer1.1.triplet_attention.alpha" in plain.fresh and not plain.implied


def test_alpha_is_not_lost():
    source = resnet(18, attention=True) | {"layer1.1.triplet_attention.alpha": torch.zeros(())}
    with pytest.raises(ValueError, match="warm_start=True too"):
        convert(source, resnet(18, attention=True))


def test_another_depth_and_another_shape_are_refused():
    with pytest.raises(ValueError, match="weights of a ResNet-50, but the model has a ResNet-101"):
        convert(resnet(50), resnet(101))
    wide = {name: torch.zeros(2, 3) for name in resnet(18)}
    with pytest.raises(ValueError, match=r"conv1.weight is \(2, 2\), not \(2, 3\); .* more$"):
        convert(resnet(18), wide)


def test_tensors_are_copies_in_the_targets_type():
    source = {n: torch.ones(4, 2, 2, dtype=torch.float64)[1] for n in resnet(18)}
    weight = convert(source, resnet(18)).tensors["conv1.weight"]
    assert weight.dtype == torch.float32 and weight.untyped_storage().nbytes() == 4 * 4
    assert not weight.requires_grad


@pytest.mark.parametrize("no_spatial", [False, True])
@pytest.mark.parametrize("warm_start", [False, True])
def test_block_plugins_are_found_with_their_arguments(no_spatial, warm_start):
    arguments = {"kernel_size": 3, "no_spatial": no_spatial}
    plugin = build_block_plugin("triplet_attention", 4, warm_start, **arguments)
    state_dict = resnet(18)
    assert plugins_in(state_dict) == []
    for block in ("layer2.0", "layer2.1", "layer4.0", "layer4.1"):
        tensors = plugin.state_dict()
        state_dict |= {f"{block}.triplet_attention.{n}": t for n, t in tensors.items()}
    eca = torch.zeros(1, 1, 3)
    state_dict |= {f"layer3.{i}.timm_eca.conv.weight": eca for i in range(2)}
    assert plugins_in(state_dict) == [
        FoundPlugin("triplet_attention", (2, 4), warm_start, arguments),
        FoundPlugin("timm:eca", (3,), False, {}),
    ]
    with pytest.raises(ValueError, match="its blocks have 'my_attention', which is no block plug"):
        plugins_in(state_dict | {"layer3.1.my_attention.weight": torch.zeros(1)})
    first = state_dict.pop("layer3.0.timm_eca.conv.weight")
    assert plugins_in(state_dict)[1] == FoundPlugin("timm:eca", (3,), False, {}, "last")
    del state_dict["layer3.1.timm_eca.conv.weight"]
    with pytest.raises(ValueError, match="nor the last of each has the same timm_eca"):
        plugins_in(state_dict | {"layer3.0.timm_eca.conv.weight": first})


def test_another_name_is_another_plugin_unless_it_says_nothing():
    def with_plugin(*children):
        kernel = torch.zeros(1, 1, 3)
        return resnet(18) | {f"layer4.1.{child}.conv.weight": kernel for child in children}

    found = convert(with_plugin("block_plugin_x"), with_plugin("timm_eca"))
    assert "layer4.1.timm_eca.conv.weight" in found.matched
    with pytest.raises(ValueError, match="take a config with timm_eca in the same stages"):
        convert(with_plugin("timm_eca"), with_plugin("timm_ceca"))
    with pytest.raises(ValueError, match="apply timm_eca, then ida; the model's apply ida, then"):
        convert(with_plugin("timm_eca", "ida"), with_plugin("ida", "timm_eca"))


@pytest.mark.parametrize("child", ["triplet_attention", "timm_eca", "my_attention"])
def test_weights_whose_plugins_the_model_has_no_place_for_are_refused(child):
    hint = "they are another network's"
    if child != "my_attention":
        hint = f"take a config with {child} in the same stages"
    source = resnet(18) | {f"layer2.0.{child}.cw.conv.conv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"have layer2.0.{child}.* no place for: {hint}"):
        convert(source, resnet(18))


def test_plugin_of_another_name_and_the_same_tensors_is_the_same():
    source = resnet(18) | {"layer2.0.plugin_se.fc1.weight": torch.ones(2, 3)}
    target = resnet(18) | {"layer2.0.timm_se.fc1.weight": torch.zeros(2, 3)}
    conversion = convert(source, target)
    assert torch.equal(conversion.tensors["layer2.0.timm_se.fc1.weight"], torch.ones(2, 3))
    assert not conversion.unused and not conversion.fresh


# ----------------------------------------------------------------------------------- pixel formats


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
