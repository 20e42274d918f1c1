"""Attention with affinities: every backend against float64, rows without edges, order of sums and of memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import BackendFallbackWarning, use_backend
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NeuralAttentiveCircuit
from m2mkd_fast.modules.state import load_strict
from m2mkd_fast.ops import latent_attention as op_module
from m2mkd_fast.ops.latent_attention import latent_attention, latent_attention_reference

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "100"))
NAMES = ("out", "query", "key", "value", "log_affinity")
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))
on_cpu = pytest.param("cpu", marks=needs_cpu_kernel)
on_gpu = pytest.param("triton", marks=pytest.mark.gpu)

# Of the edges: few, for lists of edges; nearly all, for tiles; all, without affinities.
DENSITIES = (0.22, 0.8, None)
every_density = pytest.mark.parametrize("density", DENSITIES)


@pytest.fixture(params=["reference", on_cpu, on_gpu])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of the inputs, with the backend forced."""
    with use_backend(latent_attention=request.param):
        yield "cuda" if request.param == "triton" else "cpu"


@pytest.fixture(params=[on_cpu, on_gpu])
def kernel_device(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(latent_attention=request.param):
        yield "cuda" if request.param == "triton" else "cpu"


@pytest.fixture
def cpu_kernel() -> Iterator[None]:
    if why_missing("_C") is not None:
        pytest.skip(str(why_missing("_C")))
    with use_backend(latent_attention="cpu"):
        yield


def inputs_of(
    batch: int,
    heads: int,
    receivers: int,
    senders: int,
    head_dim: int,
    density: float | None = 0.22,
    *,
    sampled: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    magnitude: float = 1.0,
    seed: int = 0,
) -> list[Tensor | None]:
    """query, key, value, log_affinity and the gradient of the output; the layer's views of [B, N, H * D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def states(latents: int, factor: float = 1.0) -> Tensor:
        tensor = (factor * normal(batch, latents, heads * head_dim)).to(device, dtype)
        return tensor.unflatten(-1, (heads, head_dim)).transpose(1, 2)

    tensors = [states(receivers, magnitude), states(senders), states(senders)]
    log_affinity = None
    if density is not None:
        shape = (batch, receivers, senders) if sampled else (receivers, senders)
        there = torch.rand(shape, generator=generator) < density
        log_affinity = (magnitude * normal(*shape)).masked_fill(~there, -math.inf).to(device)
        log_affinity = log_affinity.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return [*tensors, log_affinity, states(receivers)]


def everything(inputs: list[Tensor | None], function=latent_attention) -> dict[str, Tensor]:
    """The output and every gradient."""
    *tensors, grad_out = inputs
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    present = [leaf for leaf in leaves if leaf is not None]
    return dict(zip(NAMES, [out.detach(), *torch.autograd.grad(out, present, grad_out)], strict=False))


def in_float64(inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.cpu().double() for tensor in inputs]


def assert_as_exact_as_pytorch(inputs: list[Tensor | None]) -> None:
    """Errors against float64 are at most twice (output) and three times (gradients) those of PyTorch itself.

    Inputs in float64 themselves have nothing more exact beside them: errors are a few roundings of the largest number.
    """
    ours, theirs = everything(inputs), everything(inputs, latent_attention_reference)
    exact = everything(in_float64(inputs), latent_attention_reference)
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == truth.shape, name
        error, their_error = ((found[name].cpu().double() - truth).abs() for found in (ours, theirs))
        assert not error.isnan().any(), name
        if truth.numel() > 0:
            # What a single rounding may do is allowed where PyTorch happens to make no error.
            roundings = 50 if ours[name].dtype == torch.float64 else 2
            rounding = roundings * torch.finfo(ours[name].dtype).eps * truth.abs().max()
            limit = (2 if name == "out" else 3) * their_error.max() + rounding
            assert error.max() <= limit, (name, error.max(), their_error.max())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_is_scaled_dot_product_attention_with_a_bias(device):
    query, key, value, affinity, _ = inputs_of(2, 3, 4, 5, 16, 1.0, device=device)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=affinity)
    torch.testing.assert_close(latent_attention(query, key, value, affinity), expected)
    torch.testing.assert_close(latent_attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


@pytest.mark.golden_case("nac_masked_truncation*", "nac_no_truncation*", "nac_threshold_eval*")
def test_golden_circuits(golden_case, read_golden, assert_golden, cpu_kernel, monkeypatch):
    monkeypatch.setattr(op_module, "latent_attention_reference", None)
    metadata, tensors = read_golden(golden_case)
    circuit = NeuralAttentiveCircuit.from_config(metadata["config"], fit_signatures=False).double().eval()
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    load_strict(circuit, state, "the golden file")
    images = tensors["in/x"].requires_grad_()
    logits = circuit(images)
    assert_golden(logits, tensors["out/y"], "out/y")
    (grad,) = torch.autograd.grad(logits, images, tensors["in/grad_y"])
    assert_golden(grad, tensors["grad_in/x"], "grad_in/x")


@pytest.mark.parametrize("sampled", [False, True])
@every_density
@pytest.mark.parametrize("head_dim", [1, 4, 7, 16, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_head_dims(dtype, head_dim, density, sampled, cpu_kernel):
    if density is None and sampled:
        pytest.skip("no affinities to sample")
    assert_as_exact_as_pytorch(inputs_of(2, 3, 37, 50, head_dim, density, sampled=sampled, dtype=dtype))


@pytest.mark.parametrize("sampled", [False, True])
@every_density
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(dtype, density, sampled, kernel_device):
    inputs = inputs_of(2, 3, 37, 50, 16, density, sampled=sampled, dtype=dtype, device=kernel_device)
    assert_as_exact_as_pytorch(inputs)


@every_density
@pytest.mark.parametrize(
    ("receivers", "senders"), [(1, 1), (1, 17), (17, 1), (17, 64), (320, 64), (64, 320), (256, 320), (960, 1000)]
)
def test_sizes(receivers, senders, density, kernel_device):
    assert_as_exact_as_pytorch(inputs_of(1, 2, receivers, senders, 16, density, device=kernel_device))


@every_density
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)])
def test_empty(shape, density, device):
    inputs = inputs_of(*shape, 16, density, device=device)
    found = everything(inputs)
    for name, tensor in zip(("out", *NAMES[1:]), (inputs[0], *inputs[:-1]), strict=True):
        if tensor is not None:
            assert found[name].shape == tensor.shape
            assert found[name].count_nonzero() == 0


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_receivers_without_edges_hear_nothing(density, sampled, device):
    inputs = inputs_of(2, 3, 9, 12, 16, density, sampled=sampled, device=device)
    inputs[3][..., [1, 8], :] = -math.inf
    found = everything(inputs)
    assert (found["out"][:, :, [1, 8]] == 0).all()
    assert (found["query"][:, :, [1, 8]] == 0).all()
    assert (found["log_affinity"][..., [1, 8], :] == 0).all()
    assert_as_exact_as_pytorch(inputs)


def test_no_edge_at_all(device):
    inputs = inputs_of(2, 2, 5, 6, 16, 0.0, device=device)
    for tensor in everything(inputs).values():
        assert tensor.count_nonzero() == 0


@pytest.mark.parametrize("others", [0.0, 0.9])
def test_one_sender_alone_is_heard_exactly(others, device):
    inputs = inputs_of(2, 2, 6, 8, 16, others, device=device)
    inputs[3][2] = -math.inf
    inputs[3][2, 5] = 3.7
    found = everything(inputs)
    torch.testing.assert_close(found["out"][:, :, 2], inputs[2][:, :, 5], rtol=1e-6, atol=1e-6)
    assert found["query"][:, :, 2].abs().max() <= 1e-6
    assert found["log_affinity"][2].abs().max() <= 1e-5
    assert_as_exact_as_pytorch(inputs)


@every_density
def test_large_scores_and_affinities(density, kernel_device):
    inputs = inputs_of(2, 2, 33, 40, 16, density, magnitude=80.0, device=kernel_device)
    assert_as_exact_as_pytorch(inputs)


@pytest.mark.parametrize("density", [0.22, 0.8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_visible(bad, density, cpu_kernel):
    inputs = inputs_of(1, 2, 20, 30, 16, density)
    inputs[3][4] = -math.inf
    inputs[3][4, 7] = bad
    out = latent_attention(*inputs[:4])
    assert out[:, :, 4].isnan().all()
    others = [number for number in range(20) if number != 4]
    assert out[:, :, others].isfinite().all()


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
def test_latent_attention_fuzz(data):
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    receivers, senders, head_dim = (data.draw(st.integers(1, most)) for most in (40, 60, 20))
    density = data.draw(st.none() | st.floats(0, 1))
    inputs = inputs_of(
        batch,
        heads,
        receivers,
        senders,
        head_dim,
        density,
        sampled=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float64])),
        magnitude=data.draw(st.sampled_from([0.0, 1.0, 10.0])),
        seed=data.draw(st.integers(0, 2**16)),
    )
    found, exact = everything(inputs), everything(in_float64(inputs), latent_attention_reference)
    tolerance = 2e-5 if inputs[0].dtype == torch.float32 else 1e-13
    for name, truth in exact.items():
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(found[name].double(), truth, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("sampled", [False, True])
@every_density
def test_results_do_not_depend_on_threads_or_repetition(density, sampled, cpu_kernel):
    if density is None and sampled:
        pytest.skip("no affinities to sample")
    inputs, threads, runs = inputs_of(5, 2, 200, 230, 16, density, sampled=sampled), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 8, 8):
            torch.set_num_threads(number)
            runs.append(everything(inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_same(run, runs[0])


@pytest.mark.parametrize("density", [0.05, 0.7])
def test_many_images_are_worked_on_in_several_waves(density, cpu_kernel):
    inputs = inputs_of(18, 1, 960, 1008, 2, density, sampled=True)
    together = everything(inputs)
    for image in (0, 9, 16, 17):
        alone = everything([tensor[image : image + 1] for tensor in inputs])
        assert_same(alone, {name: tensor[image : image + 1] for name, tensor in together.items()})
    shared = [*inputs[:3], inputs[3][0], inputs[4]]
    of_images = [
        everything([*(tensor[image : image + 1] for tensor in shared[:3]), shared[3], shared[4][image : image + 1]])
        for image in range(18)
    ]
    expected = torch.stack([of_image["log_affinity"] for of_image in of_images]).sum(dim=0)
    torch.testing.assert_close(everything(shared)["log_affinity"], expected, rtol=1e-5, atol=1e-5)


def test_images_of_one_batch_may_have_few_and_many_edges(cpu_kernel):
    few, many = (inputs_of(2, 2, 30, 40, 16, density, sampled=True, seed=1) for density in (0.2, 0.9))
    mixed = [torch.cat(pair) for pair in zip(few, many, strict=True)]
    found = everything(mixed)
    for part, inputs in ((slice(0, 2), few), (slice(2, 4), many)):
        assert_same(everything(inputs), {name: tensor[part] for name, tensor in found.items()})


@every_density
def test_inputs_that_are_not_contiguous(density, kernel_device):
    views = inputs_of(2, 3, 9, 12, 16, density, sampled=True, device=kernel_device)
    expected = everything([None if tensor is None else tensor.contiguous() for tensor in views])
    assert not views[0].is_contiguous()
    assert_same(everything(views), expected)
    strided = [None if tensor is None else tensor.repeat_interleave(2, dim=-1)[..., ::2] for tensor in views]
    assert strided[0].stride(-1) == 2
    assert_same(everything(strided), expected)


def test_expanded_inputs_and_gradients(kernel_device):
    query, key, value, affinity, _ = inputs_of(2, 3, 9, 12, 16, device=kernel_device)
    inputs = [query[:1].expand(4, -1, -1, -1), key[:1, :1].expand(4, 3, -1, -1), value[:1].expand(4, -1, -1, -1)]
    inputs += [affinity[:, :1].expand(-1, 12), query.new_ones(()).expand(4, 3, 9, 16)]
    assert_same(everything(inputs), everything([tensor.contiguous() for tensor in inputs]))


@every_density
def test_heads_are_joined_without_a_copy(density, kernel_device):
    found = everything(inputs_of(2, 3, 9, 12, 16, density, device=kernel_device))
    for name in ("out", "query", "key", "value"):
        assert found[name].transpose(1, 2).is_contiguous(), name


@every_density
def test_each_gradient_alone(density, kernel_device):
    inputs = inputs_of(2, 2, 9, 12, 16, density, device=kernel_device)
    expected = everything(inputs)
    *tensors, grad_out = inputs
    for number, name in enumerate(NAMES[1:]):
        if tensors[number] is None:
            continue
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(number == at)
            for at, tensor in enumerate(tensors)
        ]
        (found,) = torch.autograd.grad(latent_attention(*leaves), leaves[number], grad_out)
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("sampled", [False, True])
@every_density
def test_gradcheck(density, sampled, cpu_kernel):
    *tensors, _ = inputs_of(2, 2, 4, 6, 5, density, sampled=sampled, dtype=torch.float64)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(latent_attention, leaves)


@every_density
def test_second_derivatives(density, cpu_kernel):
    *tensors, _ = inputs_of(1, 2, 3, 4, 3, density, dtype=torch.float64)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradgradcheck(latent_attention, leaves)


@pytest.mark.parametrize(("density", "sampled"), [(0.22, False), (0.8, True), (None, False)])
def test_private_ops_are_sound(density, sampled, cpu_kernel):
    *tensors, grad_out = inputs_of(2, 2, 9, 12, 5, density, sampled=sampled)
    ops = torch.ops.m2mkd_fast
    torch.library.opcheck(ops._latent_attention_forward.default, tensors)
    saved = ops._latent_attention_forward(*tensors)
    for need_affinity in (False, density is not None):
        arguments = (grad_out, *tensors, *saved, need_affinity)
        torch.library.opcheck(ops._latent_attention_backward.default, arguments)


def test_compiles_as_one_graph(device):
    check_compiled(device, "aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor(kernel_device):
    check_compiled(kernel_device, "inductor")


@needs_cpu_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needed", [(0,), (3,), (1, 2), (0, 1, 2, 3)])
def test_compiled_gradients_of_some_inputs(needed, dtype):
    *tensors, grad_out = inputs_of(2, 2, 9, 12, 16, dtype=dtype)

    def gradients(function) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_(number in needed) for number, tensor in enumerate(tensors)]
        return torch.autograd.grad(function(*leaves), [leaves[number] for number in needed], grad_out)

    torch._dynamo.reset()
    compiled = gradients(torch.compile(latent_attention, fullgraph=True, backend="aot_eager"))
    for ours, expected in zip(compiled, gradients(latent_attention), strict=True):
        assert torch.equal(ours, expected)


def check_compiled(device: str, compiler: str) -> None:
    def joined(query: Tensor, key: Tensor, value: Tensor, log_affinity: Tensor) -> Tensor:
        return latent_attention(2 * query, key, value, log_affinity).transpose(1, 2).flatten(2).sin()

    torch._dynamo.reset()
    *tensors, _ = inputs_of(2, 2, 9, 12, 16, device=device)
    inputs = [*tensors, torch.ones(2, 9, 32, device=device)]
    compiled = everything(inputs, torch.compile(joined, fullgraph=True, backend=compiler))
    for name, expected in everything(inputs, joined).items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-5, atol=1e-5)


def test_scale_multiplies_weights_after_the_softmax():
    query, key, value, scale, _ = inputs_of(2, 3, 4, 5, 8, 1.0, dtype=torch.float64)
    weights = (query @ key.mT / math.sqrt(8)).softmax(dim=-1) * scale.exp()
    torch.testing.assert_close(latent_attention(query, key, value, log_scale=scale), weights @ value)


@needs_cpu_kernel
def test_no_kernel_knows_log_scale():
    query, key, value, scale, _ = inputs_of(2, 3, 4, 5, 8)
    with use_backend("cpu"), pytest.raises(M2MKDError, match="cannot run latent_attention: the kernel knows no log_sc"):
        latent_attention(query, key, value, None, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4, 8)}, r"query has shape \(3, 4, 8\); expected \[batch, heads, receivers, head_dim"),
        ({"query": torch.zeros(2, 3, 4, 0)}, "head_dim of at least 1"),
        ({"key": torch.zeros(2, 3, 5, 7)}, r"key has shape \(2, 3, 5, 7\); .* expected \[2, 3, senders, 8\]"),
        ({"key": torch.zeros(2, 1, 5, 8)}, r"key has shape \(2, 1, 5, 8\)"),
        ({"value": torch.zeros(2, 3, 6, 8)}, r"value has shape \(2, 3, 6, 8\), key \(2, 3, 5, 8\)"),
        ({"log_affinity": torch.zeros(5, 4)}, r"log_affinity has shape \(5, 4\); .* \(4, 5\) or \(2, 4, 5\)"),
        ({"log_affinity": torch.zeros(1, 4, 5)}, r"log_affinity has shape \(1, 4, 5\)"),
        ({"log_scale": torch.zeros(4)}, r"log_scale has shape \(4,\)"),
        ({"log_affinity": torch.zeros(4, 5, dtype=torch.bool)}, "log_affinity has dtype torch.bool; expected a float"),
        ({"key": torch.zeros(2, 3, 5, 8).double()}, "torch.float32, torch.float64 and torch.float32; they must be"),
        ({"value": torch.zeros(2, 3, 5, 8, device="meta")}, "value is on meta, query on cpu; move one of them"),
    ],
)
def test_bad_arguments_are_named(change, message):
    tensors = {
        "query": torch.zeros(2, 3, 4, 8),
        "key": torch.zeros(2, 3, 5, 8),
        "value": torch.zeros(2, 3, 5, 8),
        "log_affinity": torch.zeros(4, 5),
        **change,
    }
    with pytest.raises(M2MKDError, match=message):
        latent_attention(**tensors)


def test_forcing_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(op_module, "triton_reason", lambda tensor: None)
    *tensors, _ = inputs_of(1, 1, 2, 3, 8)
    with use_backend("cuda"), pytest.raises(M2MKDError, match="it has none; there are: reference, cpu, triton"):
        latent_attention(*tensors)
    with use_backend("triton"):
        *tensors, _ = inputs_of(1, 1, 2, 3, 160)
        with pytest.raises(M2MKDError, match="heads of 1 to 128 channels, not 160"):
            latent_attention(*tensors)
        *tensors, _ = inputs_of(1, 1, 2, 3, 16, dtype=torch.float64)
        with pytest.raises(M2MKDError, match="float32, bfloat16 and float16, not torch.float64"):
            latent_attention(*tensors)


def test_falling_back_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(op_module, "why_missing", lambda name: f"{name} was left out for this test")
    *tensors, _ = inputs_of(1, 1, 2, 3, 8)
    for _ in range(2):
        latent_attention(*tensors)
    said = [warning for warning in recwarn if warning.category is BackendFallbackWarning]
    assert len(said) == 1
    assert "_C was left out for this test" in str(said[0].message)
    assert said[0].filename == __file__


@needs_cpu_kernel
def test_the_kernel_is_what_runs_by_default(monkeypatch):
    monkeypatch.setattr(op_module, "latent_attention_reference", None)
    *tensors, _ = inputs_of(1, 1, 2, 3, 8)
    assert latent_attention(*tensors).shape == (1, 1, 2, 8)
