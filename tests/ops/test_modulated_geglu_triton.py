"""The Triton kernels of modulated_geglu: on a GPU, and in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So :func:`test_kernels_run_in_the_interpreter` runs this file
once more in a process of its own, where the tests below it get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import DEVICES, INTERPRETED, in_another_process, needs_triton, run_in_the_interpreter
from triton_resources import resource_usage

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.ops.modulated_geglu import modulated_geglu, modulated_geglu_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, latents, width, one scale for all latents
SHAPES = {
    "one number": (1, 1, 1, False),
    "odd": (5, 3, 33, False),
    "two blocks": (2, 2, 300, False),
    "shared scale": (3, 5, 20, True),
    "one latent": (9, 1, 12, False),
    "no rows": (0, 3, 8, False),
    "no latents": (4, 0, 8, False),
}
PUBLISHED = {"tiny": (128, 256, 768, False), "imagenet": (32, 768, 512, False)}
NAMES = ["outputs", "hidden", "scale"]

pytestmark = needs_triton


@in_another_process
@pytest.mark.slow
def test_kernels_run_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=len(SHAPES) * len(DTYPES))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def small_chunks(device, monkeypatch) -> None:
    """Several chunks of the batch and blocks of channels at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import modulated_geglu as kernels

    monkeypatch.setattr(kernels, "_LONGEST_CHUNK", 4)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)
    monkeypatch.setattr(kernels, "_WIDTH_BLOCK", 8)


def random_tensors(
    batch: int, latents: int, width: int, shared: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], Tensor]:
    """Hidden and scale; a gradient of the outputs."""
    generator = torch.Generator().manual_seed(batch + 10 * latents + 100 * width)
    shapes = [(batch, latents, 2 * width), (1 if shared else latents, width), (batch, latents, width)]
    hidden, scale, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [1.5 * hidden, scale], grad


