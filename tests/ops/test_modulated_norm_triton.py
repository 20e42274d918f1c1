"""The Triton kernels of modulated_norm: on a GPU, and in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So :func:`test_kernels_run_in_the_interpreter` runs this file
once more in a process of its own, where the tests below it get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.ops import modulated_norm as op_module
from m2mkd_fast.ops.modulated_norm import modulated_norm, modulated_norm_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, latents, width, scales, one scale for all latents
SHAPES = {
    "one row": (1, 1, 7, 1, False),
    "one channel": (3, 2, 1, 2, False),
    "three scales": (5, 3, 33, 3, False),
    "power of two": (6, 2, 64, 2, False),
    "wide": (2, 2, 300, 1, False),
    "shared scale": (3, 5, 20, 2, True),
    "one latent": (9, 1, 12, 2, False),
    "no rows": (0, 3, 8, 2, False),
    "no latents": (4, 0, 8, 2, False),
}
PUBLISHED = {
    "tiny propagator": (128, 320, 384, 2, False),
    "imagenet receivers": (32, 768, 512, 1, False),
    "widest": (40, 3, 4095, 1, False),
    "most scales": (40, 3, 130, 8, False),
}
NAMES = ["outputs", "inputs", "weight", "bias", "scales"]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
in_another_process = pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")


@in_another_process
@pytest.mark.slow
def test_kernels_run_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "M2MKD_BACKEND": ""}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) >= len(SHAPES) * len(DTYPES)


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_chunks(device, monkeypatch) -> None:
    """Several chunks of the batch, and several steps of every sum, at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import modulated_norm as kernels

    monkeypatch.setattr(kernels, "_LONGEST_CHUNK", 4)
    monkeypatch.setattr(kernels, "_SUM_ROWS", 4)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)


def random_tensors(
    batch: int, latents: int, width: int, scales: int, shared: bool, dtype: torch.dtype = torch.float32, device="cpu"
) -> tuple[list[Tensor], Tensor]:
    """Inputs, weight, bias and scales; a gradient of the outputs."""
    generator = torch.Generator().manual_seed(batch + 10 * latents + 100 * width + scales)
    shapes = [(batch, latents, width), (width,), (width,), (scales, 1 if shared else latents, width)]
    shapes += [(scales, batch, latents, width)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return tensors[:4], tensors[4]


def everything(function: Callable, tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """The outputs and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, **options)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, grad.to(outputs.dtype))]


def on_triton(tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    with use_backend(modulated_norm="triton"):
        return everything(modulated_norm, tensors, grad, **options)


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding may do to a number: a few times in float32, once, at the end, in a half precision.

    Triton's interpreter does not round to the nearest number but cuts off.
    """
    eps = torch.finfo(dtype).eps
    return 2 * eps if dtype == torch.float32 else eps / (1 if INTERPRETED else 2)


def assert_as_exact_as_pytorch(tensors: list[Tensor], grad: Tensor) -> None:
    """At most twice (outputs) or three times (gradients) PyTorch's error at this precision, plus what rounding may do.

    On small tensors PyTorch's largest error can be much below that by luck.
    """
    found, same = on_triton(tensors, grad), everything(modulated_norm_reference, tensors, grad)
    exact = everything(modulated_norm_reference, [tensor.double() for tensor in tensors], grad.double())
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        limit = (2 if name == "outputs" else 3) * allowed + rounding_of(ours.dtype) * truth.abs().max()
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_error_is_pytorchs(shape, dtype, device):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(11, 3, 10, 2, False), (5, 7, 6, 1, True)], ids=["scales", "shared scale"])
def test_error_is_pytorchs_with_many_chunks(shape, dtype, device, small_chunks):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_error_is_pytorchs_at_full_size(shape, dtype):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, "cuda"))


def test_variance_of_inputs_far_from_zero(device):
    """A mean of 1000 is rounded by 3e-5; a variance from the mean of squares would be off by 0.1."""
    (inputs, *rest), grad = random_tensors(3, 2, 40, 2, False, device=device)
    tensors = [inputs + 1000.0, *rest]
    exact = everything(modulated_norm_reference, [tensor.double() for tensor in tensors], grad.double())
    for name, ours, truth in zip(NAMES, on_triton(tensors, grad), exact, strict=True):
        assert (ours - truth).abs().max() <= 5e-4 * truth.abs().max(), name


def test_eps_is_used(device):
    tensors, grad = random_tensors(2, 3, 9, 1, False, device=device)
    expected = everything(modulated_norm_reference, tensors, grad, eps=0.5)
    for ours, theirs in zip(on_triton(tensors, grad, eps=0.5), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(11, 3, 10, 2, False), (5, 7, 6, 2, True)], ids=["scales", "shared scale"])
