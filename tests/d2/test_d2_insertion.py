"""Inserting modules into blocks, and a LazyConfig's backbone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
)

from d2_plugins.backbones import build_resnet_with_plugins
from d2_plugins.block_plugins import insert_after_residual_branch, insert_plugins
from plugin_core import TripletAttention

# ---------------------------------------------------------------------------------------- insertion


class Times(nn.Module):
    def __init__(self, factor: float, plus: float) -> None:
        super().__init__()
        self.factor, self.plus = factor, plus

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.plus


def test_two_modules_are_applied_in_the_order_of_their_insertion():
    block = BottleneckBlock(8, 8, bottleneck_channels=4, norm="BN").eval()
    x = torch.randn(2, 8, 5, 5)
    branch = block.conv3(F.relu(block.conv2(F.relu(block.conv1(x)))))
    insert_after_residual_branch(block, "first", Times(2, 1))
    insert_after_residual_branch(block, "second", Times(3, 0))
    torch.testing.assert_close(block(x.clone()), F.relu((branch * 2 + 1) * 3 + x))
    assert [n for n, _ in block.named_children()][-2:] == ["first", "second"]


def test_replaced_child_takes_effect():
    block = BasicBlock(4, 4, norm="BN").eval()
    x = torch.randn(2, 4, 5, 5)
    expected = block(x.clone())
    insert_after_residual_branch(block, "scale", Times(2, 1))
    block.scale = nn.Identity()
    assert torch.equal(block(x.clone()), expected)


def test_module_is_registered_once_and_the_block_keeps_its_class():
    block = BasicBlock(4, 4, norm="BN")
    names = set(block.state_dict())
    insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    assert type(block) is BasicBlock
    added = set(block.state_dict()) - names
    assert added == {f"triplet_attention.{n}" for n in TripletAttention().state_dict()}


@pytest.mark.parametrize("name", ["conv1", "shortcut", "forward", "stride"])
def test_insertion_under_a_taken_name_is_refused(name):
    block = BasicBlock(4, 4, norm="BN")
    with pytest.raises(ValueError, match=f"block already has a '{name}'"):
        insert_after_residual_branch(block, name, nn.Identity())


def test_second_insertion_of_one_name_is_refused():
    block = BasicBlock(4, 4, norm="BN")
    insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    with pytest.raises(ValueError, match="block already has a 'triplet_attention'"):
        insert_after_residual_branch(block, "triplet_attention", TripletAttention())


def test_every_block_of_a_stage_gets_an_attention_of_its_own(caplog):
    blocks = [BasicBlock(4, 4, norm="BN") for _ in range(3)]
    with caplog.at_level(logging.WARNING, logger="d2_plugins.block_plugins"):
        insert_plugins(
            iter(blocks), "res2", {"triplet_attention": {"kernel_size": 5, "no_spatial": True}}
        )
    found = [block.triplet_attention for block in blocks]
    assert len({id(attention) for attention in found}) == 3
    assert all(a.kernel_size == 5 and a.hw is None and a.alpha is None for a in found)
    assert not caplog.records


def test_stage_that_is_frozen_in_part_keeps_that_part_frozen(caplog):
    frozen, trained = BasicBlock(4, 4, norm="BN").freeze(), BasicBlock(4, 4, norm="BN")
    with caplog.at_level(logging.WARNING, logger="d2_plugins.block_plugins"):
        insert_plugins([frozen, trained], "res2", {"triplet_attention": {}})
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["res2 is frozen"]


def block_with_activation() -> BasicBlock:
    block = BasicBlock(4, 4, norm="BN")
    block.conv2.activation = F.relu
    return block


@pytest.mark.parametrize(
    "make_block", [BasicStem, lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), block_with_activation]
)
def test_insertion_into_another_kind_of_block_is_refused(make_block):
    block = make_block()
    children = list(block.state_dict())
    with pytest.raises(ValueError, match=f"expected a residual block.*{type(block).__name__}"):
        insert_after_residual_branch(block, "triplet_attention", TripletAttention())
    assert list(block.state_dict()) == children


# --------------------------------------------------------------------------------- for a LazyConfig


def lazy_resnet(freeze_at: int = 0, **attention: Any) -> ResNet:
    stages = ResNet.make_default_stages(18, norm="BN")
    return build_resnet_with_plugins(
        triplet_attention=attention or None,
        stem=BasicStem(norm="BN"),
        stages=stages,
        out_features=["res2", "res5"],
        freeze_at=freeze_at,
    )


def test_resnet_of_a_lazy_config_is_detectron2s_with_attention():
    resnet = lazy_resnet(stages=["res2", "res4"], kernel_size=3, warm_start=True)
    assert type(resnet) is ResNet and set(resnet.output_shape()) == {"res2", "res5"}
    found = {n: m for n, m in resnet.named_modules() if isinstance(m, TripletAttention)}
    expected = [f"{s}.{i}.triplet_attention" for s in ("res2", "res4") for i in (0, 1)]
    assert list(found) == expected
    assert all(m.kernel_size == 3 and m.alpha is not None for m in found.values())


@pytest.mark.parametrize("attention", [{}, {"stages": []}, {"kernel_size": 3}])
def test_resnet_of_a_lazy_config_without_stages_is_plain(attention):
    assert not any(isinstance(m, TripletAttention) for m in lazy_resnet(**attention).modules())


def test_unknown_stage_in_a_lazy_config_is_named_with_those_that_exist():
    with pytest.raises(ValueError) as error:
        lazy_resnet(stages=["res3", "res6"])
    assert str(error.value) == (
        "triplet_attention.stages: unknown stage 'res6'; this ResNet has res2, res3, res4, res5"
    )


def test_wrong_argument_in_a_lazy_config_is_named():
    with pytest.raises(TypeError, match="'kernal_size'"):
        lazy_resnet(stages=["res3"], kernal_size=3)
    with pytest.raises(ValueError, match="kernel_size must be a positive odd number.*got 4"):
        lazy_resnet(stages=["res3"], kernel_size=4)
    with pytest.raises(ValueError, match="norm must be one of BN, SyncBN, FrozenBN, got 'GN'"):
        lazy_resnet(stages=["res3"], norm="GN")


def test_frozen_stage_of_a_lazy_config_freezes_its_attention_and_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="d2_plugins.block_plugins"):
        resnet = lazy_resnet(freeze_at=2, stages=["res2", "res3"])
    assert not any(p.requires_grad for p in resnet.res2.parameters())
    assert all(p.requires_grad for p in resnet.res3.parameters())
    (record,) = caplog.records
    assert record.getMessage().startswith("res2 is frozen")
    assert "freeze_at and the plugin's stages" in record.getMessage()