def everything(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """The outputs and the gradients of both inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, **options)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, grad.to(outputs.dtype))]


def exactly(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return everything(modulated_geglu_reference, [tensor.double() for tensor in tensors], grad.double())


def on_triton(tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    with use_backend(modulated_geglu="triton"):
        return everything(modulated_geglu, tensors, grad, **options)


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
    found, same = on_triton(tensors, grad), everything(modulated_geglu_reference, tensors, grad)
    for name, ours, theirs, truth in zip(NAMES, found, same, exactly(tensors, grad), strict=True):
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
@pytest.mark.parametrize("shape", [(11, 3, 10, False), (5, 7, 6, True)], ids=["scales", "shared scale"])
def test_error_is_pytorchs_with_many_chunks(shape, dtype, device, small_chunks):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_error_is_pytorchs_at_full_size(shape, dtype):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, "cuda"))


@pytest.mark.parametrize("shape", [(11, 3, 10, False), (5, 7, 6, True)], ids=["scales", "shared scale"])
def test_results_repeat_bit_for_bit(shape, device, small_chunks):
    tensors, grad = random_tensors(*shape, device=device)
    first = on_triton(tensors, grad)
    for _ in range(2 if INTERPRETED else 50):
        assert all(torch.equal(again, once) for again, once in zip(on_triton(tensors, grad), first, strict=True))


def test_gates_far_out_and_not_finite(device):
    gates = torch.tensor([0.0, 1e-30, 13.0, -13.0, 40.0, -40.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    hidden = torch.stack([torch.ones_like(gates), gates], dim=-1).unsqueeze(0).to(device)
    tensors, grad = [hidden, torch.ones(1, 1, device=device)], torch.ones(1, gates.numel(), 1, device=device)
    found, expected = on_triton(tensors, grad), everything(modulated_geglu_reference, tensors, grad)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][:, :-3], expected[1][:, :-3], rtol=1e-6, atol=1e-6)
    assert found[1][0, -1].isnan().all()


def test_tensors_that_are_not_contiguous(device):
    tensors, grad = random_tensors(4, 3, 10, False, device=device)
    expected = on_triton(tensors, grad)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = grad.transpose(0, 2).contiguous().transpose(0, 2)
    assert not any(tensor.is_contiguous() for tensor in [*spread, turned])
    for ours, theirs in zip(on_triton(spread, turned), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_dtypes_may_differ(device):
    (hidden, scale), grad = random_tensors(4, 3, 10, False, device=device)
    tensors = [hidden.bfloat16(), scale]
    found = on_triton(tensors, grad.bfloat16(), dtype=torch.bfloat16)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for name, ours, truth in zip(NAMES, found, exactly(tensors, grad.bfloat16()), strict=True):
        tolerance = (1e-6 + rounding_of(ours.dtype)) * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= tolerance, name
    assert on_triton(tensors, grad)[0].dtype == torch.float32


def test_second_derivatives(device):
    tensors, grad = random_tensors(3, 2, 5, False, device=device)

    def second(backend: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, grad)]
        with use_backend(modulated_geglu=backend):
            outputs = modulated_geglu(*leaves[:2])
        first = torch.autograd.grad(outputs, leaves[:2], leaves[2], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 10, False), (2, 3, 6, True), (0, 3, 8, False)])
def test_private_ops_are_sound(shape, device):
    tensors, grad = random_tensors(*shape, device=device)
    ops = torch.ops.m2mkd_fast
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops._modulated_geglu_triton_forward.default, (*tensors, dtype))
        torch.library.opcheck(ops._modulated_geglu_triton_backward.default, (grad.to(dtype), *tensors))


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("cuda", "inductor")


def check_compiled(device: str, compiler: str) -> None:
    def modulated(hidden: Tensor, scale: Tensor) -> Tensor:
        return modulated_geglu(2 * hidden, scale, dtype=torch.bfloat16).sin()

    torch._dynamo.reset()
    tensors, grad = random_tensors(4, 3, 10, False, device=device)
    with use_backend(modulated_geglu="triton"):
        compiled = torch.compile(modulated, fullgraph=True, backend=compiler)
        expected = everything(modulated, tensors, grad)
        for ours, theirs in zip(everything(compiled, tensors, grad), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr("m2mkd_fast.ops.modulated_geglu.modulated_geglu_reference", None)
    tensors, _ = random_tensors(2, 2, 4, False, device="cuda")
    assert modulated_geglu(*tensors).shape == (2, 2, 4)


def test_forced_where_it_cannot_run_it_says_why(device):
    hidden, scale = torch.zeros(2, 3, 8, dtype=torch.float64, device=device), torch.ones(3, 4, device=device)
    with use_backend("triton"), pytest.raises(M2MKDError, match="cannot run modulated_geglu: .*not torch.float64"):
        modulated_geglu(hidden, scale)


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import modulated_geglu as kernels

    for element, scale in (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp16")):
        for width in (768, 512, 33):
            for kernel in (kernels.forward_kernel, kernels.backward_kernel):
                types = dict.fromkeys(("hidden", "outputs", "grad_outputs", "grad_hidden"), f"*{element}")
                types |= {"scale": f"*{scale}", "grad_scale": "*fp32"}
                constants = {"WIDTH_BLOCK": kernels._WIDTH_BLOCK, "CHUNK": 16}
                aligned = ("width",) if width % 16 == 0 else ()
                used = resource_usage(kernel, types, constants, aligned, kernels._NUM_WARPS, architecture, tmp_path)
                assert used["STACK"] == used["LOCAL"] == 0, (kernel.__name__, element, width, used)
                assert used["REG"] <= 64, (kernel.__name__, element, width, used)


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize("ones", [("batch",), ("latents",), ("width",), ("batch", "latents", "width")])
def test_kernels_compile_for_sizes_of_one(ones, tmp_path, monkeypatch):
    """Triton makes an argument of 1 a constant, which is another kind of value while it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import modulated_geglu as kernels

    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        types = {name: "*fp32" for name in kernel.arg_names if name not in ("batch", "latents", "width")}
        constants = {"WIDTH_BLOCK": 64, "CHUNK": 1, **dict.fromkeys(ones, 1)}
        assert resource_usage(kernel, types, constants, (), 1, 90, tmp_path)["REG"] > 0
