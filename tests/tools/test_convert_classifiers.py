"""A classifier of MMPretrain becomes a detector's backbone in either framework."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from convert_checkpoint_cases import (
    BOTH,
    assert_same,
    authors_mobilenet,
    authors_resnet,
    caffe2_weights,
    features,
    mmdetection_backbone,
    mmdetection_features,
    outputs_of_blocks,
    randomized,
    resnet_features,
    run,
)

from plugin_core.checkpoints.pixel_format import TORCHVISION, find_pixel_format

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

CONFIGS = Path(__file__).resolve().parents[2] / "configs/mmpretrain/triplet_attention"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint as MMPretrain's trainer writes it, an image and its blocks' outputs."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    import mm_plugins  # noqa: F401  # registers the plugins

    cfg = Config.fromfile(CONFIGS / "resnet18-triplet_8xb32_in1k.py")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = randomized(MODELS.build(cfg.model)).eval()
    path = tmp_path_factory.mktemp("classifier") / "epoch_100.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {"cfg": cfg.pretty_text}}, path)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = outputs_of_blocks(model.backbone, x, model.backbone.res_layers)
    return path, x, outputs


@BOTH
def test_converted_classifier_computes_the_same_in_every_block(classifier, to, tmp_path, capsys):
    path, x, expected = classifier
    out = tmp_path / "converted.pth"
    assert run(path, out, to) == 0
    assert "ResNet-18 with triplet attention in 8 blocks" in capsys.readouterr().out
    assert_same(features(to, 18, tmp_path, out, x), expected)


def test_mmdetection_takes_a_classifier_as_it_is(classifier):
    path, x, expected = classifier
    backbone = mmdetection_backbone(18)
    assert_same(mmdetection_features(backbone, str(path), x, prefix="backbone."), expected)


def test_pixels_of_a_classifier_are_those_of_its_config(classifier, tmp_path):
    path, _, _ = classifier
    wanted = find_pixel_format(str(path))
    assert wanted is not None and wanted.channel_order == "RGB"
    assert (wanted.mean, wanted.std) == (TORCHVISION.mean, TORCHVISION.std)
    assert run(path, tmp_path / "converted.pth", "d2") == 0
    assert find_pixel_format(str(tmp_path / "converted.pth")) == wanted


@torch.no_grad()
@pytest.mark.parametrize(
    ("network", "kernel_size"),
    [("ResNet-18", 3), ("ResNet-18", 7), ("ResNet-50", 7), ("MobileNetV2", 7)],
)
def test_authors_classifier_gives_its_logits_in_mmpretrain(network, kernel_size, tmp_path, capsys):
    from mmengine.registry import MODELS, DefaultScope

    import mm_plugins  # noqa: F401  # registers the plugins

    x = torch.randn(2, 3, 64, 64)
    if network == "MobileNetV2":
        net = authors_mobilenet(kernel_size=kernel_size).eval()
        expected = net(x)
    else:
        net = authors_resnet(int(network[-2:]), kernel_size=kernel_size)
        expected = net.fc(resnet_features(net, x)[-1].mean((2, 3)))
    source, out = tmp_path / "model_best.pth.tar", tmp_path / "out.pth"
    content = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": content, "epoch": 100}, source)
    assert run(source, out, "mmpretrain") == 0
    said = capsys.readouterr().out
    assert f"{network} with triplet attention in" in said and "unused of SOURCE: none" in said
    assert "to_rgb=True" in said
    # What it prints is the model, beside what MMPretrain's configs of these networks have.
    model = eval(said.partition("model = ")[2])
    model["backbone"] |= {"out_indices": (3,)} if "ResNet" in network else {}
    model["head"] |= {"type": "LinearClsHead"}
    neck = {"type": "GlobalAveragePooling"}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        built = MODELS.build({"type": "ImageClassifier", "neck": neck, **model}).eval()
    result = built.load_state_dict(torch.load(out)["state_dict"], strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)
    torch.testing.assert_close(built(x), expected, rtol=1e-4, atol=1e-4)


def test_strides_of_caffe2s_weights_are_told(tmp_path, capsys):
    net = authors_resnet(50, attention=False)
    weights = {**caffe2_weights(net), "fc1000_b": net.fc.bias.detach().numpy()}
    source = tmp_path / "R-50.pkl"
    with open(source, "wb") as file:
        pickle.dump(weights, file, protocol=2)
    assert run(source, tmp_path / "out.pth", "mmpretrain") == 0
    said = capsys.readouterr().out
    assert "style='caffe'" in said and "to_rgb=False" in said


def test_classifier_of_mmpretrain_needs_no_conversion(classifier, tmp_path, capsys):
    path, _, _ = classifier
    assert run(path, tmp_path / "out.pth", "mmpretrain") == 1
    assert "is a classifier of MMPretrain; use it as it is" in capsys.readouterr().err


def test_config_says_which_module_timms_se_is(tmp_path, capsys):
    from mmengine.registry import MODELS, DefaultScope

    layer = {"type": "BlockPlugin", "name": "timm:eca"}
    plugins = [{"cfg": layer, "position": "after_conv2"}]
    backbone = {"type": "PluginResNet", "depth": 18, "plugins": plugins}
    with DefaultScope.overwrite_default_scope("mmdet"):
        state = MODELS.build(backbone).state_dict()
    source, config = tmp_path / "own.pth", tmp_path / "own.py"
    state = {n.replace("block_plugin", "se"): t for n, t in state.items()}
    torch.save({**state, "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}, source)
    config.write_text(f"model = dict(backbone={backbone})")
    out = tmp_path / "out.pth"
    assert run(source, out, "mmpretrain") == 1
    assert "say by --config" in capsys.readouterr().err
    assert run(source, out, "mmpretrain", "--config", str(config)) == 0
    converted = torch.load(out)["state_dict"]
    assert sum("block_plugin" in name for name in converted) == 8
    assert converted["head.fc.weight"].shape == (5, 512)


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(backbone=",  # not Python
        "model = dict(backbone=dict(style='pytorch'))",
        "data_preprocessor = dict(mean=[1, 2, 3], std=read('std.txt'))",
        "layer = dict(init_cfg=dict(mean=0, std=0.01))",
    ],
)
def test_config_that_does_not_tell_the_pixels_tells_none(classifier, tmp_path, text):
    path = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "meta": {"cfg": text}}, path)
    assert find_pixel_format(str(path)) is None
