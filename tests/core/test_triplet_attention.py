"""Triplet attention: the published function, and all that a framework does to a layer."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plugin_core import BlockPlugin, TripletAttention, build_block_plugin
from plugin_core.kernels import triplet

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
BOTH_VARIANTS = pytest.mark.parametrize("no_spatial", [False, True], ids=["spatial", "no_spatial"])
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


@pytest.fixture(autouse=True, params=["formula", "plain", "fast"])
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula as TorchScript has it, and our operators by PyTorch's and by compiled C."""
    if request.param == "formula":
        monkeypatch.setattr(triplet, "is_offered", lambda: False)
    else:
        monkeypatch.setenv("PLUGIN_KERNELS", request.param)


def golden(no_spatial: bool) -> dict[str, Tensor]:
    name = "triplet_attention_no_spatial.npz" if no_spatial else "triplet_attention.npz"
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def section(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def golden_module(no_spatial: bool) -> tuple[TripletAttention, dict[str, Tensor]]:
    arrays = golden(no_spatial)
    module = TripletAttention(no_spatial=no_spatial)
    module.load_state_dict(section(arrays, "state/"), strict=True)
    return module, arrays


def warm(**kwargs: Any) -> BlockPlugin:
    """The module with a warm start."""
    return build_block_plugin("triplet_attention", 1, True, **kwargs)


def trained(warm_start: bool = False, **kwargs: Any) -> nn.Module:
    """A module whose every parameter and buffer differs from its initial value."""
    module: nn.Module = warm(**kwargs) if warm_start else TripletAttention(**kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() <= 1 else parameter.normal_(std=0.3)
        for name, buffer in module.named_buffers():
            if not name.endswith("num_batches_tracked"):
                buffer.uniform_(0.5, 1.5)
    return module


def in_second_spelling(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Rename our keys to those of the published detectors."""
    gates = {"cw": "ChannelGateH", "hc": "ChannelGateW", "hw": "SpatialGate"}
    renamed = {}
    for key, value in state.items():
        gate, conv, rest = key.removeprefix(prefix).split(".", 2)
        assert conv == "conv"
        renamed[f"{prefix}{gates[gate]}.spatial.{rest}"] = value
    return renamed


# -------------------------------------------------------------------- parity with the authors' code


@BOTH_VARIANTS
def test_evaluation_equals_authors_output(no_spatial):
    module, arrays = golden_module(no_spatial)
    y = module.eval()(arrays["x"])
    torch.testing.assert_close(y, arrays["y_eval"], **TOLERANCE)


@BOTH_VARIANTS
def test_training_equals_authors_output(no_spatial):
    module, arrays = golden_module(no_spatial)
    torch.testing.assert_close(module.train()(arrays["x"]), arrays["y_train"], **TOLERANCE)


@BOTH_VARIANTS
def test_gradients_of_input_and_every_parameter_equal_authors(no_spatial):
    module, arrays = golden_module(no_spatial)
    x = arrays["x"].requires_grad_()
    (module.train()(x) * arrays["r"]).sum().backward()
    torch.testing.assert_close(x.grad, arrays["grad_x"], **TOLERANCE)
    expected = section(arrays, "grad/")
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], **TOLERANCE, msg=name)


@BOTH_VARIANTS
def test_batch_norm_buffers_after_one_training_step_equal_authors(no_spatial):
    module, arrays = golden_module(no_spatial)
    module.train()(arrays["x"])
    buffers = dict(module.named_buffers())
    expected = section(arrays, "after/")
    assert buffers.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(buffers[name], value, **TOLERANCE, msg=name)


@BOTH_VARIANTS
def test_evaluation_leaves_batch_norm_buffers_alone(no_spatial):
    module, arrays = golden_module(no_spatial)
    before = {name: b.clone() for name, b in module.named_buffers()}
    module.eval()(arrays["x"])
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


# ------------------------------------------------------------------------------- worked out by hand


def hand_made(no_spatial: bool) -> TripletAttention:
    """1×1 kernels: cw takes maximum - mean, hc mean / 2, hw 2·maximum, and no normalization."""
    module = TripletAttention(kernel_size=1, no_spatial=no_spatial, init="kaiming").eval()
    weights = {"cw": (1.0, -1.0), "hc": (0.0, 0.5), "hw": (2.0, 0.0)}
    for name, (maximum, mean) in weights.items():
        gate = getattr(module, name)
        if gate is None:
            continue
        with torch.no_grad():
            gate.conv.conv.weight.copy_(torch.tensor([maximum, mean]).view(1, 2, 1, 1))
            gate.conv.bn.running_var.fill_(1 - gate.conv.bn.eps)
    return module


def test_output_worked_out_by_hand():
    # One image, two channels of 2×2:   a = 1 -2    b = 3  5
    #                                       4  0       -1  2
    x = torch.tensor([[[[1.0, -2.0], [4.0, 0.0]], [[3.0, 5.0], [-1.0, 2.0]]]])

    def s(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    # cw: maximum - mean over the rows, for each channel and column
    cw = [[s(4 - 2.5), s(0 + 1)], [s(3 - 1), s(5 - 3.5)]]
    # hc: half the mean over the columns, for each channel and row
    hc = [[s(-0.5 / 2), s(2 / 2)], [s(4 / 2), s(0.5 / 2)]]
    # hw: twice the maximum over the channels, for each row and column
    hw = [[s(2 * 3), s(2 * 5)], [s(2 * 4), s(2 * 2)]]

    for no_spatial in (False, True):
        y = hand_made(no_spatial)(x)
        for c in range(2):
            for h in range(2):
                for w in range(2):
                    if no_spatial:
                        gate = (cw[c][w] + hc[c][h]) / 2
                    else:
                        gate = (cw[c][w] + hc[c][h] + hw[h][w]) / 3
                    assert y[0, c, h, w].item() == pytest.approx(
                        x[0, c, h, w].item() * gate, abs=1e-6
                    )


def test_one_of_equal_maxima_takes_the_whole_gradient():
    module = hand_made(no_spatial=True)
    x = torch.ones(1, 1, 2, 1, requires_grad=True)
    module(x).sum().backward()
    # cw: s(maximum - mean) with maximum = mean, so its slope is 1/4. y = x·(cw + hc)/2, and hc and
    # the mean treat the rows alike, so the rows' gradients differ by 2·(1/4)/2 only by the maximum.
    first, second = x.grad.flatten().tolist()
    assert abs(first - second) == pytest.approx(0.25, abs=1e-6)


def test_images_of_a_batch_do_not_mix_in_evaluation():
    module = trained().eval()
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))


@pytest.mark.parametrize("init", ["kaiming_zero_spatial", "kaiming", "pytorch"])
def test_fresh_gates_halve_the_input_roughly(init):
    x = torch.rand(4, 8, 6, 6) + 1
    ratio = TripletAttention(init=init).train()(x) / x
    assert 0.4 < ratio.mean() < 0.6


def fresh_weights(**kwargs: Any) -> Tensor:
    """The convolutions' weights of 40 modules."""
    modules = [TripletAttention(**kwargs) for _ in range(40)]
    weights = [p for m in modules for p in m.parameters() if p.dim() == 4]
    return torch.cat([weight.detach().flatten() for weight in weights])


@pytest.mark.parametrize("init", ["kaiming_zero_spatial", "kaiming"])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_published_weights_are_normal_with_the_variance_of_kaimings_fan_out(init, kernel_size):
    weights = fresh_weights(init=init, kernel_size=kernel_size)
    std = math.sqrt(2) / kernel_size  # one output channel: fan-out is kernel_size**2
    assert weights.std() == pytest.approx(std, rel=0.08)
    # Beyond 2 standard deviations is 4.6% of a normal distribution, and nothing of a uniform one.
    assert (weights.abs() > 2 * std).float().mean() == pytest.approx(0.0455, abs=0.015)


def test_pytorchs_weights_are_uniform_and_what_its_convolutions_draw():
    torch.manual_seed(3)
    module, rest = TripletAttention(init="pytorch"), torch.rand(3)
    torch.manual_seed(3)
    convs = [nn.Conv2d(2, 1, 7, bias=False) for _ in range(3)]
    for gate, conv in zip((module.cw, module.hc, module.hw), convs, strict=True):
        assert torch.equal(gate.conv.conv.weight, conv.weight)
    assert torch.equal(rest, torch.rand(3))  # no further random number was drawn
    bound = 1 / math.sqrt(2 * 7**2)
    assert 0.98 * bound < fresh_weights(init="pytorch").abs().max() <= bound


@pytest.mark.parametrize(
    ("arguments", "spatial_scale"),
    [
        ({}, 0.0),
        ({"init": "kaiming_zero_spatial", "norm": "SyncBN"}, 0.0),
        ({"norm": "FrozenBN"}, 1.0),  # which would stay 0
        ({"init": "kaiming"}, 1.0),
        ({"init": "pytorch"}, 1.0),
    ],
)
def test_scale_of_the_spatial_gates_norm_alone_starts_as_0(arguments, spatial_scale):
    module = TripletAttention(**arguments)
    scales = {n: p.item() for n, p in module.named_parameters() if n.endswith("bn.weight")}
    assert scales == {
        "cw.conv.bn.weight": 1.0,
        "hc.conv.bn.weight": 1.0,
        "hw.conv.bn.weight": spatial_scale,
    }
    assert not any(p.any() for n, p in module.named_parameters() if n.endswith("bias"))
    is_half = bool((module.eval().gates(torch.randn(2, 4, 5, 6))[2] == 0.5).all())
    assert is_half == (spatial_scale == 0)


def test_spatial_gate_that_starts_as_a_half_learns():
    module = TripletAttention(kernel_size=3).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    start = module.hw.conv.conv.weight.detach().clone()
    for _ in range(2):  # the scale first, and through it the convolution
        optimizer.zero_grad()
        module(torch.randn(2, 4, 5, 6)).square().mean().backward()
        optimizer.step()
    assert module.hw.conv.bn.weight.item() != 0
    assert not torch.equal(module.hw.conv.conv.weight, start)


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@BOTH_VARIANTS
def test_parameter_count_does_not_depend_on_channels(kernel_size, no_spatial):
    module = TripletAttention(kernel_size=kernel_size, no_spatial=no_spatial)
    gates = 2 if no_spatial else 3
    assert sum(p.numel() for p in module.parameters()) == gates * (2 * kernel_size**2 + 2)
    assert module(torch.randn(1, 5, 4, 3)).shape == (1, 5, 4, 3)


# --------------------------------------------------------------------------------------- state dict


def torch_load(module: nn.Module, state: dict[str, Tensor]) -> None:
    module.load_state_dict(state, strict=True)


def mmengine_load(module: nn.Module, state: dict[str, Tensor]) -> None:
    checkpoint = pytest.importorskip("mmengine.runner.checkpoint", reason="needs mmengine")
    checkpoint.load_state_dict(module, state, strict=True)


LOADERS = pytest.mark.parametrize("load", [torch_load, mmengine_load], ids=["torch", "mmengine"])
SPELLINGS = pytest.mark.parametrize("spelling", ["first", "second"])


@LOADERS
@SPELLINGS
@BOTH_VARIANTS
def test_either_published_spelling_loads_strictly(load, spelling, no_spatial):
    source = trained(no_spatial=no_spatial).eval()
    state = source.state_dict()
    if spelling == "second":
        state = in_second_spelling(state)
    target = TripletAttention(no_spatial=no_spatial).eval()
    load(target, state)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(target(x), source(x))


@LOADERS
@SPELLINGS
def test_either_published_spelling_loads_inside_a_parent_module(load, spelling):
    def parent() -> nn.Module:
        inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 1), attention=TripletAttention()))
        return nn.Sequential(OrderedDict(stage=inner, attention=TripletAttention(kernel_size=3)))

    source, target = parent().eval(), parent().eval()
    source.stage.attention, source.attention = trained().eval(), trained(kernel_size=3).eval()
    state = source.state_dict()
    if spelling == "second":
        renamed = {}
        for key, value in state.items():
            prefix, attention, _ = key.rpartition("attention.")
            if attention:
                renamed.update(in_second_spelling({key: value}, prefix + attention))
            else:
                renamed[key] = value
        state = renamed
    load(target, state)
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(target(x), source(x))


