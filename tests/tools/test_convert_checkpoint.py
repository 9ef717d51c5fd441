"""tools/convert_checkpoint.py: what it makes, loaded by the frameworks themselves."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import published_triplet_attention as authors
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugin_core import IDABlock, IDAClassifier, TripletAttention, build_block_plugin
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint
from plugin_core.checkpoints.report import Target, report_pixels

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")


def needs(framework: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(framework) is None
    return pytest.mark.skipif(missing, reason=f"{framework} is not installed")


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built without values, as every tensor that counts is loaded or drawn here."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


BOTH = pytest.mark.parametrize(
    "to", [pytest.param("d2", marks=needs("detectron2")), pytest.param("mm", marks=needs("mmdet"))]
)


# ------------------------------------------------------------------------------- the authors' side


@functools.cache
def authors_resnet(depth: int, *, attention: bool = True, kernel_size: int = 7) -> nn.Module:
    """torchvision's classifier with attention in its blocks and values of its own; to be read."""
    net = getattr(torchvision.models, f"resnet{depth}")()
    for block in residual_blocks(net) if attention else ():
        block.triplet_attention = TripletAttention(kernel_size=kernel_size)
    return randomized(net)


def authors_mobilenet(kernel_size: int = 7) -> nn.Module:
    net = torchvision.models.mobilenet_v2()
    for feature in net.features[1:18]:
        feature.conv.append(TripletAttention(kernel_size=kernel_size))
    return randomized(net)


def randomized(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.normal_(std=(2 / module.weight[:, 0].numel()) ** 0.5)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.3, 0.9)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    return net.eval()


def residual_blocks(net: nn.Module) -> Iterator[nn.Module]:
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        yield from stage


