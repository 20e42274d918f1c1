"""modulated_norm on the CPU: the C++ kernel and the reference against formula, float64 and autograd."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.ops import modulated_norm as op_module
from m2mkd_fast.ops.modulated_norm import modulated_norm, modulated_norm_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "60"))
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))
# batch, latents, width, scales, one scale for all latents
SHAPES = {
    "one number": (1, 1, 1, 1, False),
    "odd": (3, 17, 33, 2, False),
    "three scales": (5, 3, 37, 3, False),
    "eight scales": (2, 9, 20, 8, False),
    "shared scale": (3, 19, 40, 2, True),
    "one latent, many images": (90, 1, 64, 2, False),
    "many chunks": (70, 20, 24, 2, False),
    "tiny senders": (2, 320, 384, 2, False),
    "imagenet receivers": (1, 960, 512, 1, False),
    "many latents": (1, 1000, 8, 1, False),
    "no rows": (0, 3, 8, 2, False),
    "no latents": (4, 0, 8, 2, False),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu_kernel)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(modulated_norm=request.param):
        yield request.param


@pytest.fixture
def kernel() -> Iterator[None]:
    if why_missing("_C") is not None:
        pytest.skip(why_missing("_C"))
    with use_backend(modulated_norm="cpu"):
        yield


def random_tensors(
    batch: int = 2,
    latents: int = 4,
    width: int = 6,
    scales: int = 3,
    shared: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs, weight, bias and every scale; gradients of the outputs."""
    generator = torch.Generator().manual_seed(batch + 10 * latents + 100 * width + scales)
    shapes = [(batch, latents, width), (width,), (width,), *[(1 if shared else latents, width)] * scales]
    shapes += [(batch, latents, width)] * scales
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return tensors[: 3 + scales], tensors[3 + scales :]


def call(*tensors: Tensor, **options: Any) -> list[Tensor]:
    inputs, weight, bias, *scales = tensors
    return modulated_norm(inputs, weight, bias, scales, **options)


def reference(*tensors: Tensor, **options: Any) -> list[Tensor]:
    inputs, weight, bias, *scales = tensors
    return modulated_norm_reference(inputs, weight, bias, scales, **options)


