"""Triplet attention's CUDA kernels: interpreted on a CPU, compiled without a GPU, run on one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from plugin_core import TripletAttention
from plugin_core.kernels import triplet, triplet_choice, triplet_cuda, triplet_operators
from plugin_core.kernels.triplet_cuda import CudaPasses
from plugin_core.kernels.triplet_torch import AXES

TESTS = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
GOLDEN = ("triplet_attention", "triplet_attention_no_spatial")
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU")


def trained(**kwargs: Any) -> TripletAttention:
    """A module whose every parameter and buffer differs from its initial value."""
    module = TripletAttention(**kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() <= 1 else parameter.normal_(std=0.3)
        for name, buffer in module.named_buffers():
            if not name.endswith("num_batches_tracked"):
                buffer.uniform_(0.5, 1.5)
    return module


# ----------------------------------------------------------- what the passes and the module compute


def check_pool(passes: CudaPasses, x: Tensor) -> None:
    maps, indices = passes.pool(x, indices=True)
    without, none = passes.pool(x, indices=False)
    assert none == []
    wide = x.double() if x.dtype == torch.float64 else x.float()
    for m, at, same, axis in zip(maps, indices, without, AXES, strict=True):
        maximum = wide.max(axis)
        assert torch.equal(m[:, 0], maximum.values), axis
        assert at.dtype == torch.int32 and torch.equal(at.long(), maximum.indices), axis
        torch.testing.assert_close(m[:, 1], wide.mean(axis))
        assert torch.equal(m, same), axis


def check_scale_and_product(passes: CudaPasses, x: Tensor) -> None:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    gates = [torch.rand_like(wide.sum(axis)) for axis in AXES]
    gate = sum(m.unsqueeze(axis) for m, axis in zip(gates, AXES, strict=True))
    scaled = torch.empty_like(x)
    passes.scale(x, gates, scaled)
    torch.testing.assert_close(scaled, (wide * gate).to(x.dtype))
    g = torch.randn_like(x)
    expected = [(g.double() * wide.double()).sum(axis).to(wide.dtype) for axis in AXES]
    torch.testing.assert_close(passes.product(g, x), expected, atol=1e-4, rtol=1e-5)


def check_input_gradient(passes: CudaPasses, x: Tensor) -> None:
    wide = (x.double() if x.dtype == torch.float64 else x.float()).requires_grad_()
    gates = [torch.rand_like(wide.sum(axis)) for axis in AXES]
    gate = sum(m.unsqueeze(axis) for m, axis in zip(gates, AXES, strict=True))
    maxima = [wide.max(axis) for axis in AXES]
    pooled = [
        torch.stack((m.values, wide.mean(axis)), 1) for m, axis in zip(maxima, AXES, strict=True)
    ]
    g, gradients = torch.randn_like(x), [torch.randn_like(m) for m in pooled]
    outputs, of_outputs = [wide * gate, *pooled], [g.to(wide.dtype), *gradients]
    (expected,) = torch.autograd.grad(outputs, wide, of_outputs)
    gx = passes.input_gradient(g, gates, gradients, [m.indices.int() for m in maxima])
    torch.testing.assert_close(gx, expected.to(x.dtype))


def check_not_a_number(passes: CudaPasses, device: torch.device) -> None:
    x = torch.zeros(1, 2, 3, 5, device=device)
    x[0, 1, 2, 4] = torch.nan
    x[0, 0] = -torch.inf
    x[0, 1, 0] = torch.nan
    x[0, 1, :, 2] = torch.nan
    maps, indices = passes.pool(x, indices=True)
    for m, at, axis in zip(maps, indices, AXES, strict=True):
        assert torch.equal(m[:, 1].isnan(), x.mean(axis).isnan())
        assert at.min() >= 0 and at.max() < x.shape[axis]
    assert indices[0][0, 0].tolist() == [0, 0, 0]  # of nothing but -inf the first


def outputs_and_gradients(inputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    inputs = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), [*inputs.values()])
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def check_module(
    passes: CudaPasses, x: Tensor, tolerance: float, warm_start: bool = False, **kwargs: Any
) -> None:
    """The module by the passes against the formula, both in x's precision."""
    torch.manual_seed(0)
    module = trained(**kwargs).to(x.device).train(kwargs.get("norm") != "FrozenBN")
    if x.dtype == torch.float64:
        module.double()
    x = x.detach().requires_grad_()
    inputs, alpha = {"x": x, **dict(module.named_parameters())}, None
    if warm_start:
        inputs["alpha"] = alpha = torch.full_like(module.cw.conv.bn.bias[0], 0.7).requires_grad_()
    autocast = torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype.itemsize == 2)
    with autocast:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triplet, "is_offered", lambda: False)
            expected = outputs_and_gradients(inputs, module(x, warm_start=alpha))
        with taken(passes):
            y = module(x, warm_start=alpha)
            assert y.stride() == x.stride()
            actual = outputs_and_gradients(inputs, y)
    for name, tensor in actual.items():
        largest = float(expected[name].abs().max())
        difference = float((tensor - expected[name]).abs().max())
        assert difference <= tolerance * max(largest, 0.1), f"{name}: {difference} of {largest}"


