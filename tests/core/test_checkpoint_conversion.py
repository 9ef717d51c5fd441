"""The backbones in checkpoints, and their tensors under another model's names."""

from __future__ import annotations

import pytest
import torch
from network_names import BLOCKS, MOBILENET, caffe2, detectron2, resnet, sequential, zeros
from torch import Tensor

from plugin_core import build_block_plugin
from plugin_core.checkpoints.conversion import FoundPlugin, convert, find_backbone, plugins_in

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
