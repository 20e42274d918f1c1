"""modulated_geglu on the CPU: the C++ kernel and the reference against formula, float64 and autograd."""

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
from m2mkd_fast.ops import modulated_geglu as op_module
from m2mkd_fast.ops.modulated_geglu import modulated_geglu, modulated_geglu_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "60"))
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))
# batch, latents, width, one scale for all latents
SHAPES = {
    "one number": (1, 1, 1, False),
    "odd": (3, 17, 33, False),
    "shared scale": (3, 19, 40, True),
    "one latent, many images": (90, 1, 64, False),
    "many chunks": (70, 20, 24, False),
    "tiny": (1, 320, 768, False),
    "imagenet": (1, 960, 512, False),
    "many latents": (1, 1000, 8, False),
    "no rows": (0, 3, 8, False),
    "no latents": (4, 0, 8, False),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu_kernel)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(modulated_geglu=request.param):
        yield request.param


@pytest.fixture
def kernel() -> Iterator[None]:
    if why_missing("_C") is not None:
        pytest.skip(why_missing("_C"))
    with use_backend(modulated_geglu="cpu"):
        yield


def random_tensors(
    batch: int = 2, latents: int = 4, width: int = 6, shared: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    """Hidden and scale; a gradient of the outputs."""
    generator = torch.Generator().manual_seed(batch + 10 * latents + 100 * width)
    shapes = [(batch, latents, 2 * width), (1 if shared else latents, width), (batch, latents, width)]
    hidden, scale, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [1.5 * hidden, scale], grad


def everything(function: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor, **options: Any) -> list[Tensor]:
    """The outputs and the gradients of both inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves, **options)
    return [outputs.detach(), *torch.autograd.grad(outputs, leaves, grad.to(outputs.dtype))]


def exactly(tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    return everything(modulated_geglu_reference, [tensor.double() for tensor in tensors], grad.double())


def test_is_values_times_gelu_of_gates_times_scale(backend) -> None:
    (hidden, scale), _ = random_tensors()
    expected = hidden[..., :6] * F.gelu(hidden[..., 6:]) * scale
    torch.testing.assert_close(modulated_geglu(hidden, scale), expected)
    shared = modulated_geglu(hidden, scale[1:2])
    torch.testing.assert_close(shared, hidden[..., :6] * F.gelu(hidden[..., 6:]) * scale[1])


def test_dtype_of_the_result(backend) -> None:
    (hidden, scale), _ = random_tensors(dtype=torch.float32)
    assert modulated_geglu(hidden, scale).dtype == torch.float32
    assert modulated_geglu(hidden.bfloat16(), scale.bfloat16()).dtype == torch.bfloat16
    assert modulated_geglu(hidden.bfloat16(), scale).dtype == torch.float32
    assert modulated_geglu(hidden, scale.double()).dtype == torch.float64
    rounded = modulated_geglu(hidden, scale, dtype=torch.bfloat16)
    assert torch.equal(rounded, modulated_geglu(hidden, scale).bfloat16())


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared, backend) -> None:
    tensors, _ = random_tensors(shared=shared)
    assert torch.autograd.gradcheck(modulated_geglu, [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_shape
def test_error_is_pytorchs(shape, dtype, kernel) -> None:
    """At most twice (outputs) or three times (gradients) PyTorch's, plus a rounding: by luck PyTorch's can be small."""
    tensors, grad = random_tensors(*shape, dtype=dtype)
    exact = exactly(tensors, grad)
    found, same = everything(modulated_geglu, tensors, grad), everything(modulated_geglu_reference, tensors, grad)
    for name, ours, theirs, truth in zip(("outputs", "hidden", "scale"), found, same, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == truth.shape
        if truth.numel() == 0:
            continue
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        rounding = (4 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * truth.abs().max()
        assert error <= (2 if name == "outputs" else 3) * allowed + rounding, name


def test_the_normal_distribution_is_exact_to_rounding(kernel) -> None:
    """Dense in gates: no point between those of a random test is worse, and tails keep their relative precision."""
    gates = torch.linspace(-12.0, 12.0, 480_001)
    hidden = torch.stack([torch.ones_like(gates), gates], dim=-1).unsqueeze(0)
    exact = everything(
        modulated_geglu_reference,
        [hidden.double(), torch.ones(1, 1).double()],
        torch.ones(()).double().expand(1, gates.numel(), 1),
    )
    found = everything(modulated_geglu, [hidden, torch.ones(1, 1)], torch.ones(()).expand(1, gates.numel(), 1))
    same = everything(modulated_geglu_reference, [hidden, torch.ones(1, 1)], torch.ones(()).expand(1, gates.numel(), 1))
    for ours, theirs, truth in zip(found[:2], same[:2], exact[:2], strict=True):
        for low in range(-8, 8):
            part = (gates >= low) & (gates < low + 1)
            error, allowed = ((one - truth)[0, part].abs().max() for one in (ours, theirs))
            assert error <= 2 * allowed + 1e-7 * truth[0, part].abs().max(), low
    tail = (gates < -1) & (gates > -9)
    truth = gates.double() * 0.5 * torch.special.erfc(-gates.double() / 2**0.5)
    assert ((found[0][0, :, 0] - truth) / truth)[tail].abs().max() < 2e-5


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
@needs_cpu_kernel
def test_modulated_geglu_fuzz(data):
    batch, latents, width = (data.draw(st.integers(low, high)) for low, high in ((0, 70), (0, 40), (1, 70)))
    (hidden, scale), grad = random_tensors(batch, latents, width, data.draw(st.booleans()))
    hidden = hidden * data.draw(st.sampled_from([1e-3, 1.0, 10.0]))
    tensors = [hidden.float(), scale.float()]
    if data.draw(st.booleans()):
        tensors = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    with use_backend(modulated_geglu="cpu"):
        found = everything(modulated_geglu, tensors, grad)
    # 1 + erf in float64 rounds to multiples of 1e-16, where the kernel still knows how thin the tail is.
    largest = [tensor.abs().max().item() if tensor.numel() else 0.0 for tensor in (hidden, scale, grad)]
    tail = 1e-15 * max(batch, 1) * largest[0] ** 2 * largest[1] * largest[2]
    for ours, truth in zip(found, exactly(tensors, grad.float()), strict=True):
        scale_of = truth.abs().max().item() if truth.numel() else 1.0
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=2e-6 * scale_of + tail)


def test_gates_far_out_and_not_finite(kernel):
    gates = torch.tensor(
        [0.0, -0.0, 1e-30, 13.0, -13.0, 40.0, -40.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")]
    )
    hidden = torch.stack([torch.ones_like(gates), gates], dim=-1).unsqueeze(0)
    tensors, grad = [hidden, torch.ones(1, 1)], torch.ones(1, gates.numel(), 1)
    found, expected = everything(modulated_geglu, tensors, grad), everything(modulated_geglu_reference, tensors, grad)
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][:, :-3], expected[1][:, :-3], rtol=1e-6, atol=1e-6)
    assert found[1][0, -1].isnan().all()


def test_tensors_that_are_not_contiguous(kernel):
    tensors, grad = random_tensors(4, 3, 10)
    expected = everything(modulated_geglu, tensors, grad)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(tensor.is_contiguous() for tensor in [*spread, turned])
    for ours, theirs in zip(everything(modulated_geglu, spread, turned), expected, strict=True):
        assert torch.equal(ours, theirs)
    expanded = grad[:1, :1].expand(4, 3, 10)
    expected = everything(modulated_geglu, tensors, expanded.contiguous())
    for ours, theirs in zip(everything(modulated_geglu, tensors, expanded), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivatives(kernel):
    tensors, grad = random_tensors(3, 2, 5)

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, grad)]
        first = torch.autograd.grad(function(*leaves[:2]), leaves[:2], leaves[2], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second(modulated_geglu), second(modulated_geglu_reference), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 40, 70, False), (70, 20, 24, False), (300, 9, 16, True)])
def test_results_do_not_depend_on_threads_or_repetition(shape, kernel):
    tensors, grad = random_tensors(*shape, dtype=torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            runs.append(everything(modulated_geglu, tensors, grad))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(again, once) for again, once in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(4, 3, 10, False), (2, 3, 6, True), (0, 3, 8, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_private_ops_are_sound(shape, dtype, kernel):
    tensors, grad = random_tensors(*shape, dtype=dtype)
    torch.library.opcheck(torch.ops.m2mkd_fast._modulated_geglu_forward.default, tuple(tensors))
    torch.library.opcheck(torch.ops.m2mkd_fast._modulated_geglu_backward.default, (grad, *tensors))


def test_private_ops_refuse_what_they_cannot_run(kernel):
    (hidden, scale), grad = random_tensors()
    ops = torch.ops.m2mkd_fast
    with pytest.raises(RuntimeError, match="scale must have the dtype"):
        ops._modulated_geglu_forward(hidden, scale.float())
    with pytest.raises(RuntimeError, match="scale must be"):
        ops._modulated_geglu_forward(hidden, scale[:2])
    with pytest.raises(RuntimeError, match="grad_outputs must be"):
        ops._modulated_geglu_backward(grad[:1], hidden, scale)


def test_compiles_as_one_graph(backend):
    def modulated(hidden: Tensor, scale: Tensor) -> Tensor:
        return modulated_geglu(2 * hidden, scale, dtype=torch.float32).sin()

    torch._dynamo.reset()
    tensors, grad = random_tensors(4, 3, 10, dtype=torch.float32)
    compiled = everything(torch.compile(modulated, fullgraph=True, backend="aot_eager"), tensors, grad)
    for ours, theirs in zip(compiled, everything(modulated, tensors, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_cpu_kernel
def test_the_kernel_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr(op_module, "modulated_geglu_reference", None)
    tensors, _ = random_tensors()
    assert modulated_geglu(*tensors).shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 12)}, r"hidden has shape \(4, 12\); expected \[batch, latents, 2 \* width\]"),
        ({"hidden": torch.zeros(2, 4, 11)}, r"hidden has shape \(2, 4, 11\)"),
        ({"hidden": torch.zeros(2, 4, 0)}, "width of at least 1"),
        ({"scale": torch.ones(6)}, r"scale has shape \(6,\); .* expected \[4, 6\] or \[1, 6\]"),
        ({"scale": torch.ones(3, 6)}, r"scale has shape \(3, 6\)"),
        ({"scale": torch.ones(4, 12)}, r"scale has shape \(4, 12\)"),
        ({"scale": torch.ones(4, 6, dtype=torch.int64)}, "scale has dtype torch.int64; expected a floating"),
        ({"scale": torch.ones(4, 6, device="meta")}, "scale is on meta, hidden on cpu; move one of them"),
        ({"dtype": torch.int32}, "dtype is torch.int32; expected a floating"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 4, 12), "scale": torch.ones(4, 6), **change}
    with pytest.raises(M2MKDError, match=message):
        modulated_geglu(**arguments)


def test_meta_tensors_run_the_reference_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    tensors, _ = random_tensors()
    assert modulated_geglu(*(tensor.to("meta") for tensor in tensors)).shape == (2, 4, 6)
    assert not recwarn.list
