"""plugin_core.timm_layer: block plugins as attention layers of timm's models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from plugin_core import BlockPlugin, registered_block_plugins, timm_layer
from plugin_core.checkpoints.conversion import FoundPlugin, plugins_in
from plugin_core.published_names import find_unread

timm = pytest.importorskip("timm", reason="timm is not installed")

SMALL = {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_width": 8, "num_classes": 3}
OWN = f"{__name__}:Doubling"
IDA = {"num_queries": 5, "num_heads": 4}
NAMES = [*registered_block_plugins(), "timm:se", "timm:cbam", OWN]


class Doubling(nn.Module):
    """Doubles its input by a convolution, whose weights it sets itself."""

    def __init__(self, channels: int, factor: float = 2.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        nn.init.constant_(self.conv.weight, factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def small_resnet(name: str | None = None, *, warm_start: bool = False, **settings):
    if name is not None:
        settings["block_args"] = {"attn_layer": timm_layer(name, warm_start=warm_start)}
    return timm.create_model("resnet18", **{**SMALL, **settings})


def plugins_of(model: nn.Module) -> list[BlockPlugin]:
    return [module for module in model.modules() if isinstance(module, BlockPlugin)]


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(
    ("model", "kernel_size", "parameters"),
    [
        ("resnet18", 7, 11_691_912),
        ("resnet18", 3, 11_689_992),
        ("resnet50", 7, 25_561_832),
        ("resnet50", 3, 25_557_992),
    ],
)
def test_classifiers_with_triplet_attention_have_the_papers_parameters(
    model, kernel_size, parameters
):
    layer = timm_layer("triplet_attention", kernel_size=kernel_size)
    with torch.device("meta"):
        built = timm.create_model(model, block_args={"attn_layer": layer})
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_block_plugin_trains_a_step(name, warm_start):
    torch.manual_seed(0)
    model = small_resnet(name, warm_start=warm_start, zero_init_last=False)
    assert [p.plugin_name for p in plugins_of(model)] == [name] * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # alpha is 0 in the first step, so that the module gets no gradient
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4) % 3)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    for parameter in plugins_of(model)[0].parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    grads = [p.grad.abs().max() for p in plugins_of(model)[0].parameters()]
    assert not grads or max(grads) > 0


@pytest.mark.parametrize("name", NAMES)
def test_warm_start_computes_what_the_plain_model_computes(name):
    plain, warm = small_resnet().eval(), small_resnet(name, warm_start=True).eval()
    missing, unexpected = warm.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(".se." in key for key in missing)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(warm(x), plain(x))


def test_plain_pretrained_weights_are_asked_for_as_not_strict(tmp_path):
    plain = small_resnet()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = {"file": tmp_path / "plain.pth", "num_classes": 3}
    settings = {"warm_start": True, "pretrained": True, "pretrained_cfg_overlay": overlay}
    with pytest.raises(RuntimeError, match='Missing key.* "layer1.0.se.alpha"'):
        small_resnet("triplet_attention", **settings)
    warm = small_resnet("triplet_attention", pretrained_strict=False, **settings)
    assert torch.equal(warm.layer4[0].conv2.weight, plain.layer4[0].conv2.weight)


def test_layer_goes_where_the_family_of_models_has_attention():
    layer = timm_layer("triplet_attention")
    in_blocks = {"block_args": {"attn_layer": layer}, "layers": (1, 1, 1, 1)}
    for model, settings, place in (
        ("resnext50_32x4d", in_blocks, "layer1.0.se"),
        ("seresnet18", in_blocks, "layer1.0.se"),
        ("res2net50_14w_8s", in_blocks, "layer1.0.se"),
        ("skresnet18", in_blocks, "layer1.0.se"),
        ("nf_seresnet26", {"attn_layer": layer, "attn_kwargs": {}}, "stages.0.0.attn_last"),
        ("resnet33ts", {"attn_layer": layer}, "stages.0.0.attn"),
        ("ese_vovnet19b_dw", {"attn": layer}, "stages.0.blocks.0.attn"),
        ("semnasnet_050", {"se_layer": layer}, "blocks.2.0.se"),
    ):
        with torch.device("meta"):
            built = timm.create_model(model, **settings)
        assert isinstance(built.get_submodule(place), BlockPlugin), model
    with pytest.raises(TypeError, match="given rd_ratio by timm's model; pass attn_kwargs={}"):
        timm.create_model("nf_seresnet26", attn_layer=layer)


def test_mobilenetv2_of_timm_has_no_place_for_it():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100", se_layer=timm_layer("triplet_attention"))
    assert not plugins_of(model)


def test_features_are_those_of_the_classifier():
    model = small_resnet("triplet_attention").eval()
    features = small_resnet("triplet_attention", features_only=True).eval()
    features.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(features(x)[-1], model.forward_features(x))


def test_device_and_type_are_the_models():
    model = small_resnet("ida", warm_start=True, device="meta", dtype=torch.bfloat16)
    for parameter in plugins_of(model)[0].parameters():
        assert parameter.is_meta and parameter.dtype == torch.bfloat16


def test_copies_and_moving_averages():
    from timm.utils import ModelEmaV3

    layer = timm_layer("triplet_attention", warm_start=True)
    model = small_resnet(block_args={"attn_layer": pickle.loads(pickle.dumps(layer))}).eval()
    x = torch.randn(2, 3, 64, 64)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), model(x))
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        plugins_of(model)[0].alpha.fill_(1)
    average.update(model)
    assert plugins_of(average.module)[0].alpha == 0.5


def test_scripting_is_refused_and_tracing_works():
    model = small_resnet("triplet_attention").eval()
    with pytest.raises(RuntimeError, match="torch.jit.script cannot .* 'triplet_attention'; use"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))


def test_model_registered_by_a_user_is_made_by_its_name():
    from timm.models import register_model, resnet18

    @register_model
    def resnet18_halving(pretrained=False, **kwargs):
        layer = timm_layer(OWN, factor=0.5)
        return resnet18(pretrained, block_args={"attn_layer": layer}, **kwargs)

    model = timm.create_model("resnet18_halving", **SMALL)
    assert (plugins_of(model)[0].conv.weight == 0.5).all()


# --------------------------------------------------------------------------------- initial weights


def test_modules_draw_their_weights_after_timm_has_drawn_all_convolutions():
    ida, triplet, warm = (
        plugins_of(small_resnet(name, warm_start=is_warm))[0]
        for name, is_warm in (
            ("ida", False),
            ("triplet_attention", False),
            ("triplet_attention", True),
        )
    )
    assert (ida.proj.weight == 1).all() and (ida.proj.bias == 0).all()
    assert triplet.hw.conv.bn.weight == 0 and triplet.cw.conv.bn.weight == 1
    # "pytorch", which a warm start has, is uniform
    assert warm.alpha == 0 and warm.hw.conv.conv.weight.abs().max() <= 1 / (7 * 2**0.5)


@pytest.mark.parametrize(
    ("model", "argument"), [("semnasnet_050", "se_layer"), ("resnet33ts", "attn_layer")]
)
def test_modules_of_other_families_draw_their_weights_too(model, argument):
    built = timm.create_model(model, **{argument: timm_layer(OWN)})
    assert plugins_of(built) and all((p.conv.weight == 2).all() for p in plugins_of(built))


def test_reset_parameters_draws_them_where_timm_asks_no_module_to():
    model = small_resnet(OWN, zero_init_last=False)
    assert not (plugins_of(model)[0].conv.weight == 2).all()
    for plugin in plugins_of(model):
        plugin.reset_parameters()
        assert (plugin.conv.weight == 2).all()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("triplet_atention", {}, "^name .*did you mean 'triplet_attention'?"),
        ("timm:ecaa", {}, "^name .*did you mean 'eca'"),
        (f"{__name__}:Doublin", {}, "^name .*did you mean 'Doubling'?"),
        ("ida", {"num_querys": 3}, "^num_querys is no argument; .*did you mean 'num_queries'"),
        ("timm:eca", {"kernel": 3}, "^kernel is no argument"),
        ("ida", {"channels": 8}, "^channels is given by the block; leave it out"),
        ("ida", {"num_heads": 0}, "^num_heads must be a positive integer, got 0"),
        ("triplet_attention", {"kernel_size": 4}, "^kernel_size must be a positive odd number"),
        ("triplet_attention", {"warm_start": 1}, "^warm_start must be True or False, got 1"),
    ],
)
def test_wrong_name_or_argument_is_told_before_timm_builds(name, arguments, said):
    with pytest.raises(ValueError, match=said):
        timm_layer(name, **arguments)


def test_number_of_heads_is_right_or_wrong_for_a_models_channels():
    layer = timm_layer("ida", num_heads=11)
    assert layer(22)(torch.randn(1, 22, 2, 2)).shape == (1, 22, 2, 2)
    with pytest.raises(ValueError, match="num_heads must divide the 16 channels, got 11"):
        small_resnet(block_args={"attn_layer": layer})


# -------------------------------------------------------------------------------- names in a file


@pytest.mark.parametrize(
    ("model", "name", "warm_start", "arguments"),
    [
        ("resnet18", "triplet_attention", True, {"kernel_size": 3, "no_spatial": True}),
        ("resnet50", "triplet_attention", False, {"kernel_size": 7, "no_spatial": False}),
        ("resnet18", "ida", False, IDA | {"heavy": True, "projection": "grouped"}),
        ("resnet50", "ida", True, IDA | {"heavy": False, "projection": "scale"}),
    ],
)
def test_se_of_a_timm_checkpoint_is_the_plugin_whose_tensors_it_has(
    model, name, warm_start, arguments
):
    layer = timm_layer(name, warm_start=warm_start, **arguments)
    with torch.device("meta"):
        state = timm.create_model(model, block_args={"attn_layer": layer}).state_dict()
    assert plugins_in(state) == [FoundPlugin(name, (1, 2, 3, 4), warm_start, arguments)]


@pytest.mark.parametrize("name", ["timm:se", "timm:gc", "simam", OWN])
def test_se_whose_tensors_do_not_tell_is_refused(name):
    with torch.device("meta"):
        layer = timm_layer(name, warm_start=True)
        state = timm.create_model("resnet18", block_args={"attn_layer": layer}).state_dict()
    with pytest.raises(ValueError, match="have 'se', as timm calls any attention.* by --config"):
        plugins_in(state)


def test_detector_that_would_leave_timms_attention_out_says_so():
    detector = nn.ModuleDict({"layer1": nn.Sequential(nn.ModuleDict())})
    plugin = timm_layer("triplet_attention", warm_start=True)(8)
    detector.layer1[0]["triplet_attention"] = plugin
    ours = detector.state_dict()
    theirs = {key.replace("triplet_attention", "se"): tensor for key, tensor in ours.items()}
    said = find_unread(detector, ours.keys(), theirs.keys(), theirs)
    assert "layer1.0.se of the checkpoint" in said and "tools/convert_checkpoint.py" in said