@contextmanager
def taken(passes: CudaPasses) -> Iterator[None]:
    """Let the operators use these passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triplet_operators, "backend", lambda x: passes)
        yield


def check_golden(passes: CudaPasses, name: str, device: torch.device) -> None:
    """The module by the passes against the authors' code."""
    with np.load(TESTS / "golden" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    module = TripletAttention(no_spatial=name.endswith("no_spatial"))
    prefix = "state/"
    module.load_state_dict(
        {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
    )
    module.to(device).train()
    x = arrays["x"].to(device).requires_grad_()
    with taken(passes):
        y = module(x)
        (y * arrays["r"].to(device)).sum().backward()
    actual = {"y_train": y, "grad_x": x.grad}
    actual |= {f"grad/{key}": parameter.grad for key, parameter in module.named_parameters()}
    for key, tensor in actual.items():
        torch.testing.assert_close(tensor.cpu(), arrays[key], atol=1e-5, rtol=0.0, msg=key)


# ---------------------------------------------------------------------------- interpreted, on a CPU

# Blocks are of 32 rows, and of 32 or 64 columns or 1024 positions; parts have 8 planes or more.
SHAPES = {
    "ragged_blocks": (1, 2, 35, 67),
    "two_parts": (1, 9, 3, 4),
    "one_column": (3, 2, 5, 1),
    "one_row": (1, 3, 1, 70),
    "one_plane": (3, 1, 2, 3),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def interpreted_checks() -> dict[str, Callable[[], None]]:
    passes = CudaPasses(processors=1)
    checks: dict[str, Callable[[], None]] = {
        "not_a_number": lambda: check_not_a_number(passes, CPU),
        "self_check": lambda: check_self_check_on_the_cpu(passes),
    }
    cases = [(shape, "fp32") for shape in SHAPES]
    cases += [("two_parts", dtype) for dtype in DTYPES if dtype != "fp32"]
    for shape_name, dtype_name in cases:
        shape, dtype = SHAPES[shape_name], DTYPES[dtype_name]
        # Halves, so that there are many equal maxima.
        ties = (torch.randn(shape) * 3).round().div(2).to(dtype)
        x = torch.randn(shape).to(dtype)
        name = f"{shape_name}-{dtype_name}"
        checks[f"pool-{name}"] = lambda ties=ties: check_pool(passes, ties)
        checks[f"scale_and_product-{name}"] = lambda x=x: check_scale_and_product(passes, x)
        checks[f"input_gradient-{name}"] = lambda ties=ties: check_input_gradient(passes, ties)
    for name in GOLDEN:
        checks[name] = lambda name=name: check_golden(passes, name, CPU)
    modules = {
        "nchw": (FORMATS["nchw"], torch.float32, 1e-5, {}),
        "nhwc": (FORMATS["nhwc"], torch.float32, 1e-5, {"no_spatial": True, "warm_start": True}),
        "fp64": (FORMATS["nchw"], torch.float64, 1e-12, {"norm": "FrozenBN"}),
        "autocast": (FORMATS["nhwc"], torch.bfloat16, 0.05, {"warm_start": True}),
    }
    for name, (memory_format, dtype, tolerance, kwargs) in modules.items():
        x = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=memory_format)
        checks[f"module-{name}"] = lambda x=x, t=tolerance, k=kwargs: check_module(
            passes, x, t, **k
        )
    return checks


def check_self_check_on_the_cpu(passes: CudaPasses) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triplet_choice, "_CHECKED_SHAPE", SHAPES["two_parts"])
        assert triplet_choice.failure_of(passes, CPU, torch.float32) is None


def run_interpreted() -> None:
    """In a process of its own: print what failed in each check, as JSON."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # Triton 3.6 makes an int of an array with one axis, which NumPy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    torch.set_num_threads(1)
    torch.manual_seed(0)
    failures = {}
    for name, check in interpreted_checks().items():
        try:
            check()
            failures[name] = ""
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps(failures))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What failed in each check, or nothing."""
    path = os.pathsep.join(
        [str(TESTS.parent), str(TESTS / "core"), os.environ.get("PYTHONPATH", "")]
    )
    # Triton reads its variable when it is imported.
    variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", "import test_triplet_cuda; test_triplet_cuda.run_interpreted()"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("name", interpreted_checks())
def test_interpreted_kernels_equal_plain_pytorch(name, interpreted):
    assert interpreted[name] == ""


# -------------------------------------------------------------------------- compiled, without a GPU

KERNELS = {
    "_pool_rows": triplet_cuda._BLOCK_OF_ROWS,
    "_pool_planes": triplet_cuda._BLOCK_OF_PLANES,
    "_join": triplet_cuda._BLOCK_OF_JOINED,
    "_scale": triplet_cuda._BLOCK,
    "_product": triplet_cuda._BLOCK,
    "_input_gradient": triplet_cuda._BLOCK | triplet_cuda._FEWER_REGISTERS,
}
WITH_AND_WITHOUT_INDICES = ("_pool_rows", "_pool_planes", "_join")
SIZES = ("batch", "p", "q", "r", "planes", "parts_of_pr", "parts_of_qr")


def signature(name: str, dtype: str, indices: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of a kernel's arguments, and the constants among them."""
    types, constants = {}, {}
    for argument in getattr(triplet_cuda, name).arg_names:
        if argument in KERNELS[name]:
            types[argument], constants[argument] = "constexpr", KERNELS[name][argument]
        elif argument.endswith("_at") and not indices:
            types[argument], constants[argument] = "constexpr", None
        elif argument.endswith("_at"):
            types[argument] = "*i32"
        elif argument in SIZES:
            types[argument] = "i32"
        elif argument in ("x", "y", "g", "gx"):
            types[argument] = f"*{dtype}"
        else:
            types[argument] = "*fp64" if dtype == "fp64" else "*fp32"
    return types, constants


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [("fp32", 80), ("bf16", 80), ("fp32", 90), ("bf16", 90), ("fp16", 90), ("fp64", 90)],
)
def test_kernels_compile_and_spill_no_registers(dtype, capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, options in KERNELS.items():
        options = {k: v for k, v in options.items() if not k.isupper()}
        if dtype == "fp64":
            options.pop("maxnreg", None)
        for indices in (True, False) if name in WITH_AND_WITHOUT_INDICES else (True,):
            types, constants = signature(name, dtype, indices)
            source = ASTSource(getattr(triplet_cuda, name), types, constants)
            target = GPUTarget("cuda", capability, 32)
            cubin = triton.compile(source, target=target, options=options).asm["cubin"]
            assert len(cubin) > 0
            if not tool.is_file():
                continue
            file = tmp_path / "kernel.cubin"
            file.write_bytes(cubin)
            usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True)
            registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout)[0]
            assert stack == "0", f"{name} spills registers"
            assert int(registers) <= options.get("maxnreg", 255)


