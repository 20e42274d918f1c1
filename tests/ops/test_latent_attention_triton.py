"""The Triton kernels of latent_attention: on a GPU, and in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined. So :func:`test_kernels_run_in_the_interpreter` runs this file
once more in a process of its own, where the tests below it get the device "cpu"; in any other they need a GPU.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import (
    DEVICES,
    INTERPRETED,
    as_a_gpu_does,
    in_another_process,
    needs_triton,
    run_in_the_interpreter,
)

from m2mkd_fast.backend import use_backend
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.ops.latent_attention import latent_attention, latent_attention_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "5" if INTERPRETED else "25"))
# The interpreter is too slow to look for the smallest case that fails.
PHASES = [phase for phase in Phase if phase != Phase.shrink or not INTERPRETED]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["out", "query", "key", "value", "affinity"]
# batch, heads, receivers, senders, head_dim, dimensions of the affinities (0 for none)
SHAPES = {
    "one of each": (1, 1, 1, 1, 16, 2),
    "affinities of an image": (2, 2, 17, 64, 24, 3),
    "shared affinities": (3, 1, 5, 70, 32, 2),
    "no affinities": (1, 2, 9, 65, 16, 0),
    "many senders": (1, 2, 3, 320, 64, 3),
    "many receivers": (1, 1, 320, 17, 16, 3),
    "a thousand senders": (1, 1, 17, 1000, 16, 2),
    "wide heads": (1, 1, 7, 20, 100, 3),
}
PUBLISHED = {
    "tiny propagator": (128, 6, 256, 320, 64, 3),
    "tiny propagator, shared affinities": (128, 6, 256, 320, 64, 2),
    "tiny read-out": (128, 6, 64, 320, 64, 2),
    "imagenet propagator": (32, 8, 768, 960, 64, 3),
    "pruned": (32, 8, 100, 292, 64, 3),
    "uneven": (2, 3, 1000, 1001, 64, 3),
    "wide heads": (2, 3, 320, 960, 128, 2),
    "narrow heads": (2, 3, 320, 960, 20, 3),
    "no affinities": (2, 4, 320, 1000, 64, 0),
}

pytestmark = needs_triton


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_run_in_the_interpreter():
    run_in_the_interpreter(__file__, at_least=len(SHAPES) + 20)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Large tiles, for the interpreter's time goes into their number; and bfloat16 as a GPU does it."""
    if not INTERPRETED:
        yield
        return
    from m2mkd_fast.kernels import latent_attention as kernels

    with as_a_gpu_does(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TILES", dict.fromkeys(kernels._TILES, kernels._TILES[True, True, False]))
        yield


@pytest.fixture
def small_tiles(device, monkeypatch) -> None:
    """Several tiles on both sides, and several sums of images, at sizes that the interpreter can do."""
    from m2mkd_fast.kernels import latent_attention as kernels

    tiles = {name: kernels.Tile(16, 16, 1 + (name in ("forward", "receivers")), 1, 2) for name in KERNELS}
    monkeypatch.setattr(kernels, "_TILES", dict.fromkeys(kernels._TILES, tiles))
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)


