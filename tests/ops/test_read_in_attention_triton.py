"""The Triton kernels of read_in_attention: on a GPU, and in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So :func:`test_kernels_run_in_the_interpreter` runs this file
once more in a process of its own, where the tests below it get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from read_in_attention_cases import NAMES, assert_as_exact_as_pytorch, everything, random_tensors
from torch import Tensor
from triton_interpreter import DEVICES, INTERPRETED, in_another_process, needs_triton, run_in_the_interpreter

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.read_in_attention import ReadInAttention
from m2mkd_fast.ops import read_in_attention as op_module
from m2mkd_fast.ops.read_in_attention import read_in_attention, read_in_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, heads, latents, head size, inputs, channels, one scale for all latents
SHAPES = {
    "all one": (1, 1, 1, 1, 1, 1, False),
    "small": (2, 3, 4, 5, 7, 6, False),
    "shared scale": (2, 3, 4, 5, 7, 6, True),
    "several blocks": (2, 3, 25, 6, 37, 70, False),
    "one block exactly": (1, 2, 32, 4, 32, 64, False),
    "five pieces": (1, 8, 5, 8, 17, 320, False),
    "a piece and a bit": (1, 1, 17, 4, 17, 65, False),
}
# batch, heads, latents, head size, inputs, channels
PUBLISHED = {"tiny": (128, 6, 64, 64, 64, 256), "imagenet": (32, 8, 192, 64, 784, 320)}
LARGE = {
    **{str(size): (2, 2, size, 16, size, 64) for size in (1, 17, 64, 320, 960, 1000)},
    "one image": (1, 8, 192, 64, 784, 320),
    "widest": (3, 4, 50, 64, 100, 512),
    "rows that are not aligned": (3, 4, 50, 64, 100, 451),
}
SMALL = SHAPES["small"]

pytestmark = needs_triton


@in_another_process
@pytest.mark.slow
def test_kernels_run_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=len(SHAPES) * len(DTYPES))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors_of(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = True
) -> list[Tensor]:
    *sizes, shared = shape if len(shape) == 7 else (*shape, False)
    return random_tensors(tuple(sizes), bias, 1 if shared else None, dtype, device)


def on_triton(*tensors: Tensor) -> Tensor:
    with use_backend(read_in_attention="triton"):
        return read_in_attention(*tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_error_is_pytorchs(shape, dtype, device):
    # Triton's interpreter does not round to the nearest number but cuts off.
    assert_as_exact_as_pytorch(tensors_of(shape, dtype, device), on_triton, rounding=3 if INTERPRETED else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE.keys())
def test_error_is_pytorchs_at_many_sizes(shape, dtype):
    assert_as_exact_as_pytorch(tensors_of(shape, dtype, "cuda"), on_triton)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_agrees_with_batched_products_at_full_size(shape, dtype):
    """The definition's keys would not fit; batched products have passed the tests above in float64."""
    tensors = tensors_of(shape, dtype, "cuda", bias=False)
    grad = torch.randn(tensors[0].shape, device="cuda")
    found, exact = everything(on_triton, tensors, grad), []
    with use_backend(read_in_attention="torch"):
        same = everything(read_in_attention, tensors, grad)
        exact = everything(read_in_attention, [tensor.double() for tensor in tensors], grad)
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=False):
        error, allowed = ((one - truth).abs().max() / truth.abs().max() for one in (ours.double(), theirs.double()))
        assert error <= 3 * allowed + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("keep", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_biases_and_gradients(bias, keep, device):
    tensors = tensors_of(SMALL, device=device, bias=bias)
    messages = on_triton(*(tensor.requires_grad_(keep) for tensor in tensors))
    torch.testing.assert_close(messages, read_in_attention_reference(*tensors), rtol=1e-5, atol=1e-5)
    assert messages.requires_grad == keep


def test_peaked_weights(device):
    """Scores of hundreds: exponentials without their largest one subtracted would be infinite."""
    tensors = tensors_of(SHAPES["several blocks"], device=device)
    tensors[0] = tensors[0] * 300
    expected = everything(read_in_attention_reference, [tensor.double() for tensor in tensors])
    for name, ours, truth in zip(NAMES, everything(on_triton, tensors), expected, strict=True):
        assert (ours - truth).abs().max() <= 1e-3 * truth.abs().max() + 1e-8, name


def test_results_repeat_bit_for_bit(device):
    tensors = tensors_of(SHAPES["several blocks"], torch.bfloat16, device)
    first = everything(on_triton, tensors)
    for _ in range(1 if INTERPRETED else 50):
        assert all(map(torch.equal, everything(on_triton, tensors), first))


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_at_full_size():
    tensors = tensors_of(PUBLISHED["imagenet"], torch.bfloat16, "cuda")
    first = everything(on_triton, tensors)
    for _ in range(20):
        assert all(map(torch.equal, everything(on_triton, tensors), first))


def test_tensors_that_are_not_contiguous(device):
    tensors = tensors_of(SMALL, device=device)
    grad = torch.randn(2, 3, 4, 5, device=device)
    expected = everything(on_triton, tensors, grad)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = grad.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not any(tensor.is_contiguous() for tensor in [*spread, turned])
    for name, ours, theirs in zip(NAMES, everything(on_triton, spread, turned), expected, strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 4, 0, 6)], ids=str)
