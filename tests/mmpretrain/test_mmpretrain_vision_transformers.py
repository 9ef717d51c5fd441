"""BatchFormerV2 in MMPretrain's vision transformers, against the authors' DeiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import mm_plugins  # noqa: F401
from plugin_core.errors import ArgumentError

WIDTH, DEPTH, HEADS, CLASSES = 16, 4, 2, 3
ARCH = {"embed_dims": WIDTH, "num_layers": DEPTH, "num_heads": HEADS, "feedforward_channels": 32}
SOFT = {"type": "CrossEntropyLoss", "use_soft": True}


def classifier(kind: str = "BatchFormerImageClassifier", **changed: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build(
        {
            "type": kind,
            "backbone": {"type": "VisionTransformer", "arch": ARCH, "img_size": 32},
            "head": {
                "type": "VisionTransformerClsHead",
                "num_classes": CLASSES,
                "in_channels": WIDTH,
                "loss": SOFT,
            },
            **changed,
        }
    )


def published_state(insertions: tuple[int, ...], shared: bool) -> dict[str, Tensor]:
    """Random weights as the authors' main.py names them: timm's blocks, BatchFormers between."""
    draw = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        state[name] = 0.3 * torch.randn(*shape, generator=draw)

    def add_linear(name: str, wide: int, out: int) -> None:
        add(f"{name}.weight", out, wide)
        add(f"{name}.bias", out)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", WIDTH)
        add(f"{name}.bias", WIDTH)

    add("cls_token", 1, 1, WIDTH)
    add("pos_embed", 1, 5, WIDTH)
    add("patch_embed.proj.weight", WIDTH, 3, 16, 16)
    add("patch_embed.proj.bias", WIDTH)
    place = 0
    for i in range(DEPTH):
        block = f"blocks.{place}"
        add_norm(f"{block}.norm1")
        add_linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        add_linear(f"{block}.attn.proj", WIDTH, WIDTH)
        add_norm(f"{block}.norm2")
        add_linear(f"{block}.mlp.fc1", WIDTH, 32)
        add_linear(f"{block}.mlp.fc2", 32, WIDTH)
        place += 1
        if i in insertions:
            layer = f"blocks.{place}.encoder_layers"
            if shared and i != insertions[0]:
                first = f"blocks.{insertions[0] + 1}.encoder_layers."
                for name in [n for n in state if n.startswith(first)]:
                    state[f"{layer}.{name.removeprefix(first)}"] = state[name]
            else:
                add(f"{layer}.self_attn.in_proj_weight", 3 * WIDTH, WIDTH)
                add(f"{layer}.self_attn.in_proj_bias", 3 * WIDTH)
                add_linear(f"{layer}.self_attn.out_proj", WIDTH, WIDTH)
                add_linear(f"{layer}.linear1", WIDTH, WIDTH)
                add_linear(f"{layer}.linear2", WIDTH, WIDTH)
                add_norm(f"{layer}.norm1")
                add_norm(f"{layer}.norm2")
            place += 1
    add_norm("norm")
    add_linear("head", WIDTH, CLASSES)
    return state


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
    return functional.layer_norm(x, (WIDTH,), scale, shift, eps)


def original_logits(state: dict[str, Tensor], images: Tensor, training: bool) -> Tensor:
    """DeiT block by block, with the paper's two streams in training."""
    patches = functional.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16
    )
    tokens = patches.flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), tokens], 1)
    x = x + state["pos_embed"]
    doubled = False
    for place in range(1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))):
        block = f"blocks.{place}"
        if f"{block}.encoder_layers.linear1.weight" in state:
            if training:
                layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, 0.0)
                prefix = f"{block}.encoder_layers."
                layer.load_state_dict(
                    {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
                )
                # Its sequence is the first axis, which is the batch.
                x = torch.cat([x[: len(images)], layer(x[-len(images) :])])
                doubled = True
            continue
        y = norm(state, f"{block}.norm1", x)
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in linear(state, f"{block}.attn.qkv", y).chunk(3, 2)
        )
        weights = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + linear(state, f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        y = functional.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x)))
        x = x + linear(state, f"{block}.mlp.fc2", y)
    assert doubled == training
    return linear(state, "head", norm(state, "norm", x)[:, 0])


def batch() -> tuple[Tensor, Tensor, list[DataSample]]:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 32, 32, generator=draw)
    scores = torch.rand(3, CLASSES, generator=draw).softmax(1)  # as mixup's
    return images, scores, [DataSample().set_gt_score(score) for score in scores]


