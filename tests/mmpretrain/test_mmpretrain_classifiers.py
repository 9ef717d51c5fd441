"""Triplet attention's classifiers: the paper's sizes, training, plugins over the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mm_plugins.analysis import analyze, load_config
from plugin_core import TripletAttention
from plugin_core.block_plugins import registered_block_plugins
from plugin_core.errors import ArgumentError

CONFIGS = Path(__file__).resolve().parents[2] / "configs/mmpretrain/triplet_attention"
# Config → parameters, and the paper's GFLOPs, each kernel of 3 before its kernel of 7
PAPER = {
    "resnet18-triplet-k3_8xb32_in1k": (11_689_992, 1.823),
    "resnet18-triplet_8xb32_in1k": (11_691_912, 1.825),
    "resnet50-triplet-k3_8xb32_in1k": (25_557_992, 4.131),
    "resnet50-triplet_8xb32_in1k": (25_561_832, 4.169),
    "mobilenet-v2-triplet-k3_8xb12-400e_in1k": (3_505_892, 0.322),
    "mobilenet-v2-triplet_8xb12-400e_in1k": (3_509_972, 0.327),
}


def config(name: str) -> Config:
    return load_config(str(CONFIGS / f"{name}.py"))


def samples(labels: list[int]) -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in labels]


def step(model: nn.Module, x: Tensor, labels: list[int]) -> dict[str, Any]:
    losses: dict[str, Any] = model(x, samples(labels), mode="loss")
    losses["loss"].backward()
    return losses


def count_on_meta(settings: Config) -> tuple[int, int, int]:
    """Count parameters, what the authors' counter adds, and the outputs of gates' convolutions.

    The authors' counter adds the elements that ReLUs give and pooling reads. A gate's output is
    as large as a side of the feature map.
    """
    counted, gated = [], []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pools = isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d)
        counted.append((inputs[0] if pools else output).numel())

    def count_sides(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, c, h, w = inputs[0].shape
        gated.append(c * h + c * w + h * w)

    kinds = (nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    with torch.no_grad(), torch.device("meta"):
        model = MODELS.build(settings).eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(count)
            if isinstance(module, TripletAttention):
                module.register_forward_hook(count_sides)
        model(torch.zeros(1, 3, 224, 224))
    parameters = sum(p.numel() for p in model.parameters())
    return parameters, sum(counted), sum(gated)


@pytest.mark.parametrize("name", [name for name in PAPER if "k3" not in name])
def test_classifiers_have_the_size_that_the_paper_gives(name):
    cfg = config(name)
    report = analyze(cfg, activations=False)
    assert report.image_size == (224, 224)
    assert report.total.parameters == PAPER[name][0]
    _, added, sides = count_on_meta(cfg.model)
    total = report.total.flops + added
    # The paper's own two numbers for ResNet-18 are 2 MFLOPs apart. Its kernels are 5.3 apart.
    within = 0.004 if name == "resnet18-triplet_8xb32_in1k" else 0.001
    assert total / 1e9 == pytest.approx(PAPER[name][1], abs=within)

    small = name.replace("triplet", "triplet-k3")
    parameters, same, outputs = count_on_meta(config(small).model)
    assert (parameters, same, outputs) == (PAPER[small][0], added, sides)
    less = sides * 2 * (7**2 - 3**2)  # of two channels
    assert (total - less) / 1e9 == pytest.approx(PAPER[small][1], abs=0.001)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_configs_train_a_step_in_every_gate_and_predict(name, monkeypatch):
    for draw in ("kaiming_normal_", "kaiming_uniform_", "normal_"):  # PyTorch's initial values do
        monkeypatch.setattr(f"mmengine.model.weight_init.nn.init.{draw}", lambda w, *_, **__: w)
    model = MODELS.build(config(name).model).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    losses = step(model, torch.randn(2, 3, 32, 32), [3, 5])
    assert torch.isfinite(losses["loss"])
    gates = [(n, p) for n, p in model.named_parameters() if "triplet_attention" in n]
    moved = [n for n, p in gates if p.grad.abs().sum() > 0]
    # With a warm start alpha is 0 at first, and lets no gradient through to the gates yet. So does
    # the scale of a spatial gate that begins with 0.
    last = "alpha" if "warm" in name else "bn.weight"
    assert gates and [n for n in moved if n.endswith(last)] == [
        n for n, _ in gates if n.endswith(last)
    ]
    with torch.no_grad():
        (found,) = model.eval()(torch.randn(1, 3, 32, 32), samples([3]), mode="predict")
    assert found.pred_score.shape == (1000,)


def test_backbone_norms_train_and_authors_initial_values_are_kept():
    model = MODELS.build(config("resnet18-triplet_8xb32_in1k").model)
    model.init_weights()
    model.train()
    assert all(m.training for m in model.modules())
    block = model.backbone.layer1[0]
    assert (block.bn2.weight == 1).all()
    assert (block.triplet_attention.hw.conv.bn.weight == 0).all()


def test_warm_started_classifier_starts_as_the_plain_one():
    cfg = config("resnet18-triplet_warm-start_8xb32-10e_in1k")
    warm = MODELS.build(cfg.model)
    plain = MODELS.build(load_config("mmpretrain::resnet/resnet18_8xb32_in1k.py").model)
    for buffer in plain.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    missing = warm.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("triplet_attention" in name for name in missing)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(warm.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("kind", sorted({k.__name__ for k in registered_block_plugins().values()}))
def test_every_registered_block_plugin_goes_into_a_classifier(kind):
    cfg = config("resnet18-triplet_8xb32_in1k")
    layer = {"type": kind, "warm_start": True}
    cfg.model.backbone.plugins = [{"cfg": layer, "position": "after_conv2"}]
    model = MODELS.build(cfg.model).train()
    step(model, torch.randn(2, 3, 64, 64), [3, 5])
    alphas = [p for n, p in model.named_parameters() if n.endswith("alpha")]
    assert len(alphas) in (4, 8) and all(p.grad is not None for p in alphas)


def test_dropout_of_a_head_must_be_a_rate():
    cfg = config("mobilenet-v2-triplet_8xb12-400e_in1k").model.head
    head = MODELS.build(cfg)
    feats = (torch.ones(4, 1280),)
    assert not torch.equal(head.train().pre_logits(feats), feats[0])
    assert torch.equal(head.eval().pre_logits(feats), feats[0])
    with pytest.raises(ArgumentError, match="dropout must be in"):
        MODELS.build({**cfg, "dropout": 1.0})