def test_results_repeat_bit_for_bit(shape, device, small_chunks):
    tensors, grad = random_tensors(*shape, device=device)
    first = on_triton(tensors, grad)
    for _ in range(2 if INTERPRETED else 50):
        assert all(torch.equal(again, once) for again, once in zip(on_triton(tensors, grad), first, strict=True))


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_at_full_size():
    tensors, grad = random_tensors(*PUBLISHED["tiny propagator"], torch.bfloat16, "cuda")
    first = on_triton(tensors, grad)
    for _ in range(50):
        assert all(torch.equal(again, once) for again, once in zip(on_triton(tensors, grad), first, strict=True))


def test_tensors_that_are_not_contiguous(device):
    tensors, grad = random_tensors(4, 3, 10, 2, False, device=device)
    expected = on_triton(tensors, grad)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = grad.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not any(tensor.is_contiguous() for tensor in [*spread, turned])
    for ours, theirs in zip(on_triton(spread, turned), expected, strict=True):
        assert torch.equal(ours, theirs)
    grad = grad[:, :1, :1, :1]
    expected = on_triton(tensors, grad.expand(2, 4, 3, 10).contiguous())
    for ours, theirs in zip(on_triton(tensors, grad.expand(2, 4, 3, 10)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_may_differ(scales_dtype, device):
    (inputs, weight, bias, scales), grad = random_tensors(4, 3, 10, 2, False, device=device)
    grad = grad.bfloat16()
    tensors = [inputs, weight, bias, scales.to(scales_dtype)]
    found = on_triton(tensors, grad, dtype=torch.bfloat16)
    exact = everything(modulated_norm_reference, [tensor.double() for tensor in tensors], grad.double())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, *(tensor.dtype for tensor in tensors)]
    for name, ours, truth in zip(NAMES, found, exact, strict=True):
        tolerance = (1e-6 + rounding_of(ours.dtype)) * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= tolerance, name


def test_result_has_the_references_dtype(device):
    (inputs, weight, bias, scales), _ = random_tensors(2, 3, 4, 1, False, torch.bfloat16, device)
    with use_backend(modulated_norm="triton"):
        assert modulated_norm(inputs, weight, bias, scales).dtype == torch.bfloat16
        assert modulated_norm(inputs, weight, bias, scales.float()).dtype == torch.float32
        with torch.autocast(device, dtype=torch.bfloat16):
            assert modulated_norm(inputs, weight, bias, scales).dtype == torch.float32
            assert modulated_norm(inputs, weight, bias, scales, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_not_finite_stays_in_its_row(device):
    tensors, grad = random_tensors(3, 2, 5, 2, False, device=device)
    tensors[0][1, 0, 3] = float("nan")
    tensors[0][2, 1, 0] = float("inf")
    expected = everything(modulated_norm_reference, tensors, grad)
    for name, ours, theirs in zip(NAMES, on_triton(tensors, grad), expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), name
    rows = on_triton(tensors, grad)[1].isnan().any(dim=-1)
    assert rows.nonzero().tolist() == [[1, 0], [2, 1]]


def test_gradients_of_some_inputs(device):
    tensors, grad = random_tensors(3, 2, 5, 2, False, device=device)
    expected = on_triton(tensors, grad)
    for number, name in enumerate(NAMES[1:]):
        leaves = [tensor.detach().requires_grad_(number == at) for at, tensor in enumerate(tensors)]
        with use_backend(modulated_norm="triton"):
            (found,) = torch.autograd.grad(modulated_norm(*leaves), leaves[number], grad)
        assert torch.equal(found, expected[1 + number]), name


def test_second_derivatives(device):
    tensors, grad = random_tensors(3, 2, 5, 2, False, device=device)

    def second(backend: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, grad)]
        with use_backend(modulated_norm=backend):
            outputs = modulated_norm(*leaves[:4])
        first = torch.autograd.grad(outputs, leaves[:4], leaves[4], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 10, 2, False), (2, 3, 6, 2, True), (0, 3, 8, 2, False)])
def test_private_ops_are_sound(shape, device):
    tensors, grad = random_tensors(*shape, device=device)
    ops = torch.ops.m2mkd_fast
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops._modulated_norm_triton_forward.default, (*tensors, 1e-5, dtype))
        _, *statistics = ops._modulated_norm_triton_forward(*tensors, 1e-5, dtype)
        arguments = (grad.to(dtype), *tensors, *statistics)
        torch.library.opcheck(ops._modulated_norm_triton_backward.default, arguments)


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("cuda", "inductor")