def test_nothing_to_read_or_to_read_into(shape, device):
    messages, *gradients = everything(on_triton, tensors_of(shape, device=device))
    assert messages.shape == shape[:4]
    assert not any(tensor.any() for tensor in (messages, *gradients))


def test_what_is_not_finite_stays_in_its_image(device):
    tensors = tensors_of(SMALL, device=device)
    tensors[1][1, 3, 2] = float("nan")
    messages, _, grad_inputs, *_ = everything(on_triton, tensors)
    assert messages[0].isfinite().all() and grad_inputs[0].isfinite().all()
    assert messages[1].isnan().all()


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(compute, device):
    tensors = tensors_of(SHAPES["several blocks"], device=device)
    exact = everything(read_in_attention_reference, [tensor.double() for tensor in tensors])

    def under_autocast(*tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype=compute):
            return on_triton(*tensors)

    found = everything(under_autocast, tensors)
    assert [tensor.dtype for tensor in found] == [compute, *(tensor.dtype for tensor in tensors)]
    for name, ours, truth in zip(NAMES, found, exact, strict=True):
        assert (ours.double() - truth).abs().max() <= 3e-2 * truth.abs().max() + 1e-8, name


def test_second_derivatives(device):
    tensors = tensors_of(SMALL, device=device)

    def second(backend: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with use_backend(read_in_attention=backend):
            messages = read_in_attention(*leaves)
        first = torch.autograd.grad(messages.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first[:6]), leaves, allow_unused=True))

    expected = second("reference")
    largest = max(theirs.abs().max() for theirs in expected)
    for ours, theirs in zip(second("triton"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest.item())


@pytest.mark.parametrize("shape", [SMALL, SHAPES["shared scale"]], ids=["own scales", "shared scale"])
@pytest.mark.parametrize("keep", [True, False], ids=["training", "inference"])
def test_private_ops_are_sound(keep, shape, device):
    ops, tensors = torch.ops.m2mkd_fast, tensors_of(shape, device=device)
    arguments = (*tensors[:6], tensors[7], keep)
    torch.library.opcheck(ops._read_in_attention_triton_forward.default, arguments)
    if keep:
        messages, *kept = ops._read_in_attention_triton_forward(*arguments)
        arguments = (torch.randn_like(messages), *tensors[:6], *kept)
        torch.library.opcheck(ops._read_in_attention_triton_backward.default, arguments)


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("cuda", "inductor")


def check_compiled(device: str, compiler: str) -> None:
    def read(*tensors: Tensor) -> Tensor:
        return on_triton(2 * tensors[0], *tensors[1:]).sin()

    torch._dynamo.reset()
    tensors = tensors_of(SMALL, device=device)
    compiled = everything(torch.compile(read, fullgraph=True, backend=compiler), tensors)
    for ours, theirs in zip(compiled, everything(read, tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_agree_with_the_reference(device):
    torch.manual_seed(0)
    layer = ReadInAttention(12, 8, 5, num_heads=2, head_dim=4).to(device)
    states, codes, inputs = (torch.randn(shape, device=device) for shape in ((2, 6, 8), (6, 5), (2, 7, 12)))

    def results(backend: str) -> list[Tensor]:
        with use_backend(read_in_attention=backend):
            outputs = layer(states, codes, inputs)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), list(layer.parameters()))]

    for ours, theirs in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        (torch.float16, "_read_in_attention_triton_forward"),
        (torch.bfloat16, "_read_in_attention_triton_forward"),
        (torch.float32, "_read_in_attention_forward"),
    ],
    ids=str,
)
def test_what_runs_by_default(dtype, op, device):
    tensors = tensors_of(SMALL, dtype, device)
    with torch.profiler.profile() as profile:
        read_in_attention(*tensors)
    assert [event.key for event in profile.key_averages() if "read_in" in event.key] == [f"m2mkd_fast::{op}"]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    tensors = [tensor.requires_grad_() for tensor in tensors_of(SMALL, torch.bfloat16, "cuda")]
    torch.autograd.grad(on_triton(*tensors).sum(), tensors)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(on_triton(*tensors).sum(), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 2, 3, 4, 5), torch.float64, "knows float32, bfloat16 and float16, not torch.float64"),
        ((1, 1, 2, 3, 4, 513), torch.float32, "up to 512 channels, not 513"),
    ],
)
def test_forced_where_it_cannot_run_it_says_why(shape, dtype, reason, device):
    with pytest.raises(M2MKDError, match=f"cannot run read_in_attention: .*{reason}"):
        on_triton(*tensors_of(shape, dtype, device))
    with use_backend("auto"):
        assert read_in_attention(*tensors_of(shape, dtype, device)).shape == shape[:4]