@pytest.mark.parametrize(
    ("insertions", "share"), [((1,), False), ((0, 2), False), ((1, 2, 3), True)]
)
def test_training_and_evaluation_are_the_authors_from_their_file(
    insertions: tuple[int, ...], share: bool
) -> None:
    model = classifier(batchformer={"insert_after": insertions, "share": share, "dropout": 0.0})
    state = published_state(insertions, share)
    model.load_state_dict(dict(state))  # strictly
    images, scores, samples = batch()
    torch.testing.assert_close(model.eval()(images), original_logits(state, images, False))
    images.requires_grad_()
    loss = model.train().loss(images, samples)["loss"]
    logits = original_logits(state, images, True)
    assert len(logits) == 2 * len(images)
    expected = functional.cross_entropy(logits, torch.cat([scores, scores]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, images), torch.autograd.grad(expected, images)
    )


def test_the_authors_mixed_precision_wraps_blocks_which_is_read_too() -> None:
    state = published_state((1,), False)
    wrapped = {
        ".".join([*name.split(".")[:2], "block", *name.split(".")[2:]])
        if name.startswith("blocks.") and "encoder_layers" not in name
        else name: tensor
        for name, tensor in state.items()
    }
    model = classifier(batchformer={"insert_after": (1,)}).eval()
    model.load_state_dict(wrapped)
    images = batch()[0]
    torch.testing.assert_close(model(images), original_logits(state, images, False))


def test_evaluation_is_the_plain_classifier_and_weights_load_both_ways() -> None:
    model = classifier(batchformer={"insert_after": (1,)}).eval()
    plain = classifier("ImageClassifier").eval()
    keys = plain.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(name.startswith("backbone.batchformer.1.") for name in keys.unexpected_keys)
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    images, _, samples = batch()
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model.loss(images, samples)["loss"], plain.loss(images, samples)["loss"])


def test_layers_before_the_insertion_run_once_for_each_image() -> None:
    model = classifier(batchformer={"insert_after": (1,)}).train()
    seen = []
    for layer in model.backbone.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(len(output)))
    images, _, samples = batch()
    model.loss(images, samples)["loss"].backward()
    assert seen == [3, 3, 6, 6]
    assert all(p.grad is not None for p in model.batchformers.parameters())


@pytest.mark.parametrize("kind", ["DeiT3", "ViTEVA02", "BEiTViT", "DistilledVisionTransformer"])
def test_the_backbones_that_are_taken_train(kind: str) -> None:
    head = {"type": "LinearClsHead", "num_classes": CLASSES, "in_channels": WIDTH, "loss": SOFT}
    if kind == "DistilledVisionTransformer":
        head["type"] = "DeiTClsHead"
    backbone = {"type": kind, "arch": ARCH, "img_size": 32}
    model = classifier(batchformer={"insert_after": (1,)}, backbone=backbone, head=head).train()
    images, _, samples = batch()
    model.loss(images, samples)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.batchformers.parameters())


def test_batch_inference_lets_images_see_each_other() -> None:
    model = classifier(batchformer={"insert_after": (1,), "eval": True}).eval()
    torch.nn.init.normal_(model.head.layers.head.weight)
    images = batch()[0]
    together = torch.stack([sample.pred_score for sample in model.predict(images)])
    alone = torch.stack([model.predict(image[None])[0].pred_score for image in images])
    assert together.shape == alone.shape
    assert not torch.allclose(together, alone)


def test_the_batchformer_keeps_pytorchs_initial_weights() -> None:
    init = [{"type": "Constant", "layer": "Linear", "val": 7.0}]
    model = classifier(batchformer={"insert_after": (1,)}, init_cfg=init)
    model.init_weights()
    weights = model.batchformers["1"].layers[0].linear1.weight
    assert weights.abs().max() < 1
    assert not model.batchformers["1"].layers[0].self_attn.out_proj.bias.any()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batchformer": {"insert_after": (4,)}}, r"batchformer.insert_after names layer 4"),
        ({"batchformer": {"mask_padding": True}}, "batchformer"),
        *(
            (
                {"batchformer": {}, "backbone": backbone},
                f"batchformer must be left out, or the backbone be .*, got {backbone['type']}",
            )
            for backbone in (
                {"type": "ResNet", "depth": 18},
                {"type": "RevVisionTransformer", "arch": ARCH},
                {"type": "ViTSAM", "arch": {**ARCH, "global_attn_indexes": [1]}},
            )
        ),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        classifier(**changed)
