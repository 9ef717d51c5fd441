"""tools/convert_checkpoint.py on timm's checkpoints, whose attention is called ``se``."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_checkpoint_cases import BOTH, D2_CONFIG, needs, outputs_of_blocks, randomized, run
from convert_checkpoint_cases import detectron2_features as detectron2
from convert_checkpoint_cases import mmdetection_features as mmdetection
from torch import Tensor, nn

from plugin_core import BlockPlugin, timm_layer

timm = pytest.importorskip("timm", reason="timm is not installed")

STAGES = ("layer1", "layer2", "layer3", "layer4")
MM_CONFIG = """
custom_imports = dict(imports=["mm_plugins"])
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(type="DetDataPreprocessor"),
    backbone={backbone},
)
"""


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are built without values, as every tensor that counts is loaded or drawn here."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def trained(name: str, *, warm_start: bool, **arguments: Any) -> nn.Module:
    """A ResNet-18 of timm whose every value counts."""
    torch.manual_seed(0)
    layer = timm_layer(name, warm_start=warm_start, **arguments)
    model = randomized(timm.create_model("resnet18", block_args={"attn_layer": layer}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BlockPlugin) and module.alpha is not None:
                module.alpha.uniform_(0.3, 0.7)
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.normal_(std=0.1)
    return model


def save(model: nn.Module, path: Path, **more: Any) -> None:
    """Write a file as timm's train.py does."""
    training = {"epoch": 3, "arch": "resnet18_triplet", "version": 2, "metric": 71.5}
    training["args"] = Namespace(model="resnet18_triplet", opt="sgd", model_kwargs={}, mean=None)
    training["optimizer"] = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
    training["saver"] = {"best_epoch": 3, "best_metric": 71.5}
    torch.save({**training, "state_dict": model.state_dict(), **more}, path)


def features(to: str, plugin: dict[str, Any], weights: Path, x: Tensor, folder: Path):
    """The outputs of all blocks of a framework's ResNet-18 with a block plugin everywhere."""
    if to == "mm":
        return mmdetection(mm_backbone(plugin), str(weights), x)
    config = folder / "features.yaml"
    config.write_text(d2_config(plugin))
    return detectron2(str(config), str(weights), x)


def mm_backbone(plugin: dict[str, Any]) -> dict[str, Any]:
    arguments = {key: value for key, value in plugin.items() if key != "name"}
    own = {"triplet_attention": "TripletAttention", "ida": "IDABlock", "simam": "SimAM"}
    kind = {"type": own.get(plugin["name"], "BlockPlugin")}
    if plugin["name"] not in own:
        kind["name"] = plugin["name"]
    layer = {"cfg": kind | arguments, "position": "after_conv2", "blocks": "all"}
    return {"type": "PluginResNet", "depth": 18, "plugins": [layer]}


def d2_config(plugin: dict[str, Any]) -> str:
    listed = {key.upper(): value for key, value in plugin.items()}
    listed |= {"STAGES": ["res2", "res3", "res4", "res5"], "BLOCKS": "all"}
    mean = "[123.675, 116.28, 103.53]"
    return D2_CONFIG.format(depth=18, channels=64, mean=mean, stride_in_1x1=False, plugins=[listed])


def write_config(to: str, plugin: dict[str, Any], folder: Path) -> str:
    path = folder / ("config.yaml" if to == "d2" else "config.py")
    text = d2_config(plugin) if to == "d2" else MM_CONFIG.format(backbone=mm_backbone(plugin))
    path.write_text(text)
    return str(path)


def assert_same_features(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 8
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3  # there is something to compare
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@BOTH
@pytest.mark.parametrize(
    ("name", "arguments", "warm_start"),
    [
        ("triplet_attention", {"kernel_size": 3}, False),
        ("triplet_attention", {"kernel_size": 7, "no_spatial": True}, True),
        ("ida", {"num_queries": 3, "num_heads": 4}, True),
    ],
)
def test_detectors_backbone_computes_what_timms_classifier_computes(
    tmp_path, capsys, to, name, arguments, warm_start
):
    x = torch.randn(1, 3, 64, 64)
    model = trained(name, warm_start=warm_start, **arguments)
    save(model, tmp_path / "last.pth.tar")
    assert run(tmp_path / "last.pth.tar", tmp_path / "out.pth", to) == 0
    said = capsys.readouterr().out
    assert "fresh, as SOURCE has none: none\nunused of SOURCE: fc.weight, fc.bias\n" in said
    assert f"se, as timm calls any attention, is {name} by its tensors" in said
    assert "averages" not in said
    plugin = {"name": name, "warm_start": warm_start, **arguments}
    found = features(to, plugin, tmp_path / "out.pth", x, tmp_path)
    assert_same_features(found, outputs_of_blocks(model, x, STAGES))


@BOTH
@pytest.mark.parametrize("name", ["timm:se", "simam"])
def test_attention_that_its_tensors_do_not_tell_is_said_by_the_config(tmp_path, capsys, to, name):
    x = torch.randn(1, 3, 64, 64)
    model = trained(name, warm_start=True)
    save(model, tmp_path / "last.pth.tar")
    assert run(tmp_path / "last.pth.tar", tmp_path / "out.pth", to) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "blocks have 'se', as timm calls any attention, " in said and "say by --config" in said
    assert not (tmp_path / "out.pth").exists()
    plugin = {"name": name, "warm_start": True}
    config = write_config(to, plugin, tmp_path)
    assert run(tmp_path / "last.pth.tar", tmp_path / "out.pth", to, "--config", config) == 0
    found = features(to, plugin, tmp_path / "out.pth", x, tmp_path)
    assert_same_features(found, outputs_of_blocks(model, x, STAGES))


@needs("mmdet")
def test_timms_own_squeeze_and_excitation_is_not_taken_for_another_attention(tmp_path, capsys):
    torch.save(
        randomized(timm.create_model("seresnet18")).state_dict(), tmp_path / "seresnet18.pth"
    )
    plugin = {"name": "triplet_attention", "warm_start": True}
    config = write_config("mm", plugin, tmp_path)
    out = tmp_path / "out.pth"
    assert run(tmp_path / "seresnet18.pth", out, "mm", "--config", config) == 1
    assert (
        "blocks have layer1.0.se.fc1.weight, which the model's have no" in capsys.readouterr().err
    )


@needs("mmdet")
def test_moving_averages_are_left_and_said_to_be(tmp_path, capsys):
    model = trained("triplet_attention", warm_start=False)
    averages = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    save(model, tmp_path / "last.pth.tar", state_dict_ema=averages)
    assert run(tmp_path / "last.pth.tar", tmp_path / "out.pth", "mm") == 0
    assert "holds state_dict_ema, the moving averages" in capsys.readouterr().out
    converted = torch.load(tmp_path / "out.pth")["state_dict"]
    assert torch.equal(converted["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
