"""Every block plugin in the ResNets of both frameworks: one file over the whole registry."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from plugin_core import BlockPlugin, build_block_plugin, registered_block_plugins
from plugin_core.block_plugins import child_name

# timm's that keep the shape; "ge" and "bat" want arguments of their own
TIMM = ("se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "nl")
NAMES = [*registered_block_plugins(), *(f"timm:{name}" for name in TIMM)]
OWN = "blocks_of_a_user:MyAttention"
OWN_BLOCK = """
from torch import nn

class MyAttention(nn.Module):
    def __init__(self, channels, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x):
        return x * self.conv(x).sigmoid()

class Widening(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture(autouse=True, scope="module")
def _package_of_a_user(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("users")
    (folder / "blocks_of_a_user.py").write_text(OWN_BLOCK)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


# ---------------------------------------------------------------------------------- the frameworks


def detectron2_resnet(depth: int, plugins: Sequence[dict[str, Any]], freeze_at: int = 0) -> Any:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from d2_plugins import add_plugin_config

    cfg = get_cfg()
    add_plugin_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_plugin_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.OUT_FEATURES, resnets.NORM = depth, ["res3", "res4", "res5"], "BN"
    resnets.STEM_OUT_CHANNELS = 8
    if depth >= 50:
        resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = 16, 4
    else:
        resnets.RES2_OUT_CHANNELS = 64  # Detectron2 asks for it
    resnets.PLUGINS = [
        {
            "STAGES": [f"res{stage + 1}" for stage in plugin.get("stages", (3, 4))],
            **{key.upper(): value for key, value in plugin.items() if key != "stages"},
        }
        for plugin in plugins
    ]
    return build_backbone(cfg)


def mmdetection_resnet(depth: int, plugins: Sequence[dict[str, Any]], freeze_at: int = 0) -> Any:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    import mm_plugins  # noqa: F401

    register_all_modules(init_default_scope=True)
    position = "after_conv3" if depth >= 50 else "after_conv2"
    layers = [
        {
            "cfg": {
                "type": "BlockPlugin",
                "postfix": f"_{child_name(plugin['name'])}",
                **{k: value for k, value in plugin.items() if k not in ("stages", "blocks")},
            },
            **{k: value for k, value in plugin.items() if k == "blocks"},
            "stages": tuple(stage in plugin.get("stages", (3, 4)) for stage in (1, 2, 3, 4)),
            "position": position,
        }
        for plugin in plugins
    ]
    return MODELS.build(
        {
            "type": "PluginResNet",
            "depth": depth,
            "base_channels": 4 if depth >= 50 else 8,
            "stem_channels": 8,
            "out_indices": (1, 2, 3),
            "plugins": layers,
            "frozen_stages": freeze_at - 1,  # there the stem alone is 0, and here it is 1
            "norm_eval": False,
        }
    )


Build = Callable[..., Any]
FRAMEWORKS = [
    pytest.param(
        build,
        id=framework,
        marks=pytest.mark.skipif(find_spec(framework) is None, reason=f"{framework} is missing"),
    )
    for framework, build in (("detectron2", detectron2_resnet), ("mmdet", mmdetection_resnet))
]
BOTH = pytest.mark.parametrize("build", FRAMEWORKS)
EVERY = pytest.mark.parametrize("name", [*NAMES, OWN])


def features(net: nn.Module, x: Tensor) -> list[Tensor]:
    maps = net(x)
    return [maps[name] for name in sorted(maps)] if isinstance(maps, dict) else list(maps)


def plugins_of(net: nn.Module) -> list[BlockPlugin]:
    return [module for module in net.modules() if isinstance(module, BlockPlugin)]


def is_plugins(key: str) -> bool:
    """Whether a tensor of a backbone belongs to a plugin, by its child's name."""
    child = key.split(".")[2]
    return not child.startswith(("conv", "norm", "bn", "shortcut", "downsample"))


@pytest.fixture(autouse=True)
def _timm_is_there(request: pytest.FixtureRequest) -> None:
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", "")
    if str(name).startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")


def all_names() -> list[str]:
    return [n for n in NAMES if not n.startswith("timm:") or find_spec("timm")] + [OWN]


def randomize(net: nn.Module) -> None:
    """Give norms statistics and scales as training does."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


# ---------------------------------------------------------------------------------------- the tests


@BOTH
@pytest.mark.parametrize("depth", [18, 50])  # a ResNet of each kind of block
def test_a_pretrained_resnet_starts_as_it_was_with_every_plugin_in_it(build, depth):
    plain = build(depth, [])
    randomize(plain)
    plugins = [{"name": name, "warm_start": True} for name in all_names()]
    net = build(depth, plugins)
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert missing and all(map(is_plugins, missing)) and not unexpected
    x = torch.randn(2, 3, 64, 32)
    for mode in (True, False):
        net.train(mode), plain.train(mode)
        assert all(map(torch.equal, features(net, x), features(plain, x)))


@BOTH
@EVERY
def test_plugin_changes_the_residual_branch_and_learns(build, name):
    net = build(50, [{"name": name, "warm_start": True, "stages": (4,), "blocks": "all"}])
    plugins = plugins_of(net)
    assert len(plugins) == 3 and {plugin.plugin_name for plugin in plugins} == {name}
    x = torch.randn(2, 3, 64, 64)
    before = features(net, x)[-1].detach()
    with torch.no_grad():
        for plugin in plugins:
            for parameter in plugin.parameters():  # timm's non-local block starts as the identity
                parameter.uniform_(0.1, 0.5)
    after = features(net, x)[-1]
    assert not torch.equal(after, before)
    after.square().mean().backward()
    for plugin in plugins:
        for key, parameter in plugin.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@BOTH
def test_plugins_are_applied_in_their_order_after_the_norm_and_before_the_sum(build):
    names = ["simam", "ida"]
    net = build(18, [{"name": name, "stages": (4,)} for name in names])
    net.eval()
    randomize(net)
    stage = net.res5 if hasattr(net, "res5") else net.layer4
    block = stage[1]
    x = torch.randn(1, block.conv2.weight.shape[1], 4, 4)
    plain = build(18, [])
    plain.eval()
    plain.load_state_dict(net.state_dict(), strict=False)
    branch_of = (plain.res5 if hasattr(plain, "res5") else plain.layer4)[1]
    branch = branch_of.conv2(torch.relu(_first_half(branch_of, x)))
    branch = branch if hasattr(plain, "res5") else branch_of.norm2(branch)
    for plugin in plugins_of(block):
        branch = plugin(branch)
    assert [plugin.plugin_name for plugin in plugins_of(block)] == names
    torch.testing.assert_close(block(x.clone()), torch.relu(branch + x))


def _first_half(block: nn.Module, x: Tensor) -> Tensor:
    out = block.conv1(x)  # Detectron2's applies norm and activation itself
    return block.norm1(out) if hasattr(block, "norm1") else out


def built(build: Build, **plugin: Any) -> nn.Module:
    """A backbone with triplet attention in its 16 blocks, as a training from scratch starts it."""
    torch.manual_seed(5)
    net = build(50, [{"name": "triplet_attention", "stages": (1, 2, 3, 4), **plugin}])
    if hasattr(net, "init_weights"):  # MMDetection draws all weights again
        net.init_weights()
    return net


@BOTH
@pytest.mark.parametrize(
    ("arguments", "std", "spatial_scale"),
    [
        ({}, 2**0.5 / 7, 0),
        ({"init": "kaiming"}, 2**0.5 / 7, 1),
        ({"init": "pytorch"}, 1 / 7 / 6**0.5, 1),
        ({"warm_start": True}, 1 / 7 / 6**0.5, 1),
        ({"warm_start": True, "init": "kaiming_zero_spatial"}, 2**0.5 / 7, 0),
    ],
)
def test_gates_start_as_their_setting_says(build, arguments, std, spatial_scale):
    plugins = plugins_of(built(build, **arguments))
    gates = [gate.conv for p in plugins for gate in (p.module.cw, p.module.hc, p.module.hw)]
    assert len(gates) == 3 * 16
    weights = torch.cat([gate.conv.weight.detach().flatten() for gate in gates])
    assert weights.std().item() == pytest.approx(std, rel=0.05)
    scales = [gate.bn.weight.item() for gate in gates]
    assert scales == [1, 1, spatial_scale] * 16
    assert not any(gate.bn.bias.any() for gate in gates)


@BOTH
def test_a_seed_gives_a_warm_start_the_weights_that_pytorch_draws(build):
    warm = built(build, warm_start=True).state_dict()
    state = torch.get_rng_state()
    plain = built(build, init="pytorch").state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert {n for n in warm if not n.endswith("alpha")} == plain.keys()
    assert all(torch.equal(warm[name], tensor) for name, tensor in plain.items())


@BOTH
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), lambda net: AveragedModel(net)],
    ids=["deepcopy", "pickle", "average"],
)
def test_copies_and_averages_are_independent(build, duplicate):
    net = build(50, [{"name": name, "warm_start": True, "stages": (4,)} for name in all_names()])
    net.eval()
    twin = duplicate(net)
    x = torch.randn(1, 3, 64, 64)
    before = [map_.detach() for map_ in features(twin, x)]
    with torch.no_grad():
        for plugin in plugins_of(net):
            plugin.alpha.fill_(1.0)
    assert not torch.equal(features(net, x)[-1], before[-1])
    assert all(map(torch.equal, features(twin, x), before))
    if isinstance(twin, AveragedModel):
        twin.update_parameters(net)
        assert plugins_of(twin)[0].alpha > 0


class SideBySide(nn.Module):
    """Every plugin on the same input: an export of one takes nearly as long as of all."""

    def __init__(self, names: Sequence[str], alpha: float) -> None:
        super().__init__()
        self.names = names
        self.plugins = nn.ModuleList(build_block_plugin(name, 16, True) for name in names)
        with torch.no_grad():
            for plugin in self.plugins:
                plugin.alpha.fill_(alpha)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(plugin(x).relu() for plugin in self.plugins)

    def assert_same(self, found: Sequence[Tensor], x: Tensor) -> None:
        for name, mine, expected in zip(self.names, found, self(x), strict=True):
            torch.testing.assert_close(
                mine, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@EVERY
def test_compiles_without_a_graph_break(name):
    plugin = build_block_plugin(name, 16, True).eval()
    with torch.no_grad():
        plugin.alpha.fill_(0.5)
    assert_compiles(plugin, 16)


@BOTH
def test_stage_compiles_without_a_graph_break(build):
    names = ("triplet_attention", OWN)
    net = build(50, [{"name": name, "warm_start": True, "stages": (4,)} for name in names])
    net.eval()
    stage = net.res5 if hasattr(net, "res5") else net.layer4
    assert_compiles(
        nn.Sequential(*list(stage)[:2]), stage[0].conv1.weight.shape[1]
    )  # the third is as the second


def assert_compiles(module: nn.Module, channels: int) -> None:
    x = torch.randn(2, channels, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.clone()), module(x.clone()), rtol=1e-4, atol=1e-5)


def test_is_traced_and_exported():
    net = SideBySide(all_names(), 0.7).eval()
    x = torch.randn(2, 16, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.assert_same(torch.jit.trace(net, x)(x), x)
        exported = torch.export.export(net, (x,))
    net.assert_same(exported.module()(x), x)


def test_runs_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    names = [*registered_block_plugins(), OWN]
    names += ["timm:se", "timm:cbam"] if find_spec("timm") else []
    net = SideBySide(names, 0.7).eval()
    x = torch.randn(1, 16, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (x,), dynamo=True, verbose=False, input_names=["x"])
    content = program.model_proto.SerializeToString()
    found = onnxruntime.InferenceSession(content).run(None, {"x": x.numpy()})
    net.assert_same([torch.from_numpy(one) for one in found], x)


@EVERY
def test_mixed_precision_keeps_the_dtype_and_gives_finite_gradients(name):
    plugin = build_block_plugin(name, 16, True)
    with torch.no_grad():
        plugin.alpha.fill_(0.5)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 16, 6, 6, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = plugin(x)
        assert y.dtype == dtype and y.shape == x.shape
        y.float().square().mean().backward()
        assert x.grad.isfinite().all()


@BOTH
def test_frozen_stages_freeze_their_plugins(build, caplog):
    net = build(50, [{"name": n, "stages": (1, 2)} for n in all_names()], freeze_at=2)
    net.train()
    frozen = net.res2 if hasattr(net, "res2") else net.layer1
    trained = net.res3 if hasattr(net, "res3") else net.layer2
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    if hasattr(net, "res2"):
        assert "res2 is frozen, so its" in caplog.text and "res3 is frozen" not in caplog.text


@BOTH
def test_checkpoint_goes_there_and_back(build):
    plugins = [{"name": name, "stages": (4,)} for name in all_names()]
    warm = [{**plugin, "warm_start": True} for plugin in plugins]
    net, other = build(50, warm), build(50, warm)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.1, 0.1)
    other.load_state_dict(net.state_dict())
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert set(build(50, []).state_dict()) < set(net.state_dict())
    # Of modules that were trained without a warm start, which is alpha = 1
    without = {key: tensor for key, tensor in net.state_dict().items() if "alpha" not in key}
    build(50, plugins).load_state_dict(without)
    missing, unexpected = other.load_state_dict(without, strict=False)
    assert not unexpected
    for plugin in plugins_of(other):
        has_tensors = bool(plugin.module.state_dict())  # else nothing tells that it was there
        assert plugin.alpha == 1 if has_tensors else plugin.plugin_name == "simam"
    assert all("simam" in key for key in missing)


@EVERY
def test_recomputed_activations_give_the_same_gradients(name):
    plugin = build_block_plugin(name, 16, True).train()
    with torch.no_grad():
        plugin.alpha.fill_(0.5)
    x = torch.randn(2, 16, 6, 6)
    gradients = []
    for run in (plugin, lambda x: checkpoint(plugin, x, use_reentrant=False)):
        given = x.clone().requires_grad_()
        parameters = [p for p in plugin.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(run(given).square().sum(), [given, *parameters]))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.skipif(find_spec("mmdet") is None, reason="mmdet is missing")
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # of MMDetection's blocks
def test_with_cp_gives_the_same_gradients(depth):
    net = mmdetection_resnet(depth, [{"name": n, "warm_start": True} for n in all_names()])
    x, gradients = torch.randn(2, 3, 64, 64), []
    for with_cp in (False, True):
        for block in [*net.layer3, *net.layer4]:
            block.with_cp = with_cp
        net.zero_grad()
        net.train()
        sum(map_.mean() for map_ in features(net, x)).backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-3, atol=1e-5)


@BOTH
def test_module_that_changes_the_shape_is_named_with_both_shapes(build):
    net = build(50, [{"name": "blocks_of_a_user:Widening", "stages": (4,)}])
    with pytest.raises(ValueError, match=r"'blocks_of_a_user:Widening' must keep .*\(1, \d+, 2, 2"):
        net(torch.randn(1, 3, 64, 64))


@BOTH
@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ({"name": "triplet_atention"}, r"name.*did you mean 'triplet_attention'"),
        ({"name": "timm:cbamm"}, r"name.*did you mean"),
        ({"name": "blocks_of_a_user:MyAtention"}, r"name.*did you mean 'MyAttention'"),
        ({"name": "ida", "num_head": 2}, r"num_head.* no argument.*did you mean 'num_heads'"),
        ({"name": "ida", "num_heads": 3}, r"num_heads.* must divide the \d+ channels, got 3"),
        (
            {"name": "triplet_attention", "init": "zero"},
            r"init.* must be 'kaiming_zero_spatial', 'kaiming' or 'pytorch', got 'zero'",
        ),
        ({"name": "simam", "e_lambda": -1}, r"e_lambda.* must be positive, got -1"),
        ({"name": "ida", "warm_start": "yes"}, r"warm_start.* must be True or False, got 'yes'"),
    ],
)
def test_wrong_setting_is_named(build, plugin, said):
    with pytest.raises(ValueError, match=f"(?i){said}") as raised:
        build(50, [plugin])
    assert build is mmdetection_resnet or "MODEL.RESNETS.PLUGINS[0]." in str(raised.value)


def test_each_method_of_the_collection_is_its_own_file_and_nothing_else_names_it():
    root = Path(__file__).resolve().parents[2]
    for package in ("plugin_core", "d2_plugins", "mm_plugins", "tools"):
        for file in (root / package).rglob("*.py"):
            if file.name != "simam.py":
                assert "simam" not in file.read_text(encoding="utf-8").lower(), file
