"""tools/convert_checkpoint.py on the authors' files: what it makes computes the same features."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import published_triplet_attention as authors
import pytest
import torch
import torch.nn.functional as F
from convert_checkpoint_cases import (
    BOTH,
    assert_same,
    authors_mobilenet,
    authors_resnet,
    detectron2_config,
    detectron2_features,
    features,
    mmdetection_backbone,
    mmdetection_features,
    mobilenet_features,
    needs,
    residual_blocks,
    resnet_features,
    run,
)
from torch import Tensor, nn

from plugin_core import IDAClassifier, build_block_plugin
from plugin_core.checkpoints.reading import find_state_dict, read_checkpoint


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built without values, as every tensor that counts is loaded or drawn here."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


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


@pytest.mark.parametrize(
    ("version", "heavy"),
    [("org_backbone", True), ("new_attention", False), ("new_attention", True)],
)
def test_idas_reproduction_becomes_a_whole_classifier_of_mmpretrain_with_its_logits(
    tmp_path, capsys, version, heavy
):
    pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")
    from mmengine.registry import MODELS, DefaultScope

    import mm_plugins  # noqa: F401  # registers the plugins

    net, x = authors_resnet(18, attention=False), torch.randn(2, 3, 64, 64)
    last = version == "new_attention"
    drawn = {
        n: torch.randn_like(t) * t.shape[-1] ** -0.5
        for n, t in IDAClassifier(512, 5, heavy=heavy).state_dict().items()
    }
    source, out = tmp_path / "model_best.pth.tar", tmp_path / "out.pth"
    torch.save(reproduction_checkpoint(net, drawn, version), source)

    assert run(source, out, "mmpretrain") == 0
    said = capsys.readouterr().out
    form = "heavy" if heavy else "light"
    assert f"; its head is IDA ({form})" in said and "unused of SOURCE: none" in said
    assert "mean=[123.675, 116.28, 103.53]" in said and "--orid_norm" in said
    # What it prints is the model.
    model = eval(said.partition("model = ")[2])
    assert model["head"]["sample_order"] == "interleaved"
    assert model["head"]["last_head_norm"] == last
    backbone = {"type": "ResNet", "depth": 18, "num_stages": 4, "out_indices": (3,)}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        built = MODELS.build({"type": "ImageClassifier", "backbone": backbone, **model}).eval()
    result = built.load_state_dict(torch.load(out)["state_dict"], strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)
    expected = reproduction_logits(drawn, resnet_features(net, x)[-1], last)
    with torch.no_grad():
        torch.testing.assert_close(built(x, mode="tensor"), expected, rtol=1e-4, atol=1e-4)


def test_backbone_alone_is_no_classifier_for_mmpretrain(tmp_path, capsys):
    pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")
    source, out = tmp_path / "resnet18.pth", tmp_path / "out.pth"
    state = authors_resnet(18).state_dict()
    torch.save({n: t for n, t in state.items() if not n.startswith("fc.")}, source)
    assert run(source, out, "mmpretrain") == 1
    assert capsys.readouterr().err == (
        f"error: {source}: it has no linear classifier (fc); a backbone alone is converted with "
        "--to mm, for MMPretrain too\n"
    )
    assert not out.exists()
