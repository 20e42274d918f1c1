"""The Triton kernels of modulated_norm: on a GPU, and in Triton's interpreter on the CPU.

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
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.ops.modulated_norm import modulated_norm, modulated_norm_reference

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
    """Several chunks of the batch, and several steps of every sum, at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import modulated_norm as kernels

    monkeypatch.setattr(kernels, "_LONGEST_CHUNK", 4)
    monkeypatch.setattr(kernels, "_SUM_ROWS", 4)
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)


def random_tensors(
    batch: int, latents: int, width: int, scales: int, shared: bool, dtype: torch.dtype = torch.float32, device="cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, weight, bias and every scale; gradients of the outputs."""
    generator = torch.Generator().manual_seed(batch + 10 * latents + 100 * width + scales)
    shapes = [(batch, latents, width), (width,), (width,), *[(1 if shared else latents, width)] * scales]
    shapes += [(batch, latents, width)] * scales
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return tensors[: 3 + scales], tensors[3 + scales :]


def call(*tensors: Tensor, **options: Any) -> list[Tensor]:
    inputs, weight, bias, *scales = tensors
    return modulated_norm(inputs, weight, bias, scales, **options)


def reference(*tensors: Tensor, **options: Any) -> list[Tensor]:
    inputs, weight, bias, *scales = tensors
    return modulated_norm_reference(inputs, weight, bias, scales, **options)


def names_of(scales: int) -> list[str]:
    return [*("outputs",) * scales, "inputs", "weight", "bias", *("scales",) * scales]


def everything(
    function: Callable[..., list[Tensor]], tensors: list[Tensor], grads: list[Tensor], **options: Any
) -> list[Tensor]:
    """The outputs and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, **options)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def exactly(tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return everything(reference, [tensor.double() for tensor in tensors], [grad.double() for grad in grads])


def on_triton(tensors: list[Tensor], grads: list[Tensor], **options: Any) -> list[Tensor]:
    with use_backend(modulated_norm="triton"):
        return everything(call, tensors, grads, **options)


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding may do to a number: a few times in float32, once, at the end, in a half precision.

    Triton's interpreter does not round to the nearest number but cuts off.
    """
    eps = torch.finfo(dtype).eps
    return 2 * eps if dtype == torch.float32 else eps / (1 if INTERPRETED else 2)


def assert_as_exact_as_pytorch(tensors: list[Tensor], grads: list[Tensor]) -> None:
    """At most twice (outputs) or three times (gradients) PyTorch's error at this precision, plus what rounding may do.

    On small tensors PyTorch's largest error can be much below that by luck.
    """
    found, same = on_triton(tensors, grads), everything(reference, tensors, grads)
    for name, ours, theirs, truth in zip(names_of(len(grads)), found, same, exactly(tensors, grads), strict=True):
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
    (inputs, *rest), grads = random_tensors(3, 2, 40, 2, False, device=device)
    tensors = [inputs + 1000.0, *rest]
    for name, ours, truth in zip(names_of(2), on_triton(tensors, grads), exactly(tensors, grads), strict=True):
        assert (ours - truth).abs().max() <= 5e-4 * truth.abs().max(), name


def test_eps_is_used(device):
    tensors, grads = random_tensors(2, 3, 9, 1, False, device=device)
    expected = everything(reference, tensors, grads, eps=0.5)
    for ours, theirs in zip(on_triton(tensors, grads, eps=0.5), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(11, 3, 10, 2, False), (5, 7, 6, 2, True)], ids=["scales", "shared scale"])
def test_results_repeat_bit_for_bit(shape, device, small_chunks):
    tensors, grads = random_tensors(*shape, device=device)
    first = on_triton(tensors, grads)
    for _ in range(2 if INTERPRETED else 50):
        assert all(torch.equal(again, once) for again, once in zip(on_triton(tensors, grads), first, strict=True))


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_at_full_size():
    tensors, grads = random_tensors(*PUBLISHED["tiny propagator"], torch.bfloat16, "cuda")
    first = on_triton(tensors, grads)
    for _ in range(50):
        assert all(torch.equal(again, once) for again, once in zip(on_triton(tensors, grads), first, strict=True))