@needs_triton
def test_no_size_and_no_alignment_makes_a_kernel_compile_again():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    if not hasattr(jit, "create_function_from_signature"):
        pytest.skip("this version of Triton tells kernels apart in another way")
    backend = make_backend(GPUTarget("cuda", 90, 32))
    memory = torch.zeros(64)
    for name, options in KERNELS.items():
        kernel = getattr(triplet_cuda, name)
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        keys = set()
        for size in (1, 2, 16, 17, 64, 1000, 2**20, 2**30):
            for offset in (0, 1):
                arguments = [a for a in kernel.arg_names if a not in options]
                values = [size if a in SIZES else memory[offset:] for a in arguments]
                keys.add(repr(bind(*values, **options)[1:]))
        assert len(keys) == 1, (name, keys)


# ---------------------------------------------------------------------------- whether they are used


class KernelThatFails:
    """What a kernel is where Triton finds no C compiler for its launcher."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

        return launch


class KernelThatDoesNothing:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def features_on_a_gpu(**kwargs: Any) -> Any:
    """What ``CudaPasses.of`` looks at."""
    of_a_gpu = {
        "device": torch.device("cuda", 0),
        "dtype": torch.float32,
        "shape": torch.Size((2, 64, 50, 84)),
    }
    return SimpleNamespace(**of_a_gpu | kwargs)


@pytest.mark.parametrize("name", KERNELS)
def test_check_says_what_a_kernel_raised(name, monkeypatch):
    for kernel in KERNELS:
        monkeypatch.setattr(triplet_cuda, kernel, KernelThatDoesNothing())
    monkeypatch.setattr(triplet_cuda, name, KernelThatFails())
    reason = triplet_choice.failure_of(CudaPasses(1), CPU, torch.float32)
    assert reason == "the kernels fail on cpu (RuntimeError: Failed to find C compiler.)"


@pytest.mark.parametrize(
    "features",
    [
        {"device": CPU},
        {"dtype": torch.int32},
        {"shape": torch.Size((512, 2048, 7, 7))},
        {"shape": torch.Size((1, 1, 2**16, 2**16))},
    ],
    ids=["cpu", "integers", "tiny", "huge"],
)
def test_other_inputs_are_left_to_pytorchs_operators(features):
    assert CudaPasses.of(features_on_a_gpu(**features)) is None


def test_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(triplet_cuda, "triton", object())
    gpu = SimpleNamespace(name="Quadro", major=7, minor=5, multi_processor_count=48)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    device = torch.device("cuda", 0)
    assert isinstance(triplet_cuda._made(device, torch.float16), CudaPasses)
    reason = triplet_cuda._made(device, torch.bfloat16)
    assert isinstance(reason, str)
    assert "Quadro has the compute capability 7.5" in reason and "need 8.0" in reason
    gpu.major, gpu.minor = 6, 1
    assert "need 7.0" in str(triplet_cuda._made(device, torch.float32))


def test_package_works_without_triton(monkeypatch):
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("without_triton", triplet_cuda.__file__)
    without_triton = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without_triton)
    reason = without_triton._made(torch.device("cuda", 0), torch.float32)
    assert reason == "Triton, which compiles the kernels, is not installed"
    assert TripletAttention()(torch.zeros(1, 2, 3, 4)).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("processors", [1, 20, 108, 132])
@pytest.mark.parametrize(
    "shape", [(2, 256, 200, 336), (16, 2048, 25, 42), (1, 200, 336, 256), (1, 1, 800, 1333)]
)
def test_parts_cover_all_planes_and_occupy_the_gpu(shape, processors):
    blocks, planes, parts = CudaPasses(processors)._tiles(torch.empty(shape, device="meta"))
    assert (parts - 1) * planes < shape[1] <= parts * planes
    filled = blocks * parts / (processors * triplet_cuda._AT_ONCE)
    assert filled > 0.6 or planes <= triplet_cuda._PLANES_OF_A_PART


# ----------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaPasses]:
    """The passes, with convolutions in full precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    passes = CudaPasses.of(torch.zeros(1, 1, 32, 64, device="cuda"))
    assert passes is not None
    yield passes
    torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("dtype", triplet_cuda._DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 300, 50, 84), (1, 2, 129, 2049)])