def test_saved_names_are_the_first_published_spelling():
    names = {
        f"{gate}.conv.{rest}"
        for gate in ("cw", "hc", "hw")
        for rest in (
            "conv.weight",
            "bn.weight",
            "bn.bias",
            "bn.running_mean",
            "bn.running_var",
            "bn.num_batches_tracked",
        )
    }
    module = TripletAttention()
    module.load_state_dict(in_second_spelling(trained().state_dict()))
    assert set(module.state_dict()) == names
    without_hw = {n for n in names if not n.startswith("hw.")}
    assert set(TripletAttention(no_spatial=True).state_dict()) == without_hw


def test_loading_leaves_the_callers_dict_alone():
    state = in_second_spelling(trained().state_dict())
    names = list(state)
    warm().load_state_dict(state)
    assert list(state) == names


def test_unknown_key_is_refused_in_strict_mode():
    state = trained().state_dict() | {"cw.conv.other": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"cw\.conv\.other"):
        TripletAttention().load_state_dict(state)


def test_missing_key_is_refused_in_strict_mode():
    state = in_second_spelling(trained().state_dict())
    del state["SpatialGate.spatial.bn.bias"]
    with pytest.raises(RuntimeError, match=r"hw\.conv\.bn\.bias"):
        TripletAttention().load_state_dict(state)