def random_tensors(
    batch: int, heads: int, receivers: int, senders: int, width: int, affinity: int, dtype=torch.float32, device="cpu"
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Query, key and value as views of [B, N, H * D]; log affinities with a third of the edges; a gradient of out.

    The first receiver has no edge, and between the others and the last senders there is none either.
    """
    generator = torch.Generator().manual_seed(batch + 10 * heads + 100 * receivers + 1000 * senders + width)
    tensors = [
        torch.randn(batch, latents, heads, width, generator=generator).to(device, dtype).transpose(1, 2)
        for latents in (receivers, senders, senders, receivers)
    ]
    if affinity == 0:
        return tensors[:3], None, tensors[3]
    shape = (batch, receivers, senders)[-affinity:]
    log_affinity = torch.randn(shape, generator=generator) - 1
    log_affinity[torch.rand(shape, generator=generator) < 2 / 3] = -math.inf
    if receivers > 1:
        log_affinity[..., 0, :] = -math.inf
    log_affinity[..., senders - senders // 4 :] = -math.inf
    return tensors[:3], log_affinity.to(device), tensors[3]


def on_triton(
    tensors: list[Tensor], log_affinity: Tensor | None, grad_out: Tensor, skip_empty_tiles: bool = False
) -> list[Tensor]:
    """Messages and all gradients of the kernels."""
    from m2mkd_fast.kernels import latent_attention as kernels

    out, logsumexp = kernels.forward(*tensors, log_affinity, skip_empty_tiles)
    gradients = kernels.backward(grad_out, *tensors, log_affinity, out, logsumexp, True, skip_empty_tiles)
    return [out, *gradients[: 3 if log_affinity is None else 4]]


def on_reference(tensors: list[Tensor], log_affinity: Tensor | None, grad_out: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, log_affinity) if tensor is not None]
    out = latent_attention_reference(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


def in_double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding may do to a number: a few times in float32, once, at the end, in a half precision."""
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype == torch.float32 else eps / 2


def assert_as_exact_as_pytorch(
    tensors: list[Tensor],
    log_affinity: Tensor | None,
    grad_out: Tensor,
    skip_empty_tiles: bool = False,
    vanishing: float = torch.finfo(torch.float32).eps,
) -> None:
    """At most twice (messages) or three times (gradients) PyTorch's error at this precision, plus what rounding may do.

    On small tensors PyTorch's largest error can be much below that by luck; and where a receiver has one edge,
    gradients are differences of sums of products over a head, which are equal where nothing is rounded. ``vanishing``
    is what these products are rounded to.
    """
    found = on_triton(tensors, log_affinity, grad_out, skip_empty_tiles)
    same = on_reference(tensors, log_affinity, grad_out)
    *double, double_grad = in_double(*tensors, log_affinity, grad_out)
    exact = on_reference(double[:3], double[3], double_grad)
    for name, ours, theirs, truth in zip(NAMES, found, same, exact, strict=False):
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == truth.shape, name
        assert ours.isfinite().all(), name
        # Gradients of float32 affinities go over messages in half precision: that is their error where senders are few.
        rounding = max(rounding_of(ours.dtype), 2 * rounding_of(tensors[0].dtype) if name == "affinity" else 0)
        error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
        limit = (2 if name == "out" else 3) * allowed + rounding * truth.abs().max()
        limit += 4 * vanishing * tensors[0].shape[-1] ** 0.5
        assert error <= limit, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_error_is_pytorchs(shape, device):
    assert_as_exact_as_pytorch(*random_tensors(*shape, device=device))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ["affinities of an image", "no affinities", "shared affinities"])
def test_error_is_pytorchs_in_half_precision(shape, dtype, device):
    assert_as_exact_as_pytorch(*random_tensors(*SHAPES[shape], dtype, device))


@pytest.mark.parametrize("skip", [False, True], ids=["all tiles", "tiles with edges"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 2, 20, 40, 16, 3), torch.float32), ((3, 1, 17, 20, 8, 2), torch.bfloat16)],
    ids=["two heads", "one head, shared affinities"],
)
def test_error_is_pytorchs_with_many_tiles(shape, dtype, skip, device, small_tiles):
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, device), skip)


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [False, True], ids=["all tiles", "tiles with edges"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_error_is_pytorchs_at_full_size(shape, dtype, skip):
    if dtype == torch.float32:
        shape = (min(shape[0], 8), *shape[1:])
    assert_as_exact_as_pytorch(*random_tensors(*shape, dtype, "cuda"), skip)


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None, phases=PHASES)
def test_latent_attention_triton_fuzz(data, device_of_fuzz):
    largest = 70 if INTERPRETED else 200
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    receivers, senders = data.draw(st.integers(1, largest)), data.draw(st.integers(1, largest))
    shape = (batch, heads, receivers, senders, data.draw(st.integers(1, 40)), data.draw(st.sampled_from([0, 2, 3])))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors, log_affinity, grad_out = random_tensors(*shape, dtype, device_of_fuzz)
    if log_affinity is not None and data.draw(st.booleans()):
        log_affinity = log_affinity.to(data.draw(st.sampled_from(DTYPES)))
    # So small that PyTorch's error is zero, or luck.
    vanishing = torch.finfo(dtype).eps
    assert_as_exact_as_pytorch(tensors, log_affinity, grad_out, data.draw(st.booleans()), vanishing)


@pytest.fixture(scope="session", params=DEVICES)
def device_of_fuzz(request: pytest.FixtureRequest) -> str:
    return request.param


def test_logsumexp(device):
    from m2mkd_fast.kernels import latent_attention as kernels

    (query, key, value), log_affinity, _ = random_tensors(1, 2, 5, 70, 16, 3, device=device)
    _, found = kernels.forward(query, key, value, log_affinity, False)
    expected = (query @ key.mT / 4 + log_affinity.unsqueeze(1)).logsumexp(-1)
    assert found.dtype == torch.float32
    assert (expected[..., 0] == -math.inf).all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("skip", [False, True])