def test_kernels_equal_plain_pytorch(shape, dtype, gpu):
    ties = (torch.randn(shape) * 3).round().div(2).to("cuda", dtype)
    check_pool(gpu, ties)
    check_input_gradient(gpu, ties)
    check_scale_and_product(gpu, torch.randn(shape).to("cuda", dtype))
    check_not_a_number(gpu, ties.device)


@needs_gpu
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_output_and_gradients_on_a_gpu(name, gpu):
    check_golden(gpu, name, torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.25), (torch.float16, 0.05)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("kwargs", [{}, {"no_spatial": True, "warm_start": True}], ids=str)
def test_module_equals_plain_formula_on_a_gpu(kwargs, dtype, tolerance, memory_format, gpu):
    x = torch.randn(2, 70, 45, 50).to("cuda", dtype).to(memory_format=memory_format)
    assert isinstance(triplet_operators.backend(x.detach()), CudaPasses)
    check_module(gpu, x, tolerance, **kwargs)


@needs_gpu
def test_same_input_gives_the_same_bits(gpu):
    x, g = torch.randn(2, 2, 70, 100, 130, device="cuda")
    pooled = [gpu.pool(x, indices=True) for _ in range(3)]
    sums = [gpu.product(g, x) for _ in range(3)]
    for (maps, at), s in zip(pooled[1:], sums[1:], strict=True):
        assert all(map(torch.equal, [*maps, *at, *s], [*pooled[0][0], *pooled[0][1], *sums[0]]))