def check_compiled(device: str, compiler: str) -> None:
    def modulated(inputs: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Tensor:
        return modulated_norm(2 * inputs, weight, bias, scales, dtype=torch.bfloat16).sin()

    torch._dynamo.reset()
    tensors, grad = random_tensors(4, 3, 10, 2, False, device=device)
    with use_backend(modulated_norm="triton"):
        compiled = everything(torch.compile(modulated, fullgraph=True, backend=compiler), tensors, grad)
        expected = everything(modulated, tensors, grad)
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_layers_agree_with_the_reference(device):
    torch.manual_seed(0)
    layer = LatentAttention(12, 5, num_heads=2, head_dim=4, layer_scale_initial_value=1.0).to(device)
    states, codes, signatures = (torch.randn(shape, device=device) for shape in ((2, 6, 12), (6, 5), (6, 4)))

    def results(backend: str) -> list[Tensor]:
        with use_backend(modulated_norm=backend):
            outputs = layer(states[:, :4], codes[:4], signatures[:4], states, codes, signatures)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), list(layer.parameters()))]

    for ours, theirs in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_is_what_runs_by_default(device, monkeypatch):
    monkeypatch.setattr(op_module, "modulated_norm_reference", None)
    tensors, _ = random_tensors(2, 2, 4, 1, False, device=device)
    assert modulated_norm(*tensors).shape == (1, 2, 2, 4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": torch.zeros(2, 3, 4, dtype=torch.float64)}, "not torch.float64"),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, "needs weight and bias in one dtype"),
        (
            {"inputs": torch.zeros(1, 1, 4097), "weight": torch.zeros(4097), "bias": torch.zeros(4097)},
            "up to 8 scales of 4096 channels, 8192 numbers in all, not 1 of 4097",
        ),
        ({"scales": torch.zeros(9, 3, 4)}, "not 9 of 4"),
    ],
)
def test_forced_where_it_cannot_run_it_says_why(change, reason, device):
    tensors = {
        "inputs": torch.zeros(2, 3, 4),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "scales": torch.ones(1, 3, 4),
        **change,
    }
    if tensors["inputs"].shape[-1] != 4:
        tensors["scales"] = torch.ones(1, *tensors["inputs"].shape[1:])
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    with use_backend("triton"), pytest.raises(M2MKDError, match=f"cannot run modulated_norm: .*{reason}"):
        modulated_norm(**tensors)


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import modulated_norm as kernels

    element = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    # inputs, outputs, scales, width; the last ones are the limits
    cases = [(dtype, dtype, 2, 384) for dtype in DTYPES] + [(torch.float32, torch.float16, 2, 512)]
    limits = ((8, 1024), (4, 2048), (2, 4096), (2, 4095), (8, 1))
    cases += [(torch.float32, torch.bfloat16, *limit) for limit in limits]
    for inputs, outputs, scales, width in cases:
        sizes = kernels.blocks_of(scales, width)
        num_warps = sizes.pop("num_warps")
        for kernel in (kernels.forward_kernel, kernels.backward_kernel):
            types = dict.fromkeys(("inputs", "weight", "bias", "scales"), f"*{element[inputs]}")
            types |= dict.fromkeys(("grad_inputs", "grad_scales"), f"*{element[inputs]}")
            types |= dict.fromkeys(("outputs", "grad_outputs"), f"*{element[outputs]}")
            types |= {"mean": "*fp32", "rstd": "*fp32", "grad_affine": "*fp32", "eps": "fp32"}
            used = resource_usage(kernel, types, {**sizes, "CHUNK": 16}, width, num_warps, architecture, tmp_path)
            # Rows that are not aligned need more addresses: where both limits meet, a few of them are spilled.
            assert used["STACK"] <= (128 if width == 4095 else 0), (kernel.__name__, outputs, scales, width, used)
            assert used["LOCAL"] == 0
            if width in (384, 512):
                assert used["REG"] <= 64, (kernel.__name__, inputs, outputs, used)
    sizes = {"ROWS_BLOCK": kernels._SUM_ROWS, "COLUMNS_BLOCK": kernels._SUM_COLUMNS}
    types = {"partial": "*fp32", "total": "*bf16"}
    used = resource_usage(kernels.sum_rows_kernel, types, sizes, 384, 4, architecture, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= 64


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize(
    "ones", [("batch",), ("latents",), ("width",), ("batch", "latents", "width", "rows", "columns")]
)
def test_kernels_compile_for_sizes_of_one(ones, tmp_path, monkeypatch):
    """Triton makes an argument of 1 a constant, which is another kind of value while it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import modulated_norm as kernels

    sizes = {"SCALES": 1, "WIDTH_BLOCK": 64, "CHUNK": 1}
    sums = {"ROWS_BLOCK": kernels._SUM_ROWS, "COLUMNS_BLOCK": kernels._SUM_COLUMNS}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel, kernels.sum_rows_kernel):
        numbers = {"batch", "latents", "width", "rows", "columns", "eps"}
        types = {name: "*fp32" for name in kernel.arg_names if name not in numbers} | {"eps": "fp32"}
        constants = {**(sums if kernel is kernels.sum_rows_kernel else sizes)}
        constants |= {name: 1 for name in ones if name in kernel.arg_names}
        assert resource_usage(kernel, types, constants, 50, 1, 90, tmp_path)["REG"] > 0


def resource_usage(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, int],
    width: int,
    num_warps: int,
    architecture: int,
    folder: Path,
) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel, compiled as a call would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    multiples_of_16 = [
        number
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name in ("width", "columns") and width % 16 == 0)
    ]
    attributes = {(number,): [["tt.divisibility", 16]] for number in multiples_of_16}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": num_warps},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    assert len(found) == 4, text
    return found