def test_sizes_beyond_32_bits_are_refused(device):
    query, inputs = (torch.zeros((), device=device).expand(shape) for shape in ((1, 2, 3, 4), (1, 2**22, 512)))
    reason = op_module._why_not_triton(query, inputs, torch.bfloat16)
    assert reason == "the kernel counts with 32 bits: 6 rows or 4194304 inputs of 512 are too many"


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(architecture, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import read_in_attention as kernels

    # Shared memory of one program: the least that a device of the generation has, 99 KiB for 8.6 and 8.9.
    shared_limit = (227 if architecture == 90 and dtype != "float32" else 99) * 1024
    for kernel in kernels_of(kernels):
        for channels in (256, 320) if dtype == "float32" else (256, 320, 512):
            used = resource_usage(kernel, getattr(torch, dtype), channels, architecture, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, (kernel.__name__, channels, used)
            assert used["SHARED"] <= shared_limit, (kernel.__name__, channels, used)
            on_matrix_units = dtype == "bfloat16" and kernel is not kernels.prepare_backward_kernel
            assert ("mma" in used["instructions"]) == on_matrix_units, kernel.__name__
            if architecture == 90 and on_matrix_units and channels < 512:
                assert "wgmma" in used["instructions"], (kernel.__name__, channels)


@in_another_process
@pytest.mark.slow
@pytest.mark.parametrize("ones", [("rows", "all_rows"), ("tokens",), ("channels",), ("heads",), ("rows", "heads")])
def test_kernels_compile_for_sizes_of_one(ones, tmp_path, monkeypatch):
    """Triton makes an argument of 1 a constant, which is another kind of value while it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from m2mkd_fast.kernels import read_in_attention as kernels

    for kernel in kernels_of(kernels):
        constants = {name: 1 for name in ones if name in kernel.arg_names}
        assert resource_usage(kernel, torch.bfloat16, 16, 90, tmp_path, constants)["REG"] > 0


def kernels_of(kernels: Any) -> list[Any]:
    return [
        kernels.forward_kernel,
        kernels.prepare_backward_kernel,
        kernels.rows_backward_kernel,
        kernels.inputs_backward_kernel,
    ]


def resource_usage(
    kernel: Any,
    dtype: torch.dtype,
    channels: int,
    architecture: int,
    folder: Path,
    ones: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Registers and bytes of stack, shared and local memory of a kernel, compiled as a call would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from m2mkd_fast.kernels import read_in_attention as kernels

    element = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    options = kernels.blocks_of(kernel, channels, dtype, architecture >= 90)
    constants = {"KEY_SCALES": True, "VALUE_SCALES": True, "KEEP": True, "STEPS": 24, **options, **(ones or {})}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    numbers = {"all_rows", "rows", "tokens", "channels", "heads"}
    float32 = {"key_scale", "value_scale", "logsumexp", "correction"}
    types = dict.fromkeys(kernel.arg_names, f"*{element}") | dict.fromkeys(numbers, "i32")
    types |= dict.fromkeys(float32, "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    multiples_of_16 = [
        number
        for number, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name != "heads")
    ]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={(number,): [["tt.divisibility", 16]] for number in multiples_of_16},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={name: options[name] for name in ("num_warps", "num_stages") if name in options},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert len(found) == 3, text
    instructions = set(re.findall(r"\bw?g?mma\b(?=\.)", compiled.asm["ptx"]))
    return {**found, "SHARED": compiled.metadata.shared, "instructions": " ".join(sorted(instructions))}