def everything(
    function: Callable[..., list[Tensor]], tensors: list[Tensor], grads: list[Tensor], **options: Any
) -> list[Tensor]:
    """The outputs and the gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, **options)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def test_is_layer_norm_times_each_scale(backend) -> None:
    (inputs, weight, bias, *scales), _ = random_tensors()
    normalised = F.layer_norm(inputs, (6,), weight, bias, 1e-3)
    expected = [normalised * scale for scale in scales]
    torch.testing.assert_close(modulated_norm(inputs, weight, bias, scales, eps=1e-3), expected)
    shared = modulated_norm(inputs, weight, bias, [scale[:1] for scale in scales], eps=1e-3)
    torch.testing.assert_close(shared[1], normalised * scales[1][0])


def test_dtype_of_the_result(backend) -> None:
    tensors, _ = random_tensors(dtype=torch.float32)
    inputs, weight, bias, *scales = tensors
    assert call(*tensors)[0].dtype == torch.float32
    assert call(*(tensor.bfloat16() for tensor in tensors))[0].dtype == torch.bfloat16
    assert call(inputs.bfloat16(), weight.bfloat16(), bias.bfloat16(), *scales)[0].dtype == torch.float32
    assert call(inputs, weight, bias, *(scale.double() for scale in scales))[0].dtype == torch.float64
    for rounded, exact in zip(call(*tensors, dtype=torch.bfloat16), call(*tensors), strict=True):
        assert torch.equal(rounded, exact.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*tensors)[0].dtype == torch.float32


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared, backend) -> None:
    tensors, _ = random_tensors(shared=shared)
    assert torch.autograd.gradcheck(call, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_shape
def test_error_is_pytorchs(shape, dtype, kernel) -> None:
    """At most twice (outputs) or three times (gradients) PyTorch's, plus a rounding: by luck PyTorch's can be small."""
    tensors, grads = random_tensors(*shape, dtype=dtype)
    if dtype == torch.float64:
        # There is no wider truth: the reference's own result, to a few roundings of its sums.
        for ours, truth in zip(everything(call, tensors, grads), everything(reference, tensors, grads), strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        return
    found, same = everything(call, tensors, grads), everything(reference, tensors, grads)
    exact = everything(reference, [tensor.double() for tensor in tensors], [grad.double() for grad in grads])
    for number, (ours, theirs, truth) in enumerate(zip(found, same, exact, strict=True)):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert error <= (2 if number < len(grads) else 3) * allowed + rounding, f"tensor {number}"


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
@needs_cpu_kernel
def test_modulated_norm_fuzz(data):
    batch, latents, width = (data.draw(st.integers(low, high)) for low, high in ((0, 70), (0, 40), (1, 70)))
    tensors, grads = random_tensors(batch, latents, width, data.draw(st.integers(1, 8)), data.draw(st.booleans()))
    if data.draw(st.booleans()):
        tensors = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    eps = data.draw(st.sampled_from([1e-5, 0.5]))
    # One channel, or a variance far below eps, divides what rounding left by the root of eps.
    tolerance = 1e-10 if width > 1 else 1e-8
    with use_backend(modulated_norm="cpu"):
        found = everything(call, tensors, grads, eps=eps)
    for ours, truth in zip(found, everything(reference, tensors, grads, eps=eps), strict=True):
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def test_variance_of_inputs_far_from_zero(kernel):
    """A mean of 1000 is rounded by 3e-5; a variance from the mean of squares would be off by 0.1."""
    (inputs, *rest), grads = random_tensors(3, 2, 40, 2, dtype=torch.float32)
    tensors = [inputs + 1000.0, *rest]
    exact = everything(reference, [tensor.double() for tensor in tensors], [grad.double() for grad in grads])
    for ours, truth in zip(everything(call, tensors, grads), exact, strict=True):
        assert (ours - truth).abs().max() <= 5e-4 * truth.abs().max()


def test_what_is_not_finite_stays_in_its_row(kernel):
    tensors, grads = random_tensors(3, 2, 40, 2)
    tensors[0][1, 0, 3] = float("nan")
    tensors[0][2, 1, 0] = float("inf")
    found, expected = everything(call, tensors, grads), everything(reference, tensors, grads)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert found[2].isnan().any(dim=-1).nonzero().tolist() == [[1, 0], [2, 1]]


def test_tensors_that_are_not_contiguous(kernel):
    tensors, grads = random_tensors(4, 3, 10, 2)
    expected = everything(call, tensors, grads)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = [grad.transpose(0, 1).contiguous().transpose(0, 1) for grad in grads]
    assert not any(tensor.is_contiguous() for tensor in [*spread, *turned])
    for ours, theirs in zip(everything(call, spread, turned), expected, strict=True):
        assert torch.equal(ours, theirs)
    expanded = [grad[:, :1].expand(4, 3, 10) for grad in grads]
    expected = everything(call, tensors, [grad.contiguous() for grad in expanded])
    for ours, theirs in zip(everything(call, tensors, expanded), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_of_some_tensors(kernel):
    tensors, grads = random_tensors(3, 2, 5, 2)
    expected = everything(call, tensors, grads)[2:]
    for number in range(len(tensors)):
        leaves = [tensor.detach().requires_grad_(number == at) for at, tensor in enumerate(tensors)]
        (found,) = torch.autograd.grad(call(*leaves), leaves[number], grads)
        assert torch.equal(found, expected[number])


def test_gradient_of_one_output(kernel):
    tensors, grads = random_tensors(3, 2, 5, 2)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    found = torch.autograd.grad(call(*leaves)[1], leaves, grads[1], allow_unused=True)
    expected = torch.autograd.grad(reference(*leaves)[1], leaves, grads[1], allow_unused=True)
    assert expected[3] is None and (found[3] == 0).all()
    for ours, theirs in zip([*found[:3], found[4]], [*expected[:3], expected[4]], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives(kernel):
    tensors, grads = random_tensors(3, 2, 5, 2)

    def second(function: Callable[..., list[Tensor]]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, *grads)]
        first = torch.autograd.grad(function(*leaves[:5]), leaves[:5], leaves[5:], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second(call), second(reference), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 40, 70, 2, False), (70, 20, 24, 1, False), (300, 9, 16, 2, True)])
def test_results_do_not_depend_on_threads_or_repetition(shape, kernel):
    tensors, grads = random_tensors(*shape, dtype=torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            runs.append(everything(call, tensors, grads))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(again, once) for again, once in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(4, 3, 10, 2, False), (2, 3, 6, 2, True), (0, 3, 8, 2, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_private_ops_are_sound(shape, dtype, kernel):
    (inputs, weight, bias, *scales), grads = random_tensors(*shape, dtype=dtype)
    ops, arguments = torch.ops.m2mkd_fast, (inputs, weight, bias, scales)
    torch.library.opcheck(ops._modulated_norm_forward.default, (*arguments, 1e-5))
    _, *statistics = ops._modulated_norm_forward(*arguments, 1e-5)
    torch.library.opcheck(ops._modulated_norm_backward.default, (grads, *arguments, *statistics))


def test_private_ops_refuse_what_they_cannot_run(kernel):
    (inputs, weight, bias, *scales), _ = random_tensors()
    forward = torch.ops.m2mkd_fast._modulated_norm_forward
    for arguments, message in (
        ((inputs, weight.float(), bias, scales, 1e-5), "weights must have the dtype"),
        ((inputs, weight, bias[:5], scales, 1e-5), "biases have a wrong shape"),
        ((inputs, weight, bias, [scales[0], scales[1][:1]], 1e-5), "scales have a wrong shape"),
        ((inputs, weight, bias, [], 1e-5), "1 to 8 scales"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*arguments)


@pytest.mark.parametrize("scales", [1, 2, 3])
def test_compiles_as_one_graph(scales, backend):
    def modulated(*tensors: Tensor) -> list[Tensor]:
        return [output.sin() for output in call(2 * tensors[0], *tensors[1:], dtype=torch.float32)]

    torch._dynamo.reset()
    tensors, grads = random_tensors(4, 3, 10, scales, dtype=torch.float32)
    compiled = torch.compile(modulated, fullgraph=True, backend="aot_eager")
    expected = everything(modulated, tensors, grads)
    for ours, theirs in zip(everything(compiled, tensors, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), expected[:scales])


@needs_cpu_kernel
def test_the_kernel_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr(op_module, "modulated_norm_reference", None)
    tensors, _ = random_tensors()
    assert [output.shape for output in call(*tensors)] == [(2, 4, 6)] * 3


@needs_cpu_kernel
def test_more_scales_than_the_kernel_takes():
    tensors, _ = random_tensors(scales=9)
    with use_backend("cpu"), pytest.raises(M2MKDError, match="takes up to 8 scales, not 9"):
        call(*tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(4, 6)}, r"inputs has shape \(4, 6\); expected \[batch, latents, width\]"),
        ({"inputs": torch.zeros(2, 4, 0)}, "width of at least 1"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(6,\) for inputs \(2, 4, 6\)"),
        ({"bias": torch.zeros(1, 6)}, r"bias has shape \(1, 6\), expected \(6,\)"),
        ({"scales": torch.ones(4, 6)}, r"scales\[0\] has shape \(6,\); .* expected \[4, 6\] or \[1, 6\]"),
        ({"scales": torch.ones(3, 2, 6)}, r"scales\[0\] has shape \(2, 6\)"),
        ({"scales": [torch.ones(4, 6), torch.ones(4, 5)]}, r"scales\[1\] has shape \(4, 5\)"),
        ({"scales": [torch.ones(4, 6), torch.ones(1, 6)]}, r"scales\[1\] is torch.float32 \(1, 6\), .* expand or"),
        ({"scales": [torch.ones(4, 6), torch.ones(4, 6).double()]}, r"scales\[1\] is torch.float64 .* or convert"),
        ({"scales": []}, "scales is empty; pass at least one"),
        ({"inputs": torch.zeros(2, 4, 6, dtype=torch.int64)}, "inputs has dtype torch.int64; expected a floating"),
        ({"bias": torch.zeros(6, device="meta")}, "bias is on meta, inputs on cpu; move one of them"),
        ({"dtype": torch.int32}, "dtype is torch.int32; expected a floating"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {
        "inputs": torch.zeros(2, 4, 6),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "scales": torch.ones(3, 4, 6),
        **change,
    }
    with pytest.raises(M2MKDError, match=message):
        modulated_norm(**arguments)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_fast.backend._TRITON_INTERPRETS", False)
    tensors, _ = random_tensors(dtype=torch.float32)
    reason = "cannot run modulated_norm: the input is on cpu, not on cuda .TRITON_INTERPRET=1"
    with use_backend("triton"), pytest.raises(M2MKDError, match=reason):
        call(*tensors)
    monkeypatch.setattr("m2mkd_fast.backend._HAS_TRITON", False)
    with use_backend("triton"), pytest.raises(M2MKDError, match="triton is not installed; pip install triton"):
        call(*tensors)


def test_meta_tensors_run_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    tensors, _ = random_tensors()
    assert call(*(tensor.to("meta") for tensor in tensors))[0].shape == (2, 4, 6)
    assert not recwarn.list
