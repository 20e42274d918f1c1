"""The rearranged read-in attention against its definition with all keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_in_attention_cases import NAMES, assert_as_exact_as_pytorch, everything, random_tensors
from torch import Tensor

from m2mkd_fast.backend import use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.ops import read_in_attention as op_module
from m2mkd_fast.ops.read_in_attention import read_in_attention, read_in_attention_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "60"))
# batch, heads, latents, head size, inputs, channels
SMALL = (2, 3, 4, 5, 7, 6)
SHAPES = {
    "small": SMALL,
    "all one": (1, 1, 1, 1, 1, 1),
    "one input": (2, 2, 3, 4, 1, 5),
    "one latent": (3, 2, 1, 4, 17, 5),
    "one channel": (2, 2, 3, 4, 5, 1),
    "17": (2, 2, 17, 3, 17, 17),
    "many inputs": (1, 2, 3, 4, 1000, 8),
    "many latents": (2, 1, 320, 4, 9, 8),
}


@pytest.fixture
def few_scores(monkeypatch) -> None:
    """Parts of an image at a time, at sizes at which an image has parts."""
    monkeypatch.setattr(op_module, "_SCORES", 64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("own_scales", [True, False], ids=["own scales", "shared scale"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_rearranged_products_are_exact(shape: tuple[int, ...], bias: bool, own_scales: bool) -> None:
    check_exact(random_tensors(shape, bias, None if own_scales else 1))


@pytest.mark.parametrize("own_scales", [True, False], ids=["own scales", "shared scale"])
@pytest.mark.parametrize("scores", [1, 22, 50, 200, 500])
def test_any_part_of_the_images_at_a_time(scores: int, own_scales: bool, monkeypatch) -> None:
    monkeypatch.setattr(op_module, "_SCORES", scores)
    check_exact(random_tensors((5, 3, 4, 5, 7, 6), scales=None if own_scales else 1))


def check_exact(tensors: list[Tensor]) -> None:
    found, expected = everything(read_in_attention, tensors), everything(read_in_attention_reference, tensors)
    for name, ours, theirs in zip(NAMES, found, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(read_in_attention(*tensors), expected[0], rtol=1e-11, atol=1e-12)


def test_definition_for_one_latent_and_head() -> None:
    query, inputs, key_weight, key_scale, value_weight, value_scale = random_tensors(SMALL, bias=False)
    latent, head, dim = 2, 1, query.shape[-1]
    rows = slice(head * dim, (head + 1) * dim)
    keys = (inputs * key_scale[latent]) @ key_weight[rows].T
    values = (inputs * value_scale[latent]) @ value_weight[rows].T
    weights = (keys @ query[:, head, latent, :, None] / dim**0.5).softmax(dim=1)
    out = read_in_attention(query, inputs, key_weight, key_scale, value_weight, value_scale)
    torch.testing.assert_close(out[:, head, latent], (weights * values).sum(dim=1))


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
def test_read_in_attention_fuzz(data):
    shape = tuple(data.draw(st.integers(1, most)) for most in (3, 4, 9, 6, 20, 9))
    bias, own_scales = data.draw(st.booleans()), data.draw(st.booleans())
    tensors = random_tensors(shape, bias, None if own_scales else 1, seed=data.draw(st.integers(0, 2**16)))
    tensors[0] = tensors[0] * data.draw(st.sampled_from([0.0, 1.0, 30.0]))  # even, usual and peaked weights
    usual = op_module._SCORES
    op_module._SCORES = data.draw(st.sampled_from([usual, 1, 40]))
    try:
        check_exact(tensors)
    finally:
        op_module._SCORES = usual


@pytest.mark.parametrize("shape", [SMALL, (2, 2, 17, 64, 64, 320), (1, 3, 5, 16, 960, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_pytorchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_as_exact_as_pytorch(random_tensors(shape, dtype=dtype), read_in_attention)


def test_gradients_are_those_of_differences(few_scores) -> None:
    tensors = [tensor.requires_grad_() for tensor in random_tensors((2, 2, 3, 2, 12, 3))]
    assert torch.autograd.gradcheck(read_in_attention, tensors)


def test_second_derivatives() -> None:
    tensors = [tensor.requires_grad_() for tensor in random_tensors((1, 2, 2, 2, 3, 2))]
    assert torch.autograd.gradgradcheck(read_in_attention, tensors)


def test_the_key_bias_has_a_gradient_of_zero() -> None:
    tensors = random_tensors(SMALL)
    found, expected = everything(read_in_attention, tensors), everything(read_in_attention_reference, tensors)
    assert torch.equal(found[7], torch.zeros_like(found[7]))
    assert expected[7].abs().max() < 1e-13
    tensors[6] = tensors[6] + 5
    torch.testing.assert_close(read_in_attention(*tensors), found[0])


def test_gradients_of_some_arguments(few_scores) -> None:
    tensors = random_tensors(SMALL)
    grad = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = everything(read_in_attention, tensors, grad)
    for number, name in enumerate(NAMES[1:]):
        leaves = [tensor.detach().requires_grad_(number == at) for at, tensor in enumerate(tensors)]
        (found,) = torch.autograd.grad(read_in_attention(*leaves), leaves[number], grad)
        assert torch.equal(found, expected[1 + number]), name


def test_what_is_kept_can_be_used_twice(few_scores) -> None:
    tensors = [tensor.requires_grad_() for tensor in random_tensors(SMALL)]
    messages = read_in_attention(*tensors)
    first = torch.autograd.grad(messages.square().sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(messages.square().sum(), tensors), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = random_tensors((3, 4, 60, 16, 100, 64), dtype=dtype)
    first = everything(read_in_attention, tensors)
    for _ in range(3):
        assert all(map(torch.equal, everything(read_in_attention, tensors), first))


def test_tensors_that_are_not_contiguous(few_scores) -> None:
    tensors = random_tensors(SMALL)
    grad = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = everything(read_in_attention, tensors, grad)
    spread = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in tensors]
    turned = grad.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not any(tensor.is_contiguous() for tensor in [*spread, turned])
    for name, ours, theirs in zip(NAMES, everything(read_in_attention, spread, turned), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=name)
    one = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 5)
    found, expected = everything(read_in_attention, tensors, one), everything(read_in_attention_reference, tensors, one)
    for name, ours, theirs in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 4, 0, 6)], ids=str)
def test_nothing_to_read_or_to_read_into(shape: tuple[int, ...]) -> None:
    tensors = random_tensors(shape)
    messages, *gradients = everything(read_in_attention, tensors)
    assert messages.shape == shape[:4]
    assert not messages.any()
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert not any(gradient.any() for gradient in gradients)


def test_what_is_not_finite_stays_in_its_image(few_scores) -> None:
    tensors = random_tensors(SMALL)
    tensors[1][1, 3, 2] = float("nan")
    messages = read_in_attention(*tensors)
    assert messages[0].isfinite().all()
    assert messages[1].isnan().all()


def test_result_has_the_widest_dtype() -> None:
    tensors = random_tensors(SMALL, dtype=torch.bfloat16)
    assert read_in_attention(*tensors).dtype == torch.bfloat16
    tensors[3] = tensors[3].float()
    assert read_in_attention(*tensors).dtype == torch.float32
    assert all(
        gradient.dtype == tensor.dtype
        for gradient, tensor in zip(everything(read_in_attention, tensors)[1:], tensors, strict=True)
    )


def test_autocast() -> None:
    tensors = random_tensors(SMALL, dtype=torch.float32)
    exact = everything(read_in_attention_reference, [tensor.double() for tensor in tensors])

    def under_autocast(*tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return read_in_attention(*tensors)

    found = everything(under_autocast, tensors)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, *(tensor.dtype for tensor in tensors)]
    for name, ours, truth in zip(NAMES, found, exact, strict=True):
        assert (ours.double() - truth).abs().max() <= 2e-2 * truth.abs().max() + 1e-12, name
    assert under_autocast(*(tensor.double() for tensor in tensors)).dtype == torch.float64


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_private_ops_are_sound(keep: bool, bias: bool) -> None:
    ops, tensors = torch.ops.m2mkd_fast, random_tensors(SMALL)
    arguments = (*tensors[:6], tensors[7] if bias else None, keep)
    torch.library.opcheck(ops._read_in_attention_forward.default, arguments)
    if keep:
        messages, *kept = ops._read_in_attention_forward(*arguments)
        torch.library.opcheck(
            ops._read_in_attention_backward.default, (torch.randn_like(messages), *tensors[:6], *kept)
        )


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_as_one_graph(grad: bool) -> None:
    check_compiled("aot_eager", grad)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    check_compiled("inductor", grad=True)


def check_compiled(compiler: str, grad: bool) -> None:
    def read(*tensors: Tensor) -> Tensor:
        return read_in_attention(2 * tensors[0], *tensors[1:]).sin()

    torch._dynamo.reset()
    tensors = random_tensors(SMALL)
    compiled = torch.compile(read, fullgraph=True, backend=compiler)
    if not grad:
        torch.testing.assert_close(compiled(*tensors), read(*tensors))
        return
    for ours, theirs in zip(everything(compiled, tensors), everything(read, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest tensor that is made inside, whichever operator makes it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")


@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
def test_keys_and_values_never_exist(grad: bool) -> None:
    batch, heads, latents, dim, tokens, channels = shape = (3, 4, 24, 16, 80, 64)
    tensors = random_tensors(shape, dtype=torch.float32)
    run = everything if grad else lambda function, tensors: function(*tensors)
    keys = 4 * batch * tokens * latents * heads * dim
    assert largest_allocation(lambda: run(read_in_attention_reference, tensors)) >= keys
    largest_needed = 4 * batch * latents * heads * max(tokens, channels)
    assert largest_allocation(lambda: run(read_in_attention, tensors)) <= largest_needed < keys / 10


def test_scores_of_a_large_image_are_never_together_without_gradients() -> None:
    _, heads, latents, _, tokens, _ = shape = (1, 8, 600, 4, 784, 8)
    tensors = random_tensors(shape, dtype=torch.float32)
    largest = largest_allocation(lambda: read_in_attention(*tensors))
    assert largest <= 4 * op_module._SCORES < 4 * heads * latents * tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 3, 4)},
            r"query has shape \(2, 3, 4\); expected \[batch, heads, latents, head size\]",
        ),
        ({"query": torch.zeros(2, 0, 4, 5)}, "at least one head"),
        ({"inputs": torch.zeros(3, 7, 6)}, r"inputs has shape \(3, 7, 6\); for a query .* expected \[2, inputs, ch"),
        ({"inputs": torch.zeros(2, 7, 0)}, "at least one channel"),
        ({"key_weight": torch.zeros(15, 5)}, r"key_weight has shape \(15, 5\); .* expected \(15, 6\)"),
        ({"key_scale": torch.ones(3, 6)}, r"key_scale has shape \(3, 6\); .* expected \(4, 6\) or \(1, 6\)"),
        ({"value_weight": torch.zeros(5, 6)}, r"value_weight has shape \(5, 6\)"),
        ({"value_scale": torch.ones(6)}, r"value_scale has shape \(6,\)"),
        ({"value_bias": torch.zeros(6)}, r"value_bias has shape \(6,\); .* expected \(15,\)"),
        ({"key_bias": torch.zeros(15, dtype=torch.int64)}, "key_bias has dtype torch.int64; expected a floating dtype"),
        ({"value_bias": torch.zeros(15, device="meta")}, "value_bias is on meta, inputs on cpu"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    names = [*NAMES[1:7], "key_bias", "value_bias"]
    arguments = {**dict(zip(names, random_tensors(SMALL, dtype=torch.float32), strict=True)), **change}
    with pytest.raises(M2MKDError, match=message):
        read_in_attention(**arguments)


def test_the_definition_runs_only_where_it_is_forced(monkeypatch, recwarn) -> None:
    calls: list[int] = []
    monkeypatch.setattr(op_module, "read_in_attention_reference", lambda *tensors: calls.append(1))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        read_in_attention(*random_tensors(SMALL, dtype=dtype))
    assert not calls
    assert not recwarn.list
    with use_backend("reference"):
        read_in_attention(*random_tensors(SMALL))
    assert calls


def test_forcing_a_backend_that_cannot_run_says_why() -> None:
    tensors = random_tensors(SMALL)
    with use_backend("cuda"), pytest.raises(M2MKDError, match="it has none; there are: reference, triton, torch"):
        read_in_attention(*tensors)
    with use_backend("torch"):
        torch.testing.assert_close(read_in_attention(*tensors), read_in_attention_reference(*tensors))