# --------------------------------------------------------------------------------------- warm start


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@BOTH_VARIANTS
def test_warm_start_is_exactly_the_identity_and_learns_as_soon_as_alpha_moves(mode, no_spatial):
    module = warm(no_spatial=no_spatial).train(mode)
    x, r = torch.randn(2, 2, 4, 5, 6)
    assert torch.equal(module(x), x)
    (module(x) * r).sum().backward()
    assert module.alpha.grad != 0
    assert all((p.grad == 0).all() for n, p in module.named_parameters() if n != "alpha")
    nn.init.constant_(module.alpha, 0.1)
    module.zero_grad()
    (module(x) * r).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_warm_started_output_blends_identity_and_gates_by_alpha():
    plain, blend = trained().eval(), warm().eval()
    blend.load_state_dict(plain.state_dict())
    nn.init.constant_(blend.alpha, 0.25)
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(blend(x), 0.75 * x + 0.25 * plain(x))


@LOADERS
@SPELLINGS
@BOTH_VARIANTS
def test_checkpoint_without_alpha_is_the_published_function_when_warm(load, spelling, no_spatial):
    plain = trained(no_spatial=no_spatial).eval()
    state = plain.state_dict()
    if spelling == "second":
        state = in_second_spelling(state)
    blend = warm(no_spatial=no_spatial).eval()
    load(nn.Sequential(blend), {f"0.{k}": v for k, v in state.items()})
    assert blend.alpha.item() == 1 and blend.alpha.shape == ()
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(blend(x), plain(x))


