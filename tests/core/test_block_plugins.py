"""plugin_core.block_plugins: names, warm start, state dicts, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from plugin_core import BlockPlugin, build_block_plugin, register_block_plugin
from plugin_core.block_plugins import child_name, find_block_plugin


class Halving(nn.Module):
    """Halves its input, by a parameter that its state dict has."""

    def __init__(self, channels: int, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((), float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class WithAlpha(Halving):
    """Has a parameter by the name of the warm start's own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.full((), 3.0))


# ------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "child"),
    [
        ("triplet_attention", "triplet_attention"),
        ("timm:eca", "timm_eca"),
        ("my_package.blocks:MyAttention", "my_attention"),
        ("blocks:SEBlock2d", "se_block2d"),
    ],
)
def test_child_has_the_plugins_name(name, child):
    assert child_name(name) == child


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("triplet_atention", "did you mean 'triplet_attention'?"),
        ("eca", "did you mean 'timm:eca'"),
        ("timm:cbamm", "got 'timm:cbamm'; did you mean"),
        ("no_such_package.blocks:Block", "cannot be imported: No module named 'no_such_package'"),
        (f"{__name__}:Halvin", "does not exist: .*; did you mean 'Halving'?"),
        ("math:sqrt", "must be a class of nn.Module"),
        (3, "must be a text such as 'triplet_attention', got 3"),
    ],
)
def test_unknown_name_is_named_with_the_likely_one(name, said):
    if str(name).startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(ValueError, match=f"^name .*{said}"):
        find_block_plugin(name)


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="already registered as 'ida'"):
        register_block_plugin("ida")(Halving)
    with pytest.raises(ValueError, match="lower case with underscores, got 'Halving'"):
        register_block_plugin("Halving")(Halving)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("ida", {"num_querys": 3}, "num_querys is no argument; .*did you mean 'num_queries'"),
        ("ida", {"channels": 8}, "channels is given by the block; leave it out"),
        ("ida", {"num_heads": 5}, "num_heads must divide the 8 channels, got 5"),
        ("simam", {"e_lambda": 0}, "e_lambda must be positive, got 0"),
        (f"{__name__}:Halving", {"factor": "x"}, "cannot be built for 8 channels with factor='x'"),
    ],
)
def test_wrong_argument_is_named(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        build_block_plugin(name, 8, **arguments)


# -------------------------------------------------------------------------------------- warm start


def test_warm_start_adds_a_learnable_share_of_the_change():
    plugin = BlockPlugin(Halving(4), "halving", warm_start=True)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(plugin(x), x)
    plugin(x).sum().backward()
    assert plugin.alpha.grad is not None and plugin.alpha.grad != 0
    with torch.no_grad():
        plugin.alpha.fill_(0.5)
    torch.testing.assert_close(plugin(x), 0.75 * x)
    with pytest.raises(ValueError, match="warm_start must be True or False, got 1"):
        BlockPlugin(Halving(4), "halving", warm_start=1)


def test_names_in_a_state_dict_are_the_modules_own_and_alpha():
    warm = BlockPlugin(Halving(4), "halving", warm_start=True)
    block = nn.ModuleDict({"plugin": warm})
    assert set(block.state_dict()) == {"plugin.alpha", "plugin.factor"}
    block.load_state_dict({"plugin.factor": torch.ones(())})  # of a training without warm start
    assert warm.alpha == 1 and warm.module.factor == 1
    cold = BlockPlugin(Halving(4), "halving")
    with pytest.raises(RuntimeError, match="alpha: .* trained with warm_start=True"):
        cold.load_state_dict(warm.state_dict())


def test_a_part_of_a_module_is_not_the_module():
    warm = build_block_plugin("triplet_attention", 4, True, kernel_size=3)
    part = {k: t for k, t in warm.state_dict().items() if "conv.conv" not in k and k != "alpha"}
    missing = warm.load_state_dict(part, strict=False).missing_keys
    assert warm.alpha == 0 and "alpha" in missing
    other = build_block_plugin("triplet_attention", 4, kernel_size=5).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for module.cw.conv.conv.weight"):
        warm.load_state_dict(other, strict=False)
    assert warm.alpha == 0


def test_a_tensor_is_found_by_its_name_in_a_state_dict():
    warm = build_block_plugin("triplet_attention", 4, True)
    for name, tensor in warm.state_dict().items():
        *path, last = name.split(".")
        owner = warm
        for part in path:
            owner = getattr(owner, part)
        assert getattr(owner, last).shape == tensor.shape
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = warm.no_such


class InPlace(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_a_warm_start_needs_the_input_as_it_was():
    with pytest.raises(ValueError, match="'InPlace' must leave its input as it is"):
        BlockPlugin(InPlace(4), "InPlace", warm_start=True)(torch.ones(1, 4, 2, 2))
    assert BlockPlugin(InPlace(4), "InPlace")(torch.ones(1, 4, 2, 2)).max() == 2


def test_a_users_module_is_imported_with_memory(tmp_path, monkeypatch):
    text = "import torch\nfrom torch import nn\nKERNEL = torch.ones(3)\n\nclass Block(nn.Module):\n"
    text += "    def __init__(self, channels, G=2, **others):\n        super().__init__()\n"
    text += "        self.G, self.others = G, others\n    def forward(self, x):\n        return x\n"
    (tmp_path / "users_constants.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with torch.device("meta"):
        block = build_block_plugin("users_constants:Block", 4, g=3, other=1).module
    import users_constants

    assert users_constants.KERNEL.device.type == "cpu"
    assert block.G == 3 and block.others == {"other": 1}
    (tmp_path / "users_broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="'users_broken:Block' cannot be imported: ZeroDivision"):
        build_block_plugin("users_broken:Block", 4)


def test_an_empty_batch_stays_empty():
    pytest.importorskip("timm", reason="timm is not installed")
    for name in ("timm:eca", "triplet_attention", "ida", "simam"):
        assert build_block_plugin(name, 16, True)(torch.ones(0, 16, 4, 4)).shape == (0, 16, 4, 4)


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_parameter_of_the_module_may_be_called_alpha(warm_start):
    plugin = BlockPlugin(WithAlpha(4), "with_alpha", warm_start)
    other = BlockPlugin(WithAlpha(4), "with_alpha", warm_start)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.uniform_()
    other.load_state_dict(plugin.state_dict())
    for mine, theirs in zip(plugin.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_is_independent_and_names_its_tensors_alike(duplicate):
    plugin = BlockPlugin(Halving(4), "halving", warm_start=True)
    copied = duplicate(plugin)
    with torch.no_grad():
        plugin.alpha.fill_(1.0)
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(copied(x), x) and list(copied.state_dict()) == list(plugin.state_dict())


def test_module_that_changes_the_shape_is_named_with_both_shapes():
    plugin = BlockPlugin(nn.Conv2d(4, 8, 1), "my_package.blocks:Widen", warm_start=True)
    with pytest.raises(ValueError, match=r"Widen' must keep .* got \(1, 8, 2, 2\) from \(1, 4, 2"):
        plugin(torch.randn(1, 4, 2, 2))


def test_pictures_are_the_modules_own():
    assert BlockPlugin(Halving(4), "halving").maps(torch.randn(1, 4, 2, 2)) == {}
    maps = build_block_plugin("simam", 4).maps(torch.randn(2, 4, 3, 5))
    assert {tuple(map_.shape) for map_ in maps.values()} == {(2, 3, 5)}