@torch.no_grad()
def resnet_features(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of all blocks, computed without either framework."""
    x = F.max_pool2d(F.relu(net.bn1(net.conv1(x))), 3, stride=2, padding=1)
    outputs = []
    for block in residual_blocks(net):
        y = F.relu(block.bn1(block.conv1(x)))
        y = block.bn2(block.conv2(y))
        if hasattr(block, "conv3"):
            y = block.bn3(block.conv3(F.relu(y)))
        if hasattr(block, "triplet_attention"):
            y = block.triplet_attention(y)
        x = F.relu(y + (x if block.downsample is None else block.downsample(x)))
        outputs.append(x)
    return outputs


@torch.no_grad()
def mobilenet_features(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of all inverted residuals."""
    outputs = []
    for index, feature in enumerate(net.features[:18]):
        x = feature(x)
        if index > 0:
            outputs.append(x)
    return outputs


# ----------------------------------------------------------------------------- the frameworks' side


@torch.no_grad()
def outputs_of_blocks(net: nn.Module, x: Tensor, stages: Iterable[str]) -> list[Tensor]:
    outputs: list[Tensor] = []
    for stage in stages:
        for block in getattr(net, stage):
            block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    net.eval()
    net(x)
    return outputs


D2_CONFIG = """
VERSION: 2
INPUT: {{FORMAT: RGB}}
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  PIXEL_MEAN: {mean}
  PIXEL_STD: [58.395, 57.12, 57.375]
  BACKBONE: {{NAME: build_resnet_plugin_backbone}}
  RPN: {{IN_FEATURES: [res4]}}
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {channels}
    OUT_FEATURES: [res2, res3, res4, res5]
    STRIDE_IN_1X1: {stride_in_1x1}
    PLUGINS: {plugins}
"""


TRIPLET = "[{NAME: triplet_attention, STAGES: [res2, res3, res4, res5]}]"


def detectron2_config(
    tmp_path: Path,
    depth: int,
    *,
    attention: bool = True,
    mean: str = "[123.675, 116.28, 103.53]",
    stride_in_1x1: bool = False,
    kernel_size: int = 7,
) -> str:
    path = tmp_path / f"r{depth}.yaml"
    stages = "STAGES: [res2, res3, res4, res5]"
    plugin = f"{{NAME: triplet_attention, {stages}, KERNEL_SIZE: {kernel_size}}}"
    text = D2_CONFIG.format(
        depth=depth,
        channels=256 if depth >= 50 else 64,
        plugins=f"[{plugin}]" if attention else "[]",
        mean=mean,
        stride_in_1x1=stride_in_1x1,
    )
    path.write_text(text)
    return str(path)


@torch.no_grad()
def detectron2_features(config: str, weights: str, x: Tensor) -> list[Tensor]:
    """The outputs of all blocks, with weights as Detectron2's trainer loads ``MODEL.WEIGHTS``."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, config)
    backbone = nn.ModuleDict({"backbone": build_backbone(cfg)})
    left_over = DetectionCheckpointer(backbone).load(weights)
    assert set(left_over) <= {"matching_heuristics", "__author__", "pixel_format"}
    return outputs_of_blocks(backbone["backbone"], x, ("res2", "res3", "res4", "res5"))


@torch.no_grad()
def mmdetection_features(backbone: dict[str, Any], weights: str, x: Tensor) -> list[Tensor]:
    """The outputs of all blocks, with weights as MMDetection loads ``init_cfg``."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    import mm_plugins  # noqa: F401  # registers the plugins

    register_all_modules(init_default_scope=False)
    init = {"type": "Pretrained", "checkpoint": weights}
    with DefaultScope.overwrite_default_scope("mmdet"):
        built = MODELS.build({**backbone, "init_cfg": init})
        built.init_weights()
    stages = getattr(built, "res_layers", None) or [f"layer{i}" for i in range(1, 8)]
    return outputs_of_blocks(built, x, stages)


def mmdetection_backbone(
    depth: int, *, attention: bool = True, kernel_size: int = 7
) -> dict[str, Any]:
    position = "after_conv3" if depth >= 50 else "after_conv2"
    module = {"type": "TripletAttention", "kernel_size": kernel_size}
    plugins = [{"cfg": module, "position": position}]
    resnet = {"type": "PluginResNet", "depth": depth}
    return resnet | {"plugins": plugins} if attention else resnet


def features(
    to: str, depth: int, tmp_path: Path, weights: Path, x: Tensor, kernel_size: int = 7
) -> list[Tensor]:
    if to == "d2":
        config = detectron2_config(tmp_path, depth, kernel_size=kernel_size)
        return detectron2_features(config, str(weights), x)
    backbone = mmdetection_backbone(depth, kernel_size=kernel_size)
    return mmdetection_features(backbone, str(weights), x)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3  # there is something to compare
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def run(source: Path, out: Path, to: str, *options: str) -> int:
    return convert_checkpoint.main([str(source), str(out), "--to", to, *options])


# ----------------------------------------------------------------------------- authors' classifiers


def nested(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "epoch": 90,
        "arch": "resnet",
        "state_dict": {f"module.{n}": t for n, t in state_dict.items()},
    }


@BOTH
@pytest.mark.parametrize(
    ("depth", "kernel_size", "child", "old_gates"),
    [
        (18, 3, "triplet_attention", False),
        (18, 7, "triplet_attention", True),
        (50, 7, "pcam", True),
        (50, 3, "triplet", False),
    ],
)
def test_authors_classifier_computes_the_same_features(
    tmp_path, capsys, to, depth, kernel_size, child, old_gates
):
    net, x = authors_resnet(depth, kernel_size=kernel_size), torch.randn(1, 3, 64, 64)
    state = authors.published(net.state_dict(), child, old_gates)
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    torch.save(nested(state), source)
    assert run(source, out, to) == 0
    found = features(to, depth, tmp_path, out, x, kernel_size)
    assert_same(found, authors.resnet_features(state, x))
    said = capsys.readouterr().out
    blocks = {18: 8, 50: 16}[depth]
    assert f"ResNet-{depth} with triplet attention in {blocks} blocks, torchvision's" in said
    assert "fresh, as SOURCE has none: none" in said
    assert "unused of SOURCE: fc.weight, fc.bias" in said


@BOTH
@pytest.mark.parametrize(
    ("used", "other"), [("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder")]
)
def test_moco_gives_the_encoder_that_it_evaluates(tmp_path, capsys, to, used, other):
    """The second of the two is a moving average, for ``--branch``."""
    nets = {branch: authors_resnet.__wrapped__(18, attention=False) for branch in (used, other)}
    state = {"module.queue": torch.zeros(8, 16)}
    for branch, net in nets.items():
        state |= {f"module.{branch}.{n}": t for n, t in net.state_dict().items()}
        del state[f"module.{branch}.fc.weight"], state[f"module.{branch}.fc.bias"]
        state[f"module.{branch}.fc.0.weight"] = torch.zeros(512, 512)
    source, out, x = tmp_path / "moco.pth.tar", tmp_path / "out.pth", torch.randn(1, 3, 64, 64)
    torch.save({"arch": "resnet18", "epoch": 100, "state_dict": state}, source)
    for options, branch in (((), used), (("--branch", other), other)):
        assert run(source, out, to, *options) == 0
        said = capsys.readouterr().out
        assert f"below '{branch}.'" in said and "[123.675, 116.28, 103.53]" in said
        if to == "d2":
            config = detectron2_config(tmp_path, 18, attention=False)
            found = detectron2_features(config, str(out), x)
        else:
            backbone = mmdetection_backbone(18, attention=False)
            found = mmdetection_features(backbone, str(out), x)
        assert_same(found, resnet_features(nets[branch], x))
    assert run(source, out, to, "--branch", "teacher") == 1
    assert "begins with 'teacher'; they begin with" in capsys.readouterr().err


@needs("detectron2")
@needs("mmdet")
@pytest.mark.parametrize(("depth", "blocks", "legs"), [(18, 8, 4), (50, 16, 2)])
def test_there_and_back_again(tmp_path, capsys, depth, blocks, legs):
    net, x = authors_resnet(depth), torch.randn(1, 3, 64, 64)
    torch.save(net.state_dict(), tmp_path / "authors.pth")
    expected = resnet_features(net, x)
    source = tmp_path / "authors.pth"
    for to, out in [("d2", "a.pth"), ("mm", "b.pth"), ("d2", "c.pkl"), ("mm", "d.pth")][:legs]:
        assert run(source, tmp_path / out, to) == 0
        source = tmp_path / out
        assert_same(features(to, depth, tmp_path, source, x), expected)
    said = capsys.readouterr().out
    assert said.count(f"ResNet-{depth} with triplet attention in {blocks} blocks") == legs
    # The pixel format goes along, though the classifier that told it does not.
    assert said.count("[123.675, 116.28, 103.53]") == legs


@BOTH
def test_plain_classifier_leaves_the_attention_fresh(tmp_path, capsys, to):
    net, x = authors_resnet(18, attention=False), torch.randn(1, 3, 64, 64)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    assert run(tmp_path / "resnet18.pth", tmp_path / "out.pth", to) == 0
    said = capsys.readouterr().out
    stage = "res" if to == "d2" else "layer"
    assert f"fresh, as SOURCE has none: {stage}*.*.triplet_attention (120)\n" in said
    if to == "d2":
        config = detectron2_config(tmp_path, 18, attention=False)
        found = detectron2_features(config, str(tmp_path / "out.pth"), x)
    else:
        backbone = mmdetection_backbone(18, attention=False)
        found = mmdetection_features(backbone, str(tmp_path / "out.pth"), x)
    assert_same(found, resnet_features(net, x))


@needs("mmdet")
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_mobilenet_v2_computes_the_same_features(tmp_path, capsys, kernel_size):
    net, x = authors_mobilenet(kernel_size), torch.randn(1, 3, 64, 64)
    torch.save(nested(dict(net.state_dict())), tmp_path / "source.pth")
    # The attention stands before the shortcut's sum, as the last element of a block's `conv`.
    expected = mobilenet_features(net, x)
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", "mm") == 0
    module = {"type": "TripletAttention", "kernel_size": kernel_size}
    plugins = [{"cfg": module, "position": "after_linear_conv"}]
    backbone = {"type": "PluginMobileNetV2", "out_indices": (1, 2, 4, 7), "plugins": plugins}
    assert_same(mmdetection_features(backbone, str(tmp_path / "out.pth"), x), expected)
    said = capsys.readouterr().out
    assert "MobileNetV2 with triplet attention in 17 blocks" in said
    assert "fresh, as SOURCE has none: none" in said


def test_mobilenet_v2_for_detectron2_is_an_error(tmp_path, capsys):
    torch.save(authors_mobilenet().state_dict(), tmp_path / "source.pth")
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", "d2") == 1
    assert "Detectron2 has no MobileNetV2; convert it with --to mm" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


@BOTH
def test_attention_of_another_kernel_and_without_its_spatial_gate_is_kept(tmp_path, capsys, to):
    net = copy.deepcopy(authors_resnet(18, attention=False))
    for block in residual_blocks(net):
        block.triplet_attention = build_block_plugin(
            "triplet_attention", 4, True, kernel_size=3, no_spatial=True
        )
    torch.save(net.state_dict(), tmp_path / "source.pth")
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", to) == 0
    said = capsys.readouterr().out
    assert "fresh, as SOURCE has none: none" in said and "unused of SOURCE: fc." in said
    content = torch.load(tmp_path / "out.pth")["model" if to == "d2" else "state_dict"]
    name = ("res5" if to == "d2" else "layer4") + ".1.triplet_attention."
    assert content[f"{name}cw.conv.conv.weight"].shape[-1] == 3
    assert f"{name}alpha" in content and f"{name}hw.conv.conv.weight" not in content


# ---------------------------------------------------------------------- IDA's public reproduction


def reproduction_checkpoint(
    net: nn.Module, classifier: dict[str, Tensor], version: str
) -> dict[str, Any]:
    """What its trainer saves: the wrapped model, or the moving average of its first version's."""
    if version == "org_backbone":
        children = nn.Sequential(*list(net.children())[:-2])
        state = {f"backbone.resnet_layer.{n}": t for n, t in children.state_dict().items()}
    else:  # with frozen norms
        names = [n for n in net.state_dict() if not n.endswith("tracked") and n[:3] != "fc."]
        state = {f"backbone.0.body.{n}": net.state_dict()[n] for n in names}
    state |= {f"clf.{n}": t for n, t in classifier.items()}
    if version == "org_backbone":
        state = {f"module.{n}": t for n, t in state.items()}
    return {
        "epoch": 12,
        "arch": "IDA-R101-448",
        "state_dict": state,
        "best_mAP": np.mean(np.array([82.0, 85.0])),
        "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.zeros(2)}}, "param_groups": []},
    }


@torch.no_grad()
def reproduction_logits(w: dict[str, Tensor], x: Tensor, last_head_norm: bool) -> Tensor:
    """Its classifier's logits (B, K) of features (B, C, H, W), written for this test."""
    heads = [w[f"head.{n}.weight"].flatten(1) for n in range(4)]
    norms = [head.norm(dim=1, keepdim=True) + 1 / 32 for head in heads]
    found = []
    for head, norm, part in zip(heads, norms, x.flatten(2).chunk(4, dim=1), strict=True):
        share = ((head / norm) @ part).softmax(dim=2)  # (B, K, H·W)
        found.append(share @ part.mT)
    y = torch.stack(found, dim=3)  # (B, K, D, 4), whose memory is read as 4 rows of D
    rows = y.reshape(-1, 4, y.shape[2])
    for i in range(2 if "out_proj.weight" in w else 1):
        at = {n.removeprefix(f"att_layers.layers.{i}."): t for n, t in w.items()}

        def linear(name: str, x: Tensor, at: dict[str, Tensor] = at) -> Tensor:
            return x @ at[f"{name}.weight"].T + at[f"{name}.bias"]

        q, k, v = (linear(f"att.{name}_proj", rows) for name in "qkv")
        attended = (q @ k.mT / q.shape[2] ** 0.5).softmax(dim=2) @ v
        rows = rows + linear("att.out_proj", attended)
        if "norm1.weight" in at:
            size = rows.shape[2:]
            rows = F.layer_norm(rows, size, at["norm1.weight"], at["norm1.bias"])
            rows = rows + linear("linear2", linear("linear1", rows).relu())
            rows = F.layer_norm(rows, size, at["norm2.weight"], at["norm2.bias"])
    y = rows.reshape(*y.shape[:2], -1)
    if "out_proj.weight" in w:
        y = y @ w["out_proj.weight"].T + w["out_proj.bias"]
    divisors = [norms[-1]] * 4 if last_head_norm else norms
    of_all = [head / divisor for head, divisor in zip(heads, divisors, strict=True)]
    return (y * torch.cat(of_all, dim=1)).sum(dim=2)


@BOTH
@pytest.mark.parametrize(
    ("version", "heavy"), [("org_backbone", True), ("new_attention", True), ("org_backbone", False)]
)
def test_idas_reproduction_gives_its_features_in_the_frameworks_and_its_logits(
    tmp_path, capsys, to, version, heavy
):
    net, x = authors_resnet(18, attention=False), torch.randn(2, 3, 64, 64)
    last = version == "new_attention"
    ours = IDAClassifier(512, 5, heavy=heavy, sample_order="interleaved", last_head_norm=last)
    drawn = {n: torch.randn_like(t) * t.shape[-1] ** -0.5 for n, t in ours.state_dict().items()}
    source, out = tmp_path / "model_best.pth.tar", tmp_path / "out.pth"
    torch.save(reproduction_checkpoint(net, drawn, version), source)

    assert run(source, out, to) == 0
    said = capsys.readouterr().out
    assert "ResNet-18, torchvision's names below 'backbone." in said
    assert "unused of SOURCE: clf." in said and "[123.675, 116.28, 103.53]" in said
    expected = resnet_features(net, x)
    if to == "d2":
        config = detectron2_config(tmp_path, 18, attention=False)
        found = detectron2_features(config, str(out), x)
    else:
        found = mmdetection_features(mmdetection_backbone(18, attention=False), str(out), x)
    assert_same(found, expected)

    state = find_state_dict(read_checkpoint(str(source)))
    of_classifier = {n.removeprefix("clf."): t for n, t in state.items() if n.startswith("clf.")}
    ours.load_state_dict(of_classifier, strict=True)
    logits = reproduction_logits(drawn, expected[-1], last)
    torch.testing.assert_close(ours(expected[-1]), logits, rtol=1e-4, atol=1e-4)
    papers = IDAClassifier(512, 5, heavy=heavy)
    papers.load_state_dict(of_classifier, strict=True)  # without a word
    assert (papers(expected[-1]) - logits).abs().max() > 0.01


# ------------------------------------------------------------------------------ the frameworks' own


def caffe2_weights(net: nn.Module) -> dict[str, np.ndarray]:
    """A ResNet in Caffe2's names, its norms without statistics."""
    weights: dict[str, np.ndarray] = {}

    def add(conv: nn.Module, norm: nn.Module, conv_name: str, norm_name: str) -> None:
        weights[f"{conv_name}_w"] = conv.weight.detach().numpy()
        weights[f"{norm_name}_bn_s"] = norm.weight.detach().numpy()
        weights[f"{norm_name}_bn_b"] = norm.bias.detach().numpy()

    add(net.conv1, net.bn1, "conv1", "res_conv1")
    weights["conv1_b"] = np.zeros(64, dtype=np.float32)
    for stage in (1, 2, 3, 4):
        for i, block in enumerate(getattr(net, f"layer{stage}")):
            at = f"res{stage + 1}_{i}_branch"
            for letter, number in (("a", 1), ("b", 2), ("c", 3)):
                name = f"{at}2{letter}"
                add(getattr(block, f"conv{number}"), getattr(block, f"bn{number}"), name, name)
            if block.downsample is not None:
                add(*block.downsample, f"{at}1", f"{at}1")
    weights["fc1000_w"] = net.fc.weight.detach().numpy()
    return weights


@needs("detectron2")
@needs("mmdet")
def test_caffe2_weights_compute_what_detectron2_computes_with_them(tmp_path, capsys):
    x = torch.randn(1, 3, 64, 64)
    weights = caffe2_weights(authors_resnet(50, attention=False))
    source = tmp_path / "R-50.pkl"
    with open(source, "wb") as file:
        pickle.dump(weights, file, protocol=2)
    config = detectron2_config(tmp_path, 50, attention=False)
    expected = detectron2_features(config, str(source), x)

    assert run(source, tmp_path / "d2.pkl", "d2", "--config", config) == 0
    printed = capsys.readouterr()
    assert "Caffe2's names" in printed.out
    assert "unused of SOURCE: conv1_b, fc1000_w" in printed.out
    assert "MODEL.RESNETS.STRIDE_IN_1X1 = True" in printed.out
    assert f"{config}: INPUT.FORMAT is 'RGB', but the weights " in printed.err
    # Not to the bit: of norms without statistics Detectron2 takes a variance of 1, and adds 1e-5.
    assert_same(detectron2_features(config, str(tmp_path / "d2.pkl"), x), expected)

    assert run(source, tmp_path / "mm.pth", "mm") == 0
    assert "model.backbone.style = 'caffe'" in capsys.readouterr().out
    backbone = mmdetection_backbone(50, attention=False)
    assert_same(mmdetection_features(backbone, str(tmp_path / "mm.pth"), x), expected)


@needs("detectron2")
@needs("mmdet")
def test_backbone_is_taken_out_of_a_c4_detector(tmp_path, capsys):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()  # Faster R-CNN R50-C4, whose last stage is in its RoI head
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    model = build_model(cfg).state_dict()
    torch.save({"model": model, "iteration": 7}, tmp_path / "detector.pth")
    assert run(tmp_path / "detector.pth", tmp_path / "out.pth", "mm") == 0
    said = capsys.readouterr().out
    assert "ResNet-50, Detectron2's names below 'backbone.'" in said
    assert "proposal_generator.rpn_head" in said and "roi_heads.box_predictor" in said
    state_dict = torch.load(tmp_path / "out.pth")["state_dict"]
    assert torch.equal(state_dict["layer4.2.conv3.weight"], model["roi_heads.res5.2.conv3.weight"])
    assert torch.equal(state_dict["bn1.running_var"], model["backbone.stem.conv1.norm.running_var"])


@needs("detectron2")
def test_c4_config_gets_its_last_stage_too(tmp_path, capsys):
    net = authors_resnet(50)
    torch.save(net.state_dict(), tmp_path / "source.pth")
    config = tmp_path / "c4.yaml"
    config.write_text(
        "VERSION: 2\n"
        "MODEL:\n"
        "  BACKBONE: {NAME: build_resnet_plugin_backbone}\n"
        "  ROI_HEADS: {NAME: Res5PluginROIHeads}\n"
        "  RESNETS: {PLUGINS: [{NAME: triplet_attention, STAGES: [res2, res3, res4, res5]}]}\n"
    )
    out = tmp_path / "out.pth"
    assert run(tmp_path / "source.pth", out, "d2", "--config", str(config)) == 0
    assert "fresh, as SOURCE has none: none" in capsys.readouterr().out

    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from d2_plugins import add_plugin_config, merge_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    merge_config(cfg, str(config), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    DetectionCheckpointer(model).load(str(out))
    block, expected = model.roi_heads.res5[2], net.layer4[2]
    assert torch.equal(block.conv3.norm.running_var, expected.bn3.running_var)
    assert torch.equal(
        block.triplet_attention.state_dict()["hw.conv.conv.weight"],
        expected.triplet_attention.hw.conv.conv.weight,
    )
    assert torch.equal(model.backbone.stem.conv1.weight, net.conv1.weight)


@needs("mmdet")
def test_backbone_is_taken_out_of_mmengines_checkpoint(tmp_path, capsys):
    from mmengine.logging.history_buffer import HistoryBuffer

    history = HistoryBuffer()
    history.update(1.5)
    names = {f"backbone.{n}": t for n, t in authors_resnet(18).state_dict().items()}
    content = {
        "meta": {"epoch": 1},
        "state_dict": names | {"rpn_head.rpn_conv.weight": torch.zeros(1)},
        "message_hub": {"log_scalars": {"train/loss": history}},
    }
    torch.save(content, tmp_path / "epoch_1.pth")
    assert run(tmp_path / "epoch_1.pth", tmp_path / "out.pth", "mm") == 0
    said = capsys.readouterr().out
    assert "torchvision's names below 'backbone.'" in said
    assert "rpn_head.rpn_conv.weight" in said


# -------------------------------------------------------------------------------- config and pixels


@needs("detectron2")
def test_config_that_agrees_gets_no_warning_and_one_that_does_not_gets_one_a_setting(
    tmp_path, capsys
):
    torch.save(authors_resnet(50).state_dict(), tmp_path / "source.pth")
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    config = detectron2_config(tmp_path, 50)
    assert run(source, out, "d2", "--config", config) == 0
    assert "warning" not in capsys.readouterr().err
    swapped = "[103.53, 116.28, 123.675]"
    config = detectron2_config(tmp_path, 50, mean=swapped, stride_in_1x1=True)
    assert run(source, out, "d2", "--config", config) == 0
    mean, stride = capsys.readouterr().err.splitlines()
    assert f"{config}: MODEL.PIXEL_MEAN is [103.53, 116.28, 123.675], but the weights" in mean
    assert "that want [123.675, 116.28, 103.53]" in mean
    assert "MODEL.RESNETS.STRIDE_IN_1X1 is True" in stride and "want False" in stride


MM_CONFIG = """
custom_imports = dict(imports=["mm_plugins"])
plugin = dict(cfg=dict(type="TripletAttention", warm_start=True), position="after_conv2")
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        type="PluginResNet",
        depth=18,
        plugins=[plugin],
        style="caffe",
        init_cfg=dict(type="Pretrained", checkpoint="nowhere.pth"),
    ),
)
"""


@needs("mmdet")
def test_mmdetections_config_is_the_target(tmp_path, capsys):
    torch.save(authors_resnet(18).state_dict(), tmp_path / "source.pth")
    (tmp_path / "r18.py").write_text(MM_CONFIG)
    options = ("--config", str(tmp_path / "r18.py"))
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", "mm", *options) == 0
    printed = capsys.readouterr()
    # The published function, in a config that starts as the identity
    assert "layer*.*.triplet_attention.alpha (8)" in printed.out
    settings = [line.split()[2] for line in printed.err.splitlines()]
    assert settings == [
        "model.data_preprocessor.bgr_to_rgb",
        "model.data_preprocessor.mean",
        "model.data_preprocessor.std",
    ]  # and no style: the stride is at the same place in a ResNet-18 of either
    tensors = torch.load(tmp_path / "out.pth")["state_dict"]
    assert tensors["layer3.1.triplet_attention.alpha"] == 1


IDA_CONFIGS = {
    "d2": """
VERSION: 2
INPUT: {FORMAT: RGB}
MODEL:
  META_ARCHITECTURE: ProposalNetwork
  BACKBONE: {NAME: build_resnet_plugin_backbone}
  RPN: {IN_FEATURES: [res4]}
  RESNETS:
    DEPTH: 18
    RES2_OUT_CHANNELS: 64
    OUT_FEATURES: [res2, res3, res4, res5]
    PLUGINS: [{NAME: ida, STAGES: [res5], NUM_QUERIES: 6, WARM_START: True}]
""",
    "mm": """
custom_imports = dict(imports=["mm_plugins"])
layer = dict(type="IDABlock", num_queries=6, warm_start=True)
stages = (False, False, False, True)
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor"),
    backbone=dict(
        type="PluginResNet",
        depth=18,
        plugins=[dict(cfg=layer, stages=stages, position="after_conv2")],
    ),
)
""",
}


@needs("detectron2")
@needs("mmdet")
def test_ida_goes_from_framework_to_framework_with_a_config_that_has_it(tmp_path, capsys):
    from mmengine.config import Config

    configs = {to: tmp_path / f"ida.{'yaml' if to == 'd2' else 'py'}" for to in IDA_CONFIGS}
    for to, path in configs.items():
        path.write_text(IDA_CONFIGS[to])
    backbone = Config.fromfile(configs["mm"]).model.backbone
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "plain.pth")
    assert (
        run(tmp_path / "plain.pth", tmp_path / "0.pth", "mm", "--config", str(configs["mm"])) == 0
    )
    trained = torch.load(tmp_path / "0.pth")
    for block in range(2):
        trained["state_dict"][f"layer4.{block}.ida.alpha"] = torch.tensor(0.5)
        for name, tensor in IDABlock(512, 6).state_dict().items():
            trained["state_dict"][f"layer4.{block}.ida.{name}"] = torch.randn_like(tensor) / 20
    torch.save(trained, tmp_path / "1.pth")
    x = torch.randn(1, 3, 64, 64)
    expected = mmdetection_features(backbone, str(tmp_path / "1.pth"), x)
    for to, source, out in (("d2", "1.pth", "2.pth"), ("mm", "2.pth", "3.pth")):
        assert run(tmp_path / source, tmp_path / out, to, "--config", str(configs[to])) == 0
        said = capsys.readouterr().out
        assert "ResNet-18 with ida in 2 blocks" in said and "SOURCE has none: none" in said
    assert_same(detectron2_features(str(configs["d2"]), str(tmp_path / "2.pth"), x), expected)
    assert_same(mmdetection_features(backbone, str(tmp_path / "3.pth"), x), expected)
    assert run(tmp_path / "1.pth", tmp_path / "4.pth", "d2") == 0  # with the source's own plugins
    own, by_config = (torch.load(tmp_path / f"{n}.pth")["model"] for n in (4, 2))
    assert own.keys() == by_config.keys() and all(torch.equal(own[n], by_config[n]) for n in own)


def test_pixels_that_are_unknown_are_said_to_be():
    assert report_pixels(None, Target({}, dict)).startswith("pixels: unknown; ")


# ------------------------------------------------------------------------------------------- errors


def no_file(path: Path) -> None:
    pass


def garbage(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


def another_network(path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(1)}, path)


def deep_stem(path: Path) -> None:
    names = ["conv1.0.weight", "layer1.0.conv1.weight"]
    torch.save(dict.fromkeys(names, torch.zeros(1)), path)


def another_depth(path: Path) -> None:
    torch.save(authors_resnet(34, attention=False).state_dict(), path)


def another_width(path: Path) -> None:
    net = copy.deepcopy(authors_resnet(18, attention=False))
    net.layer1[0].conv1 = nn.Conv2d(64, 32, 3, bias=False)
    torch.save(net.state_dict(), path)


def trained_with_warm_start(path: Path) -> None:
    state_dict = authors_resnet(18).state_dict()
    torch.save(state_dict | {"layer1.0.triplet_attention.alpha": torch.zeros(())}, path)


def squeeze_and_excitation(path: Path) -> None:
    state_dict = authors_resnet(18, attention=False).state_dict()
    torch.save(state_dict | {"layer1.0.se.fc1.weight": torch.zeros(4, 64)}, path)


def group_norm(path: Path) -> None:
    state_dict = authors_resnet(18, attention=False).state_dict()
    torch.save({n: t for n, t in state_dict.items() if ".running_" not in n}, path)


class Trap:
    def __init__(self, witness: Path) -> None:
        self.command = f"touch {witness}"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def malicious(path: Path) -> None:
    torch.save({"conv1.weight": Trap(path.with_name("witness"))}, path)


@needs("detectron2")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_file, "there is no checkpoint"),
        (garbage, "cannot be read"),
        (another_network, "no ResNet and no MobileNetV2"),
        (deep_stem, "a ResNet-D"),
        (another_depth, "weights of a ResNet-34, but the model has a ResNet-18"),
        (another_width, "res2.0.conv1.weight is (32, 64, 3, 3), not (64, 64, 3, 3)"),
        (trained_with_warm_start, "warm_start=True"),
        (squeeze_and_excitation, "blocks have layer1.0.se.fc1.weight, which the model's have no"),
        (group_norm, "has no running statistics, as GroupNorm has none"),
        (malicious, "system, which weights have no need of"),
    ],
)
def test_source_that_cannot_be_converted_is_an_error_and_out_stays_as_it_was(
    tmp_path, capsys, write: Callable[[Path], None], message
):
    source, out = tmp_path / "source.pth", tmp_path / "out.pth"
    config = detectron2_config(tmp_path, 18)
    write(source)
    out.write_bytes(b"before")
    assert run(source, out, "d2", "--config", config) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(source) in error and message in error
    assert out.read_bytes() == b"before"
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"source.pth", "out.pth", "r18.yaml"}  # no rest of a file, no witness