def test_tensors_that_are_not_contiguous(device):
    tensors, grads = random_tensors(4, 3, 10, 2, False, device=device)
    expected = on_triton(tensors, grads)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = [grad.transpose(0, 2).contiguous().transpose(0, 2) for grad in grads]
    assert not any(tensor.is_contiguous() for tensor in [*spread, *turned])
    for ours, theirs in zip(on_triton(spread, turned), expected, strict=True):
        assert torch.equal(ours, theirs)
    expanded = [grad[:1, :1, :1].expand(4, 3, 10) for grad in grads]
    expected = on_triton(tensors, [grad.contiguous() for grad in expanded])
    for ours, theirs in zip(on_triton(tensors, expanded), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_may_differ(scales_dtype, device):
    (inputs, weight, bias, *scales), grads = random_tensors(4, 3, 10, 2, False, device=device)
    grads = [grad.bfloat16() for grad in grads]
    tensors = [inputs, weight, bias, *(scale.to(scales_dtype) for scale in scales)]
    found = on_triton(tensors, grads, dtype=torch.bfloat16)
    assert [tensor.dtype for tensor in found] == [*[torch.bfloat16] * 2, *(tensor.dtype for tensor in tensors)]
    for name, ours, truth in zip(names_of(2), found, exactly(tensors, grads), strict=True):
        tolerance = (1e-6 + rounding_of(ours.dtype)) * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= tolerance, name


def test_result_has_the_references_dtype(device):
    (inputs, weight, bias, scale), _ = random_tensors(2, 3, 4, 1, False, torch.bfloat16, device)

    def dtype_of(scale: Tensor, **options: Any) -> torch.dtype:
        with use_backend(modulated_norm="triton"):
            return modulated_norm(inputs, weight, bias, [scale], **options)[0].dtype

    assert dtype_of(scale) == torch.bfloat16
    assert dtype_of(scale.float()) == torch.float32
    with torch.autocast(device, dtype=torch.bfloat16):
        assert dtype_of(scale) == torch.float32
        assert dtype_of(scale, dtype=torch.bfloat16) == torch.bfloat16


def test_what_is_not_finite_stays_in_its_row(device):
    tensors, grads = random_tensors(3, 2, 5, 2, False, device=device)
    tensors[0][1, 0, 3] = float("nan")
    tensors[0][2, 1, 0] = float("inf")
    expected = everything(reference, tensors, grads)
    for name, ours, theirs in zip(names_of(2), on_triton(tensors, grads), expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), name
    rows = on_triton(tensors, grads)[2].isnan().any(dim=-1)
    assert rows.nonzero().tolist() == [[1, 0], [2, 1]]


def test_gradients_of_some_inputs(device):
    tensors, grads = random_tensors(3, 2, 5, 2, False, device=device)
    expected = on_triton(tensors, grads)
    for number, name in enumerate(names_of(2)[2:]):
        leaves = [tensor.detach().requires_grad_(number == at) for at, tensor in enumerate(tensors)]
        with use_backend(modulated_norm="triton"):
            (found,) = torch.autograd.grad(call(*leaves), leaves[number], grads)
        assert torch.equal(found, expected[2 + number]), name


def test_second_derivatives(device):
    tensors, grads = random_tensors(3, 2, 5, 2, False, device=device)

    def second(backend: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, *grads)]
        with use_backend(modulated_norm=backend):
            outputs = call(*leaves[:5])
        first = torch.autograd.grad(outputs, leaves[:5], leaves[5:], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 3, 10, 2, False), (2, 3, 6, 2, True), (0, 3, 8, 2, False)])
def test_private_ops_are_sound(shape, device):
    (inputs, weight, bias, *scales), grads = random_tensors(*shape, device=device)
    ops, arguments = torch.ops.m2mkd_fast, (inputs, weight, bias, scales)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops._modulated_norm_triton_forward.default, (*arguments, 1e-5, dtype))
        _, *statistics = ops._modulated_norm_triton_forward(*arguments, 1e-5, dtype)
        backward = ([grad.to(dtype) for grad in grads], *arguments, *statistics)
        torch.library.opcheck(ops._modulated_norm_triton_backward.default, backward)


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("cuda", "inductor")


def check_compiled(device: str, compiler: str) -> None:
    def modulated(*tensors: Tensor) -> list[Tensor]:
        return [output.sin() for output in call(2 * tensors[0], *tensors[1:], dtype=torch.bfloat16)]

    torch._dynamo.reset()
    tensors, grads = random_tensors(4, 3, 10, 2, False, device=device)
    with use_backend(modulated_norm="triton"):
        compiled = everything(torch.compile(modulated, fullgraph=True, backend=compiler), tensors, grads)
        expected = everything(modulated, tensors, grads)
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


@pytest.mark.gpu
def test_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr("m2mkd_fast.ops.modulated_norm.modulated_norm_reference", None)
    tensors, _ = random_tensors(2, 2, 4, 1, False, device="cuda")
    assert call(*tensors)[0].shape == (2, 2, 4)


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
    tensors["scales"] = list(tensors["scales"])
    with use_backend("triton"), pytest.raises(M2MKDError, match=f"cannot run modulated_norm: .*{reason}"):
        modulated_norm(**tensors)


def aligned(width: int) -> tuple[str, ...]:
    return ("width", "columns") if width % 16 == 0 else ()


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
            types = dict.fromkeys(("inputs", "weight", "bias", "grad_inputs"), f"*{element[inputs]}")
            types |= dict.fromkeys(("scales", "grad_scales"), (f"*{element[inputs]}",) * scales)
            types |= dict.fromkeys(("outputs", "grad_outputs"), (f"*{element[outputs]}",) * scales)
            types |= {"mean": "*fp32", "rstd": "*fp32", "grad_affine": "*fp32", "eps": "fp32"}
            used = resource_usage(
                kernel, types, {**sizes, "CHUNK": 16}, aligned(width), num_warps, architecture, tmp_path
            )
            # Rows that are not aligned need more addresses: where both limits meet, a few of them are spilled.
            assert used["STACK"] <= (128 if width == 4095 else 0), (kernel.__name__, outputs, scales, width, used)
            assert used["LOCAL"] == 0
            if width in (384, 512):
                assert used["REG"] <= 64, (kernel.__name__, inputs, outputs, used)
    sizes = {"ROWS_BLOCK": kernels._SUM_ROWS, "COLUMNS_BLOCK": kernels._SUM_COLUMNS}
    types = {"partial": "*fp32", "total": "*bf16"}
    used = resource_usage(kernels.sum_rows_kernel, types, sizes, aligned(384), 4, architecture, tmp_path)
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
        types |= dict.fromkeys(("scales", "grad_scales", "outputs", "grad_outputs"), ("*fp32",))
        constants = {**(sums if kernel is kernels.sum_rows_kernel else sizes)}
        constants |= {name: 1 for name in ones if name in kernel.arg_names}
        assert resource_usage(kernel, types, constants, (), 1, 90, tmp_path)["REG"] > 0
