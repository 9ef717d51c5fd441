"""BatchFormer in MMPretrain's MoCo v2 and v3, against the authors' losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

pytest.importorskip("mmpretrain", reason="MMPretrain is not installed")

from mmengine.logging import MessageHub
from mmpretrain.registry import MODELS

import mm_plugins  # noqa: F401
from plugin_core.errors import ArgumentError

WIDTH, DIM, BATCH = 64, 6, 4
BN = {"type": "BN"}
RESNET = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "norm_cfg": BN}


def neck(channels: int, pool: bool, layers: int = 2) -> dict[str, Any]:
    sizes = {"in_channels": channels, "hid_channels": 10, "out_channels": DIM}
    more = {
        "num_layers": layers,
        "with_last_bn": False,
        "with_avg_pool": pool,
        "norm_cfg": {"type": "BN1d"},
    }
    return {"type": "NonLinearNeck", **sizes, **more}


LOSS = {"loss": {"type": "CrossEntropyLoss", "loss_weight": 1.4}, "temperature": 0.7}
HEADS = {
    "BatchFormerMoCoV3": {"type": "MoCoV3Head", "predictor": neck(DIM, False), **LOSS},
    "BatchFormerMoCo": {"type": "ContrastiveHead", **LOSS},
}
QUEUE = {"queue_len": 16, "feat_dim": DIM}


@pytest.fixture(autouse=True)
def _length() -> Iterator[None]:
    """The momentum of MoCo v3's keys depends on the length of the training."""
    MessageHub.get_current_instance().update_info("max_iters", 10)
    yield


def moco(kind: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    queue = QUEUE if kind == "BatchFormerMoCo" else {}
    model = {"backbone": RESNET, "neck": neck(WIDTH, True), "head": HEADS[kind], **queue}
    return MODELS.build({"type": kind, **model, "batchformer": {"dropout": 0.0}, **changed}).train()


def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(BATCH, 3, 32, 32, generator=draw) for _ in range(2)]


def original_encode(model: Any, backbone: nn.Module, projection: nn.Module, x: Tensor) -> Tensor:
    """The authors' encoder: a Transformer layer over the batch before the projection."""
    layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, 0.0)
    state = model.batchformer.state_dict()
    layer.load_state_dict({n.removeprefix("layers.0."): t for n, t in state.items()})
    pooled = backbone(x)[-1].mean((2, 3))
    both = torch.cat([pooled, layer(pooled.unsqueeze(1)).squeeze(1)])
    return projection((both[:, :, None, None],))[0]


def test_loss_of_v3_is_the_authors() -> None:
    model = moco("BatchFormerMoCoV3")
    theirs = copy.deepcopy(model)
    found = model.loss(images(), [])["loss"]
    queries, keys = [], []
    for x in images():
        query = original_encode(theirs, theirs.backbone, theirs.neck, x)
        queries.append(normalize(theirs.head.predictor([query])[0]))
    for x in images():  # the keys' encoder has the same weights at the start
        keys.append(normalize(original_encode(theirs, *theirs.momentum_encoder.module, x)))
    expected = torch.zeros(())
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for one in (q[:BATCH], q[BATCH:]):
            for other in (k[:BATCH], k[BATCH:]):
                expected = expected + 1.4 * cross_entropy(one @ other.T / 0.7, torch.arange(BATCH))
    torch.testing.assert_close(found, expected)


def test_loss_of_v2_is_the_authors_and_the_queue_gets_both_streams() -> None:
    model = moco("BatchFormerMoCo")
    theirs = copy.deepcopy(model)
    found = model.loss(images(), [])["loss"]
    query = normalize(original_encode(theirs, theirs.backbone, theirs.neck, images()[0]))
    key = normalize(original_encode(theirs, *theirs.encoder_k.module, images()[1])).detach()
    (q1, q2), (k1, k2) = query.chunk(2), key.chunk(2)
    positive = torch.cat([(q * k).sum(1) for q, k in ((q1, k1), (q1, k2), (q2, k1), (q2, k2))])
    negative = torch.cat([q1, q1, q2, q2]) @ theirs.queue
    logits = torch.cat([positive[:, None], negative], 1) / 0.7
    expected = 1.4 * cross_entropy(logits, torch.zeros(4 * BATCH, dtype=torch.long))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.queue[:, : 2 * BATCH].T, key)
    assert int(model.queue_ptr) == 2 * BATCH


@pytest.mark.parametrize("kind", HEADS)
def test_a_step_trains_the_batchformer_once_for_both_encoders(kind: str) -> None:
    model = moco(kind)
    model.loss(images(), [])["loss"].backward()
    assert all(p.grad is not None for p in model.batchformer.parameters())
    assert not [name for name, _ in model.named_parameters() if "batchformer" in name[11:]]
    keys = model.encoder_k if kind == "BatchFormerMoCo" else model.momentum_encoder
    assert all(p.grad is None for p in keys.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_linear_evaluation_begins_with_the_checkpoints_backbone(kind: str, tmp_path: Path) -> None:
    model = moco(kind)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "moco.pth")
    start = {"type": "Pretrained", "checkpoint": str(tmp_path / "moco.pth"), "prefix": "backbone."}
    head = {"type": "LinearClsHead", "num_classes": 3, "in_channels": WIDTH}
    classifier = MODELS.build(
        {
            "type": "ImageClassifier",
            "backbone": {**RESNET, "frozen_stages": 4, "init_cfg": start},
            "neck": {"type": "GlobalAveragePooling"},
            "head": head,
        }
    )
    classifier.init_weights()
    for own, theirs in zip(
        classifier.backbone.parameters(), model.backbone.parameters(), strict=True
    ):
        assert torch.equal(own, theirs)


def test_the_batchformer_can_keep_its_random_weights() -> None:
    model = moco("BatchFormerMoCoV3", train_batchformer=False)
    model.loss(images(), [])["loss"].backward()
    assert all(p.grad is None for p in model.batchformer.parameters())
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"batchformer": {"num_heads": 7}}, "batchformer.num_heads must divide"),
        ({"train_batchformer": "no"}, "train_batchformer must be True or False"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        moco("BatchFormerMoCoV3", **changed)