@needs("detectron2")
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_disk_that_is_full_leaves_out_as_it_was(tmp_path, capsys, monkeypatch, suffix):
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "source.pth")
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"before")

    def fill_up(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fill_up)
    monkeypatch.setattr(pickle, "dump", fill_up)
    assert run(tmp_path / "source.pth", out, "d2") == 1
    assert capsys.readouterr().err == "error: No space left on device; nothing was written\n"
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"source.pth", out.name}


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/out.pth", "there is no folder"),
        ("out.onnx", "Detectron2 takes a file that ends in .pth or .pkl"),
        ("source.pth", "is SOURCE"),
        ("link.pth", "is SOURCE"),
        ("folder.pth", "is a folder"),
    ],
)
def test_out_that_cannot_be_written_is_an_error(tmp_path, capsys, out, message):
    source = tmp_path / "source.pth"
    another_network(source)
    before = source.read_bytes()
    (tmp_path / "link.pth").symlink_to(source)
    (tmp_path / "folder.pth").mkdir()
    assert run(source, tmp_path / out, "d2") == 1
    assert message in capsys.readouterr().err
    assert source.read_bytes() == before


def test_mmdetections_weights_are_pth_only(tmp_path, capsys):
    assert run(tmp_path / "source.pth", tmp_path / "out.pkl", "mm") == 1
    assert "MMDetection takes a file that ends in .pth" in capsys.readouterr().err