def test_receivers_without_edges_get_zeros(skip, device):
    tensors, log_affinity, grad_out = random_tensors(2, 2, 6, 9, 16, 3, device=device)
    for cut in (log_affinity, torch.full_like(log_affinity, -math.inf)):
        out, grad_query, grad_key, grad_value, grad_affinity = on_triton(tensors, cut, grad_out, skip)
        empty = (cut == -math.inf).all(-1)[:, None].expand(2, 2, 6)
        assert empty.any()
        assert (out[empty] == 0).all()
        assert (grad_query[empty] == 0).all()
        assert (grad_affinity[cut == -math.inf] == 0).all()
        heard = (cut != -math.inf).any(-2)[:, None].expand(2, 2, 9)
        assert (grad_key[~heard] == 0).all()
        assert (grad_value[~heard] == 0).all()
    assert empty.all()


def test_skipped_tiles_change_no_bit(device, small_tiles):
    tensors, log_affinity, grad_out = random_tensors(1, 2, 20, 40, 16, 2, device=device)
    log_affinity[:, 16:32] = -math.inf
    full, skipped = (on_triton(tensors, log_affinity, grad_out, skip) for skip in (False, True))
    for name, ours, theirs in zip(NAMES, skipped, full, strict=True):
        if INTERPRETED:
            assert torch.equal(ours, theirs), name
        else:  # two programs for the compiler, which may contract products and sums differently
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_is_not_skipped(device):
    tensors, log_affinity, grad_out = random_tensors(1, 2, 6, 9, 16, 2, device=device)
    log_affinity[:] = -math.inf
    log_affinity[2, 3] = math.nan
    out, grad_query, *_ = on_triton(tensors, log_affinity, grad_out, True)
    for found in (out, grad_query):
        rows = found.isnan().all(-1)
        assert rows[:, :, 2].all()
        assert not rows[:, :, [0, 1, 3, 4, 5]].any()


def test_large_scores(device):
    """Exponentials of scores of a thousand are infinite; those of their differences are not.

    Not in float32: a sum of exponentials is kept as its logarithm, and that of a thousand is rounded by 3e-5.
    """
    (query, key, value), log_affinity, grad_out = random_tensors(1, 2, 5, 70, 16, 3, torch.float16, device)
    for shift in (-500, 500):
        assert_as_exact_as_pytorch([100 * query, key, value], log_affinity + shift, grad_out)


def test_repeats_bit_for_bit(device, small_tiles):
    arguments = random_tensors(3, 2, 5, 20, 16, 2, torch.bfloat16, device)
    first = on_triton(*arguments)
    for _ in range(1 if INTERPRETED else 50):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(on_triton(*arguments), first, strict=True))


@pytest.mark.gpu
def test_repeats_bit_for_bit_at_full_size():
    for shape in ("tiny propagator", "tiny propagator, shared affinities"):
        arguments = random_tensors(*PUBLISHED[shape], torch.bfloat16, "cuda")
        first = on_triton(*arguments)
        for _ in range(20):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(on_triton(*arguments), first, strict=True))


def test_strides(device):
    (query, key, value), log_affinity, grad_out = random_tensors(2, 2, 5, 9, 16, 2, device=device)
    expected = on_triton([query, key, value], log_affinity, grad_out)
    for tensor in expected[:4]:
        assert tensor.transpose(1, 2).is_contiguous()  # [B, N, H, D] in memory
    packed = torch.cat([key, value], dim=-1)
    spread = [query.contiguous(), packed[..., :16], packed[..., 16:]]
    turned = grad_out.mT.contiguous().mT  # the last dimension is not contiguous
    repeated = log_affinity.repeat_interleave(2, -1)[:, ::2]
    for affinity in (repeated, log_affinity.expand(2, -1, -1)):
        found = on_triton(spread, affinity, turned)
        for name, ours, theirs in zip(NAMES[:4], found, expected, strict=False):
            assert torch.equal(ours, theirs), name
        assert found[4].shape == affinity.shape
        torch.testing.assert_close(found[4] if affinity.dim() == 2 else found[4].sum(0), expected[4])
    ones = torch.ones((), device=device).expand_as(grad_out)
    for ours, theirs in zip(
        on_triton(spread, log_affinity, ones), on_triton(spread, log_affinity, ones.contiguous()), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_affinities_in_half_precision(dtype, device):
    tensors, log_affinity, grad_out = random_tensors(2, 1, 5, 9, 16, 2, device=device)
    log_affinity = log_affinity.to(dtype)
    found = on_triton(tensors, log_affinity, grad_out)
    expected = on_triton(tensors, log_affinity.float(), grad_out)
    assert found[4].dtype == dtype
    torch.testing.assert_close(found[4].float(), expected[4], rtol=2 * rounding_of(dtype), atol=1e-7)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[:4], expected, strict=False))