def compiled_variants() -> int:
    """How many kernels were compiled in this process."""
    kernels = [getattr(triplet_cuda, name) for name in KERNELS]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@needs_gpu
def test_new_sizes_compile_nothing(gpu):
    if not hasattr(triplet_cuda._scale, "device_caches"):
        pytest.skip("this version of Triton keeps its kernels elsewhere")
    before = compiled_variants()
    assert before > 0
    module = trained().cuda()
    shapes = torch.randint(1, 90, (40, 4)) % torch.tensor([3, 90, 90, 90]) + 1
    for shape in [(1, 1, 1, 1), (1, 16, 16, 16), (2, 64, 32, 64), *shapes.tolist()]:
        x = torch.randn(tuple(shape), device="cuda", requires_grad=True)
        with taken(gpu):
            module(x).sum().backward()
    aligned = torch.randn(2 * 8 * 40 * 40 + 1, device="cuda")
    gpu.pool(aligned[1:].view(2, 8, 40, 40), indices=True)
    assert compiled_variants() == before


@needs_gpu
def test_graph_replays_the_kernels(gpu):
    module = trained().cuda().eval()
    x = torch.randn(1, 32, 40, 70, device="cuda")
    with torch.no_grad():
        expected = module(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected)


@needs_gpu
def test_kernel_that_fails_is_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(triplet_choice, "_CHOSEN", {})
    monkeypatch.setattr(triplet_cuda, "_product", KernelThatFails())
    module = trained().cuda()
    x = torch.randn(1, 8, 40, 70, device="cuda")
    monkeypatch.setenv("PLUGIN_KERNELS", "auto")
    with pytest.warns(UserWarning, match="PyTorch's operators are used"):
        assert not isinstance(triplet_operators.backend(x), CudaPasses)
    monkeypatch.setenv("PLUGIN_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        module(x)