@BOTH
def test_config_that_cannot_be_built_is_an_error_that_names_it(tmp_path, capsys, to):
    torch.save(authors_resnet(18).state_dict(), tmp_path / "source.pth")
    config = tmp_path / ("c.yaml" if to == "d2" else "c.py")
    config.write_text("MODEL: {BACKBONE: {NAME: no_such}}\n" if to == "d2" else "model = dict()\n")
    for path in (config, tmp_path / f"none{config.suffix}"):
        options = ("--config", str(path))
        assert run(tmp_path / "source.pth", tmp_path / "out.pth", to, *options) == 1
        assert capsys.readouterr().err.startswith(f"error: --config {path}: ")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("to", "framework", "advice"),
    [
        ("d2", "detectron2", "pip install ./packaging/detectron2"),
        ("mm", "mmdet", "pip install -e .[mmdet]"),
    ],
)
def test_missing_framework_is_said_in_one_line(
    tmp_path, capsys, monkeypatch, to, framework, advice
):
    torch.save(authors_resnet(18, attention=False).state_dict(), tmp_path / "source.pth")
    for name in [n for n in sys.modules if n.partition(".")[0] == f"{to}_plugins"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, framework, None)
    assert run(tmp_path / "source.pth", tmp_path / "out.pth", to) == 1
    printed = capsys.readouterr()
    assert "source.pth: ResNet-18, torchvision's names" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: --to {to}: ") and advice in line
