"""Inserting modules into blocks, and a LazyConfig's backbone."""

from __future__ import annotations

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
from omegaconf import OmegaConf

from d2_plugins.backbones import build_resnet_with_plugins
from d2_plugins.block_plugins import (
    PluginSettings,
    insert_after_residual_branch,
    insert_plugins,
    read_plugins,
)
from plugin_core import BlockPlugin, TripletAttention

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


def settings(**arguments: Any) -> list[PluginSettings]:
    entry = {"NAME": "triplet_attention", "STAGES": ["res2"], **arguments}
    return read_plugins([entry], "MODEL.RESNETS.PLUGINS", ["res2", "res3"])


def test_every_block_of_a_stage_gets_a_module_of_its_own(caplog):
    blocks = [BasicBlock(4, 4, norm="BN") for _ in range(3)]
    insert_plugins(iter(blocks), "res3", settings())
    assert not any(
        isinstance(module, BlockPlugin) for block in blocks for module in block.modules()
    )
    insert_plugins(iter(blocks), "res2", settings(KERNEL_SIZE=5, NO_SPATIAL=True))
    found = [block.triplet_attention for block in blocks]
    assert len({id(plugin.module) for plugin in found}) == 3
    assert all(p.module.kernel_size == 5 and p.module.hw is None and p.alpha is None for p in found)
    assert not caplog.records


def test_stage_that_is_frozen_in_part_keeps_that_part_frozen(caplog):
    frozen, trained = BasicBlock(4, 4, norm="BN").freeze(), BasicBlock(4, 4, norm="BN")
    insert_plugins([frozen, trained], "res2", settings())
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


@pytest.mark.parametrize(
    ("plugin", "blocks"),
    [
        ({}, [0, 1, 2]),
        ({"BLOCKS": "last"}, [2]),
        ({"NAME": "ida", "NUM_HEADS": 2}, [2]),
        ({"NAME": "ida", "NUM_HEADS": 2, "BLOCKS": "all"}, [0, 1, 2]),
    ],
)
def test_plugin_is_in_all_blocks_of_a_stage_or_in_the_last(plugin, blocks):
    stage = [BasicBlock(4, 4, norm="BN") for _ in range(3)]
    insert_plugins(stage, "res2", settings(**plugin))
    has = [any(isinstance(m, BlockPlugin) for m in block.modules()) for block in stage]
    assert [i for i in range(3) if has[i]] == blocks


# --------------------------------------------------------------------------------- for a LazyConfig


def lazy_resnet(*plugins: dict[str, Any], freeze_at: int = 0) -> ResNet:
    with torch.device("meta"):
        return build_resnet_with_plugins(
            plugins=OmegaConf.create(list(plugins)),
            stem=BasicStem(norm="BN"),
            stages=ResNet.make_default_stages(18, norm="BN"),
            out_features=["res2", "res5"],
            freeze_at=freeze_at,
        )


TRIPLET = {"name": "triplet_attention", "stages": ["res2", "res4"]}
IDA = {"name": "ida", "stages": ["res4"], "warm_start": True, "num_queries": 5}


def test_resnet_of_a_lazy_config_is_detectron2s_with_plugins_in_their_order():
    resnet = lazy_resnet(IDA, {**TRIPLET, "kernel_size": 3})
    assert type(resnet) is ResNet and set(resnet.output_shape()) == {"res2", "res5"}
    found = {n: m for n, m in resnet.named_modules() if isinstance(m, BlockPlugin)}
    assert list(found) == [
        *(f"res2.{i}.triplet_attention" for i in (0, 1)),
        "res4.0.triplet_attention",
        *(f"res4.1.{name}" for name in ("ida", "triplet_attention")),
    ]
    plugin = resnet.res4[0].triplet_attention
    assert plugin.module.kernel_size == 3 and plugin.alpha is None
    plugin = resnet.res4[1].ida
    assert plugin.module.num_classes == 5 and plugin.alpha is not None


@pytest.mark.parametrize("plugins", [(), ({**TRIPLET, "stages": []},)])
def test_resnet_of_a_lazy_config_without_stages_is_plain(plugins):
    assert not any(isinstance(m, BlockPlugin) for m in lazy_resnet(*plugins).modules())


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"stages": ["res3", "res6"]}, "stages: unknown stage 'res6'; there are res2, res3, res4"),
        ({"stages": "res5"}, "stages: must be a list such as ['res4', 'res5'], got 'res5'"),
        ({"blocks": 2}, "blocks: must be 'all' or 'last', got 2"),
        ({"kernal_size": 3}, "kernal_size: is no argument; there are kernel_size"),
        ({"kernel_size": 4}, "kernel_size: must be a positive odd number (3 or 7 in"),
        ({"norm": "GN"}, "norm: must be 'BN', 'SyncBN' or 'FrozenBN', got 'GN'"),
    ],
)
def test_wrong_setting_in_a_lazy_config_is_named_as_it_is_spelled_there(plugin, said):
    with pytest.raises(ValueError) as error:
        lazy_resnet(IDA, {**TRIPLET, **plugin})
    assert str(error.value).startswith(f"model.backbone.bottom_up.plugins[1].{said}")


def test_frozen_stage_of_a_lazy_config_freezes_its_plugins_and_warns(caplog):
    resnet = lazy_resnet({**TRIPLET, "stages": ["res2", "res3"]}, freeze_at=2)
    assert not any(p.requires_grad for p in resnet.res2.parameters())
    assert all(p.requires_grad for p in resnet.res3.parameters())
    (record,) = caplog.records
    assert record.getMessage().startswith("res2 is frozen")
    assert "(in a LazyConfig: freeze_at)" in record.getMessage()