@LOADERS
def test_warm_checkpoint_is_refused_by_a_module_without_alpha(load):
    state = warm().state_dict(prefix="layer.0.")
    cold = BlockPlugin(TripletAttention(), "triplet_attention")
    parent = nn.ModuleDict({"layer": nn.ModuleList([cold])})
    with pytest.raises(RuntimeError, match=r"layer\.0\.alpha"):
        load(parent, state)


# --------------------------------------------------------------- dtype, memory format, small shapes


@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_memory_format_is_kept(memory_format, mode, warm_start):
    module = (warm() if warm_start else TripletAttention()).train(mode)
    x = torch.randn(2, 4, 5, 6).to(memory_format=memory_format)
    y = module(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, copy.deepcopy(module)(x.contiguous()), **TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=["fp32-bf16", "fp32-fp16", "bf16-bf16", "fp16-fp16"],
)
@pytest.mark.parametrize("warm_start", [False, True], ids=["cold", "warm"])
def test_dtype_is_kept_under_autocast(dtype, autocast, warm_start):
    module = trained(warm_start=warm_start).eval()
    x = torch.randn(2, 4, 5, 6)
    expected = module(x)
    with torch.autocast("cpu", dtype=autocast):
        y = module(x.to(dtype).requires_grad_())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept_where_module_and_input_share_it(dtype):
    module = trained().eval()
    x = torch.randn(2, 4, 5, 6)
    expected = module(x)
    y = module.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@BOTH_VARIANTS
def test_empty_batch_leaves_statistics_unchanged(mode, no_spatial):
    module = trained(no_spatial=no_spatial).train(mode)
    before = {name: b.clone() for name, b in module.named_buffers()}
    x = torch.empty(0, 4, 5, 6, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.sum().backward()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, parameter * 0), name


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 6), (1, 4, 5, 1), (2, 1, 1, 1)])
@BOTH_VARIANTS
def test_maps_of_one_row_or_column_train(shape, no_spatial):
    module = TripletAttention(no_spatial=no_spatial).train()
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape and torch.isfinite(y).all()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(torch.isfinite(b).all() for b in module.buffers())


def test_gate_of_a_single_value_uses_its_running_statistics():
    module = trained()
    running_mean = module.hw.conv.bn.running_mean.clone()
    x = torch.randn(1, 4, 1, 1)
    maximum_and_mean = torch.stack((x.max(1).values, x.mean(1)), 1)
    in_training = module.train().hw(maximum_and_mean)
    assert torch.equal(in_training, module.eval().hw(maximum_and_mean))
    assert torch.equal(module.hw.conv.bn.running_mean, running_mean)


# ------------------------------------------------------------------------- what frameworks do to it


def test_compiles_without_a_graph_break_in_training():
    module = trained(warm_start=True).train()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")
    x = torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_module_takes_other_sizes():
    module = trained(warm_start=True).eval()
    traced = torch.jit.trace(module, torch.randn(2, 4, 5, 6))
    x = torch.randn(1, 8, 9, 3)
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_exported_to_onnx_gives_equal_output():
    pytest.importorskip("onnx", reason="onnx is not installed; it is in the extra `dev`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="it is in the extra `dev`")
    module = trained(warm_start=True).eval()
    x = torch.randn(2, 4, 5, 6)
    file = io.BytesIO()
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(module, (x,), file, dynamo=False, **names)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(x), **TOLERANCE)


# ------------------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize("kernel_size", [2, 4, 0, -1, -3, 3.0, True, "7", None])
def test_wrong_kernel_size_is_named(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must be a positive odd number") as error:
        TripletAttention(kernel_size=kernel_size)
    assert str(error.value).endswith(f"got {kernel_size!r}")


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 4, 5, 6, 7)])
def test_input_that_is_not_4d_is_named(shape):
    with pytest.raises(ValueError) as error:
        TripletAttention()(torch.zeros(shape))
    assert f"{len(shape)}-D" in str(error.value) and str(shape) in str(error.value)
