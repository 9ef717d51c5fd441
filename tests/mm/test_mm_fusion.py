"""The attention of image and text to each other, recorded and with second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmdet", reason="MMDetection is not installed")
pytest.importorskip(
    "transformers", reason="transformers, which grounding detectors need, is absent"
)

from grounding_detectors import build, loss, samples
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention

from mm_plugins.activations import Activation, _NotingAttention
from mm_plugins.fusion import FusionAttention
from mm_plugins.scores import Scores
from plugin_core.stand_ins import acting_as


@pytest.mark.parametrize("masks", ["none", "booleans", "numbers"])
def test_noted_attention_computes_as_mmdetections(masks):
    attention = BiMultiHeadAttention(v_dim=16, l_dim=12, embed_dim=32, num_heads=4).eval()
    image, text = 4 * torch.randn(2, 10, 16), 4 * torch.randn(2, 6, 12)
    padding = torch.zeros(2, 10, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    padding[0][1, 7:], padding[1][0, 4:] = True, True
    given = {
        "none": (None, None),
        "booleans": padding,  # as Grounding DINO has them
        "numbers": (None, (~padding[1]).long()),  # as GLIP has them
    }[masks]
    expected = attention(image, text, *given)
    noted: list[Tensor] = []
    with acting_as(_NotingAttention, attention, noted=noted):
        torch.testing.assert_close(attention(image, text, *given), expected)
    assert noted[0].shape == (2, 4, 6, 10)
    torch.testing.assert_close(noted[0].sum(3), torch.ones(2, 4, 6))
    assert type(attention) is BiMultiHeadAttention and "noted" not in vars(attention)


def test_fusion_has_mmdetections_gradients_and_keeps_no_projection_of_the_image():
    attention = BiMultiHeadAttention(v_dim=16, l_dim=12, embed_dim=32, num_heads=4).eval().double()
    for bias in (p for name, p in attention.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias)
    image = torch.randn(2, 10, 16, dtype=torch.double, requires_grad=True)
    text = torch.randn(2, 3, 12, dtype=torch.double, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.long)
    given = (image, text, *attention.parameters())
    found, kept = [], []

    def keep(x: Tensor) -> Tensor:
        kept[-1].append(tuple(x.shape[-2:]))
        return x

    for kind in (BiMultiHeadAttention, FusionAttention):
        kept.append([])
        with acting_as(kind, attention):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                outputs = attention(image, text, None, mask)
                value = sum(x.tanh().sum() for x in outputs)
            first = torch.autograd.grad(value, given, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        found.append((*outputs, *first, *second))
    for other, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    projected = {(10, 8), (10, 32), (20, 32)}
    assert projected & set(kept[0]) and not projected & set(kept[1])


def test_fusion_calls_projections_that_are_not_plain_such_as_with_lora():
    torch.manual_seed(0)
    attention = BiMultiHeadAttention(8, 6, 16, 2, dropout=0.0).double()
    for name in ("v_proj", "values_v_proj", "out_v_proj"):
        projection = attention.get_submodule(name)
        low = nn.Linear(projection.in_features, 2, bias=False).double()
        added = nn.Linear(2, projection.out_features, bias=False).double()
        setattr(attention, name, WithLora(projection, nn.Sequential(low, added)))
    inputs = torch.randn(2, 5, 8).double(), torch.randn(2, 3, 6).double()
    expected = attention(*inputs)
    with acting_as(FusionAttention, attention):
        torch.testing.assert_close(attention(*inputs), expected)


class WithLora(nn.Module):
    def __init__(self, base: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def test_attention_and_its_gradient_are_those_of_the_product_rule(config):
    """What is projected is O = P V: so is ds/dP = ds/dO Vᵀ, and P the softmax of the queries."""
    detector = build(config("grounding-dino"))
    attention = detector.encoder.fusion_layers[-1].attn
    seen: dict[str, Tensor] = {}
    handles = [attention.out_l_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))]

    def project(module: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        image, text = args[:2] if args else (inputs["vision"], inputs["lang"])
        for name, x in (("v_proj", image), ("l_proj", text), ("values_v_proj", image)):
            seen[name] = getattr(attention, name)(x)

    handles.append(attention.register_forward_pre_hook(project, with_kwargs=True))
    activation, scores = Activation(detector), Scores(detector)
    with activation.record(2) as recorded, scores.record() as logits_of:
        loss(detector, samples("phrases"))
    score = torch.stack([logits[:, 1].amax() for logits in logits_of(2)]).sum()
    recorded.differentiate.create_graph = False
    heat = recorded.heatmaps(score)

    (slope,) = torch.autograd.grad(score, seen["out"], retain_graph=True)
    heads = attention.num_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (heads, -1)).transpose(1, 2)

    queries, keys = split(seen["l_proj"]), split(seen["v_proj"] * attention.scale)
    probability = (queries @ keys.transpose(2, 3)).softmax(3)
    gradient = split(slope) @ split(seen["values_v_proj"]).transpose(2, 3)
    useful = (probability * gradient.relu()).mean((1, 2))
    sizes = [(8, 8), (4, 4), (2, 2)]
    maps = [
        nn.functional.interpolate(x.view(2, 1, *size), sizes[0], mode="bilinear")
        for x, size in zip(useful.split([64, 16, 4], 1), sizes, strict=True)
    ]
    expected = torch.stack(maps).mean(0)
    low, high = expected.amin((2, 3), True), expected.amax((2, 3), True)
    torch.testing.assert_close(heat, (expected - low) / (high - low), atol=5e-3, rtol=0)