def test_gradient_of_affinities_is_computed_on_demand(device, monkeypatch):
    from m2mkd_fast.kernels import latent_attention as kernels

    tensors, log_affinity, grad_out = random_tensors(1, 2, 5, 9, 16, 2, device=device)
    expected = on_triton(tensors, log_affinity, grad_out)
    out, logsumexp = kernels.forward(*tensors, log_affinity, False)
    monkeypatch.setattr(kernels, "affinity_kernel", None)
    *found, none = kernels.backward(grad_out, *tensors, log_affinity, out, logsumexp, False, False)
    assert none.numel() == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected[1:], strict=False))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 16, 2), (2, 2, 0, 4, 16, 3), (2, 2, 3, 0, 16, 2), (2, 0, 3, 4, 16, 3)])
def test_nothing_to_compute(shape, device):
    tensors, log_affinity, grad_out = random_tensors(*shape, device=device)
    found = on_triton(tensors, log_affinity, grad_out)
    for name, tensor, like in zip(NAMES, found, [grad_out, *tensors, log_affinity], strict=True):
        assert tensor.shape == like.shape, name
        assert (tensor == 0).all(), name


def differentiated(function: Callable, leaves: list[Tensor], grad_out: Tensor, **options: Any) -> list[Tensor]:
    """What a function of tensors gives, and its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in leaves]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def test_operator_is_these_kernels(device):
    for affinity in (0, 3):
        tensors, log_affinity, grad_out = random_tensors(1, 2, 5, 9, 16, affinity, device=device)
        leaves = tensors if log_affinity is None else [*tensors, log_affinity]
        with use_backend(latent_attention="triton"):
            found = differentiated(latent_attention, leaves, grad_out, skip_empty_tiles=True)
        for ours, theirs in zip(found, on_triton(tensors, log_affinity, grad_out, True), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("affinity", [0, 2, 3])
def test_private_ops_are_sound(affinity, device):
    (query, key, value), log_affinity, grad_out = random_tensors(1, 2, 3, 5, 16, affinity, device=device)
    ops = torch.ops.m2mkd_fast
    arguments = (query, key, value, log_affinity)
    torch.library.opcheck(ops._latent_attention_triton_forward.default, (*arguments, False))
    results = ops._latent_attention_triton_forward(*arguments, False)
    need = log_affinity is not None
    torch.library.opcheck(ops._latent_attention_triton_backward.default, (grad_out, *arguments, *results, need, False))


def test_second_derivatives(device):
    tensors, log_affinity, grad_out = random_tensors(1, 2, 3, 5, 16, 2, device=device)

    def second(backend: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, log_affinity, grad_out)]
        with use_backend(latent_attention=backend):
            out = latent_attention(*leaves[:4])
        first = torch.autograd.grad(out, leaves[:4], leaves[4], create_graph=True)
        return list(torch.autograd.grad(sum(one.square().sum() for one in first), leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("cuda", "inductor")


def check_compiled(device: str, compiler: str) -> None:
    def messages(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor) -> Tensor:
        return latent_attention(2 * query, key, value, log_affinity).sin()

    torch._dynamo.reset()
    tensors, log_affinity, grad_out = random_tensors(1, 2, 3, 5, 16, 3, device=device)
    leaves = [*tensors, log_affinity]
    with use_backend(latent_attention="triton"):
        compiled = differentiated(torch.compile(messages, fullgraph=True, backend=compiler), leaves, grad_out)
        expected = differentiated(messages, leaves, grad_out)
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_agree_with_the_reference(device):
    torch.manual_seed(0)
    layer = LatentAttention(12, 5, num_heads=2, head_dim=16, layer_scale_initial_value=1.0).to(device)
    states, codes, signatures = (torch.randn(shape, device=device) for shape in ((2, 6, 12), (6, 5), (6, 4)))

    def results(backend: str) -> list[Tensor]:
        with use_backend("reference", latent_attention=backend):
            out = layer(states[:, :4], codes[:4], signatures[:4], states, codes, signatures)
        return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    for ours, theirs in zip(results("triton"), results("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_blocks_are_no_larger_than_the_receivers():
    from m2mkd_fast.kernels import latent_attention as kernels

    assert kernels.tiles_of(torch.bfloat16, 64, True, 65, 8)["forward"] == (128, 64, 2, 8, 2)
    assert kernels.tiles_of(torch.bfloat16, 64, True, 64, 8)["forward"] == (64, 64, 2, 4, 2)
    assert kernels.tiles_of(torch.bfloat16, 64, True, 1, 3)["forward"] == (64, 64, 1, 4, 2)
    assert kernels.images_of(128, 256, 320, kernels.Tile(128, 64, 1, 8, 2)) == 1
    assert kernels.images_of(1024, 256, 320, kernels.Tile(128, 64, 1, 8, 2)) == 16


KERNELS = ("forward", "receivers", "senders", "affinity")
ELEMENT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}
# What a program may take: 227 KiB on sm_90; 99 KiB fits all others from sm_80 on.
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}


@in_another_process
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_spills(architecture, kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tiny, imagenet, half = (128, 6, 256, 320, 64), (32, 8, 768, 960, 64), torch.bfloat16
    cases = [(half, tiny, {}), (torch.float16, imagenet, {}), (half, imagenet, {"skip": True})]
    cases += [(half, (128, 6, 64, 320, 64), {"shared": True}), (half, (32, 8, 100, 291, 64), {})]
    cases += [(half, (1, 1, 1, 1, 64), {}), (half, imagenet, {"affinity": half, "images": 4, "shared": True})]
    cases += [(torch.float32, tiny, {}), (torch.float32, (2, 3, 1000, 1001, 64), {"skip": True})]
    cases += [(half, (2, 3, 320, 960, 128), {}), (torch.float32, (2, 3, 320, 960, 128), {})]
    if kernel != "affinity":
        cases.append((half, imagenet, {"affinity": None}))
    for dtype, shape, options in cases:
        used = resource_usage(kernel, dtype, *shape, architecture=architecture, folder=tmp_path, **options)
        assert used["STACK"] == used["LOCAL"] == 0, (dtype, shape, options, used)
        assert used["SHARED"] <= SHARED_MEMORY[architecture], (dtype, shape, options, used)
    # The bytes that a misaligned row of 20 numbers costs are spilled in one kernel at most.
    used = resource_usage(kernel, half, 128, 6, 256, 320, 20, architecture=architecture, folder=tmp_path)
    assert used["STACK"] <= (32 if kernel == "affinity" else 0), used


def resource_usage(
    name: str,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    receivers: int,
    senders: int,
    width: int,
    *,
    architecture: int,
    folder: Path,
    affinity: torch.dtype | None = torch.float32,
    shared: bool = False,
    images: int = 1,
    skip: bool = False,
) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory of a kernel, compiled as a call would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from m2mkd_fast.kernels import latent_attention as kernels

    kernel = getattr(kernels, f"{name}_kernel")
    tile = kernels.tiles_of(dtype, width, architecture == 90, receivers, heads)[name]
    constants: dict[str, Any] = kernels._sizes(width, tile, senders, skip)
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages")}
    constants |= {
        "SENDER_TILES": triton.cdiv(senders, tile.senders),
        "RECEIVER_TILES": triton.cdiv(receivers, tile.receivers),
        "HEADS": heads if name == "affinity" else tile.heads,
        "HAS_AFFINITY": affinity is not None,
        "IMAGES": images,
    }
    numbers = {"batch": batch, "heads": heads, "receivers": receivers, "senders": senders}
    numbers |= {"affinity_image": 0 if shared else receivers * senders, "affinity_row": senders}
    lengths = {"query": receivers, "grad_out": receivers, "out": receivers, "key": senders, "value": senders}
    for tensor, length in lengths.items():
        strides = {"image": length * heads * width, "head": width, "row": heads * width}
        numbers |= {f"{tensor}_{part}": stride for part, stride in strides.items()}
    constants |= {number: 1 for number, value in numbers.items() if value == 1}
    constants = {constant: value for constant, value in constants.items() if constant in kernel.arg_names}
    types = dict.fromkeys(("logsumexp", "delta", "grad_affinity"), "*fp32") | {"scale": "fp32"}
    types |= {"affinity": f"*{ELEMENT[affinity]}"} | dict.fromkeys(numbers, "i32")
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument, f"*{ELEMENT[dtype]}")
        for argument in kernel.arg_names
    }
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or (argument in numbers and numbers[argument] % 16 == 0)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    assert len(found) == 3, text
    # Triton asks for shared memory at launch, so the binary does not say.
    return {**found, "SHARED": compiled.metadata.shared}
