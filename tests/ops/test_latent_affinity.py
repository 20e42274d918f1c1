"""Log affinities: every backend against golden samples, float64, finite differences and torch's own distribution."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from affinity_cases import CASES, arguments_of, assert_as_exact_as_reference, everything, random_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import BackendFallbackWarning, use_backend
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.ops import latent_affinity as op_module
from m2mkd_fast.ops.latent_affinity import (
    latent_affinity,
    latent_affinity_reference,
    signature_distance,
)
from m2mkd_fast.ops.philox import philox_uniform

FUZZ_EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "100"))
needs_cpu_kernel = pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
sampled_case = pytest.mark.parametrize("case", [case for case in CASES.values() if "temperature" in case], ids=str)


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_cpu_kernel)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(latent_affinity=request.param):
        yield request.param


@pytest.fixture
def kernel() -> Iterator[None]:
    if why_missing("_C") is not None:
        pytest.skip(str(why_missing("_C")))
    with use_backend(latent_affinity="cpu"):
        yield


def check_golden_samples(path: Path, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(path)
    for case, arguments in metadata.items():
        if f"{case}/out" not in tensors:
            continue
        receivers = tensors[f"{case}/receiver_signatures"].requires_grad_()
        senders = tensors[f"{case}/sender_signatures"].requires_grad_()
        # A parameter is made in single precision before the model becomes double.
        bandwidth = torch.tensor(arguments["bandwidth"], dtype=torch.float32).double().requires_grad_()
        out = latent_affinity(
            signature_distance(receivers, senders),
            bandwidth,
            truncation=arguments["truncation"],
            uniform=tensors[f"{case}/uniform"],
            temperature=arguments["temperature"],
            leaky=True,
            normalize=arguments["normalize_dim"] == -1,
        )
        assert_golden(out, tensors[f"{case}/out"], f"{case}/out")
        out.backward(tensors[f"{case}/grad_out"])
        assert_golden(receivers.grad, tensors[f"{case}/grad_receiver"], f"{case}/grad_receiver")
        assert_golden(senders.grad, tensors[f"{case}/grad_sender"], f"{case}/grad_sender")
        assert_golden(bandwidth.grad, tensors[f"{case}/grad_bandwidth"], f"{case}/grad_bandwidth")


@pytest.mark.golden_case("nac_sampled_affinity*")
def test_golden_samples(golden_case, read_golden, assert_golden, backend) -> None:
    metadata, tensors = read_golden(golden_case)
    assert sum(f"{case}/out" in tensors for case in metadata) == sum(key.endswith("/out") for key in tensors) > 0
    check_golden_samples(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("nac_sampled_affinity*")
@pytest.mark.parametrize("suffix", ["out", "grad_receiver", "grad_sender", "grad_bandwidth"])
def test_golden_samples_check_notices_one_wrong_number(
    golden_case, suffix, altered_golden, read_golden, assert_golden, backend
) -> None:
    metadata, _ = read_golden(golden_case)
    name = f"{sorted(case for case in metadata if case != 'dtype')[-1]}/{suffix}"
    with pytest.raises(AssertionError, match=name):
        check_golden_samples(altered_golden(golden_case, name), read_golden, assert_golden)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_error_is_the_references(case, dtype, backend) -> None:
    for number, shape in enumerate([(1, 1), (5, 7), (17, 64), (6, 1000), (64, 320)]):
        distance = random_distance(*shape, number=number, dtype=dtype)
        bandwidth = torch.tensor(0.7, dtype=dtype)
        assert_as_exact_as_reference(distance, bandwidth, **arguments_of(case, distance, number=number))


@pytest.mark.parametrize("bandwidth", [1e-3, 0.05, 30.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.3])
def test_error_is_the_references_where_probabilities_are_clamped(bandwidth, temperature, backend) -> None:
    distance = random_distance(17, 64, dtype=torch.float32)
    case = {"truncation": 1.1, "temperature": temperature, "seed": True}
    assert_as_exact_as_reference(distance, torch.tensor(bandwidth), **arguments_of(case, distance, samples=5))


@given(data=st.data())
@settings(max_examples=FUZZ_EXAMPLES, deadline=None)
def test_latent_affinity_fuzz(data) -> None:
    receivers, senders, samples = (data.draw(st.integers(0, high)) for high in (9, 40, 5))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    distance = random_distance(receivers, senders, number=data.draw(st.integers(0, 2**16)), dtype=dtype)
    case = {
        "truncation": data.draw(st.sampled_from([None, 0.9, 1.1, 0.0])),
        "truncation_implementation": data.draw(st.sampled_from(["direct", "masked"])),
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 0.25, 3.0])),
        "leaky": data.draw(st.booleans()),
        data.draw(st.sampled_from(["seed", "uniform"])): True,
    }
    bandwidth = torch.tensor(data.draw(st.floats(0.05, 5.0)), dtype=dtype)
    arguments = arguments_of(case, distance, samples, number=data.draw(st.integers(-(2**63), 2**63 - 1)) % 2**31)
    for backend in ["reference"] + ["cpu"] * (why_missing("_C") is None):
        with use_backend(latent_affinity=backend):
            assert_as_exact_as_reference(distance, bandwidth, **arguments)


@every_case
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_those_of_finite_differences(case, normalize, backend) -> None:
    if "threshold" in case:
        pytest.skip("has no gradient")
    distance = random_distance(4, 5).requires_grad_()
    arguments = arguments_of({**case, "temperature": max(case.get("temperature", 1.0), 0.5)}, distance, samples=2)
    if "uniform" in arguments:
        arguments["uniform"] = 0.1 + 0.8 * arguments["uniform"]

    def finite(*inputs: Tensor) -> Tensor:
        out = latent_affinity(*inputs, normalize=normalize, **arguments)
        return out.masked_fill(out == -math.inf, 0.0)

    inputs = (distance, torch.tensor(0.7, dtype=torch.float64, requires_grad=True))
    with torch.no_grad():
        distance.fill_diagonal_(0.2)  # a probability of 1 is clamped: no gradient on one side
    assert torch.autograd.gradcheck(finite, inputs)
    if case.get("leaky"):
        return  # steps of the second difference are as large as the leak
    assert torch.autograd.gradgradcheck(finite, inputs)


def test_gradient_of_one_input_alone(backend) -> None:
    distance, bandwidth = random_distance(4, 5), torch.tensor(0.7, dtype=torch.float64)
    arguments = arguments_of(CASES["seed"], distance)
    _, both_distance, both_bandwidth = everything(latent_affinity, distance, bandwidth, **arguments)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    for create_graph in (False, True):
        leaf = distance.clone().requires_grad_()
        out = latent_affinity(leaf, bandwidth, **arguments)
        (only,) = torch.autograd.grad(out, leaf, grad, create_graph=create_graph)
        torch.testing.assert_close(only, both_distance, rtol=1e-12, atol=1e-14)
        leaf = bandwidth.clone().requires_grad_()
        out = latent_affinity(distance, leaf, **arguments)
        (only,) = torch.autograd.grad(out, leaf, grad, create_graph=create_graph)
        torch.testing.assert_close(only, both_bandwidth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("implementation", ["direct", "masked"])
def test_truncation_cuts_far_edges_and_their_gradients(implementation, backend) -> None:
    distance = random_distance(4, 30).requires_grad_()
    bandwidth = torch.tensor(0.7, dtype=torch.float64)
    far = distance > 0.9
    assert far.any()
    assert (~far).any()
    out = latent_affinity(distance, bandwidth, truncation=0.9, truncation_implementation=implementation)
    torch.testing.assert_close(out[~far], (-distance / 0.7)[~far])
    assert (out[far] == -math.inf).all()
    for leaky in (False, True):
        arguments = arguments_of({**CASES["seed"], "leaky": leaky}, distance)
        sampled = latent_affinity(distance, bandwidth, **arguments)
        assert sampled[:, ~far].isfinite().all()
        assert (sampled[:, far] == -math.inf).all() if not leaky else (sampled[:, far] < -5.0).all()
        for values in (out, sampled):
            # Even a gradient that is not a number does not come over an edge that is not there.
            (gradient,) = torch.autograd.grad(
                values, distance, torch.where(far, math.nan, 1.0).expand_as(values), retain_graph=True
            )
            assert (gradient[far] == 0).all()
            assert (gradient[~far & (distance > 0)] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("truncation", [1.0, 0.9])
def test_truncation_implementations_differ_at_the_boundary_alone(truncation, dtype, backend) -> None:
    at = torch.tensor(truncation, dtype=dtype)
    distance = torch.stack([at, torch.nextafter(at, at * 0), torch.nextafter(at, at * 2)])[None]
    for arguments in ({}, arguments_of({"uniform": True}, distance)):
        for implementation, kept in (("direct", [True, True, False]), ("masked", [False, True, False])):
            out = latent_affinity(
                distance, at * 0 + 1, truncation=truncation, truncation_implementation=implementation, **arguments
            )
            assert (out.flatten(0, -2) > -math.inf)[0].tolist() == kept


def test_rows_without_edges_stay_without_when_normalized(backend) -> None:
    receivers = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)  # a zero signature is at distance 1 of all
    senders = torch.tensor([[1.0, 0.1], [1.0, -0.2]])
    distance = signature_distance(receivers, senders)
    assert distance[1].tolist() == [1.0, 1.0]
    for arguments in ({}, arguments_of({"seed": True}, distance)):
        receivers.grad = None
        out = latent_affinity(distance, torch.tensor(1.0), truncation=0.9, normalize=True, **arguments)
        assert (out[..., 1, :] == -math.inf).all()
        torch.testing.assert_close(out[..., 0, :].logsumexp(-1), torch.zeros(out.shape[:-2]))
        out[..., 0, :].square().sum().backward(retain_graph=True)
        assert receivers.grad.isfinite().all()


def test_all_edges_can_be_absent(backend) -> None:
    distance = torch.ones(3, 5, requires_grad=True)
    bandwidth = torch.tensor(0.5, requires_grad=True)
    for arguments in ({}, arguments_of({"seed": True}, distance), arguments_of({"uniform": True}, distance)):
        out = latent_affinity(distance, bandwidth, truncation=0.9, **arguments)
        assert (out == -math.inf).all()
        for gradient in torch.autograd.grad(out, (distance, bandwidth), torch.ones_like(out)):
            assert (gradient == 0).all()


def test_threshold_makes_edges_binary(backend) -> None:
    distance, bandwidth = random_distance(6, 30).requires_grad_(), torch.tensor(0.7, requires_grad=True)
    probability = latent_affinity(distance, bandwidth, truncation=0.4).exp()
    out = latent_affinity(distance, bandwidth, truncation=0.4, threshold=0.5)
    assert torch.equal(out == 0.0, probability >= 0.5)
    assert torch.equal(out == -math.inf, probability < 0.5)
    assert not out.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("probability", [0.02, 0.3, 0.9])
def test_samples_have_the_distribution_of_torch(probability, temperature, backend) -> None:
    torch.manual_seed(0)
    draws = 20000
    bandwidth = torch.tensor(-1.0 / math.log(probability))  # senders at distance 1 are linked with this probability
    out = latent_affinity(
        torch.ones(1, 1), bandwidth, samples=draws, seed=torch.tensor(2**40 + 3), temperature=temperature
    )
    distribution = torch.distributions.RelaxedBernoulli(torch.tensor(temperature), torch.tensor(probability))
    ours, theirs = out.exp().flatten().sort().values, distribution.sample((draws,)).sort().values
    # Two-sample Kolmogorov-Smirnov distance, bound for p = 0.001.
    levels = torch.cat([ours, theirs])
    ours, theirs = (torch.searchsorted(sample, levels, right=True) / draws for sample in (ours, theirs))
    assert (ours - theirs).abs().max() < 1.95 * math.sqrt(2 / draws)


def test_an_edge_is_on_as_often_as_its_probability_says(backend) -> None:
    """A relaxed variable is above 1/2 exactly where the Bernoulli variable it relaxes is 1."""
    distance = torch.linspace(0.05, 3.0, 40).view(4, 10)
    draws = 4000
    out = latent_affinity(distance, torch.tensor(1.0), samples=draws, seed=torch.tensor(7), temperature=0.5)
    on, probability = (out > math.log(0.5)).double().mean(0), (-distance).double().exp()
    deviation = (on - probability).abs() / (probability * (1 - probability) / draws).sqrt()
    assert deviation.max() < 4.5
    # Edges do not know of each other, nor images.
    on = (out > math.log(0.5)).double().flatten(1)
    correlation = torch.corrcoef(on.T) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(draws)
    assert torch.corrcoef(
        torch.stack([on[1:].flatten(), on[:-1].flatten()]) - (-distance).exp().flatten().repeat(draws - 1)
    )[0, 1].abs() < 5 / math.sqrt(on.numel())


def test_what_leaks_over_truncated_edges_is_as_documented() -> None:
    distance = random_distance(64, 320, dtype=torch.float32)
    arguments = arguments_of(CASES["seed, leaky"], distance, samples=64)
    weight = latent_affinity(distance, torch.tensor(0.7), **arguments).exp()
    leak = torch.where(distance > 0.9, weight, 0.0).sum(-1) / weight.sum(-1)
    assert 1e-8 < leak.mean() < 1e-5
    assert (leak > 1e-3).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 3, 64), (2, 1, 1003), (5, 17, 30), (2, 256, 320)], ids=str)
def test_noise_has_the_same_bits_everywhere(shape, dtype, backend) -> None:
    samples, *edges = shape
    distance, bandwidth = random_distance(*edges, dtype=dtype), torch.tensor(0.7, dtype=dtype)
    for number in (0, 1, -1, 2**32, 2**63 - 1, -(2**63), 123456789123456789):
        seed = torch.tensor(number)
        uniform = philox_uniform(seed, shape, dtype)
        assert ((uniform > 0) & (uniform <= 1)).all()
        for case in ({"truncation": 0.9, "temperature": 0.5}, {"temperature": 0.7}):
            by_seed = everything(latent_affinity, distance, bandwidth, samples=samples, seed=seed, **case)
            given_noise = everything(latent_affinity, distance, bandwidth, uniform=uniform, **case)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_seed, given_noise, strict=True))


@sampled_case
def test_the_seed_makes_the_samples(case, backend) -> None:
    distance, bandwidth = random_distance(6, 10), torch.tensor(0.7, dtype=torch.float64)
    first, again = (latent_affinity(distance, bandwidth, **arguments_of(case, distance)) for _ in range(2))
    other = latent_affinity(distance, bandwidth, **arguments_of(case, distance, number=6))
    assert torch.equal(first, again)
    kept = first.isfinite()
    assert torch.equal(kept, other.isfinite())
    assert not torch.isclose(first[kept], other[kept]).all()
    assert not torch.isclose(first[0], first[1])[kept[0]].all()


def test_nothing_as_large_as_the_samples_is_kept_for_the_backward(kernel) -> None:
    sizes = []
    distance = random_distance(6, 10).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda kept: kept
    ):
        latent_affinity(distance, torch.tensor(0.7, requires_grad=True).double(), samples=50, seed=torch.tensor(0))
    assert max(sizes) == distance.numel()


@every_case
def test_results_do_not_depend_on_threads_or_repetition(case, kernel) -> None:
    distance = random_distance(300, 320, dtype=torch.float32)
    arguments = arguments_of(case, distance, samples=4)
    threads, runs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4, 4):
            torch.set_num_threads(number)
            runs.append(everything(latent_affinity, distance, torch.tensor(0.7), **arguments))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(tensor, first) for tensor, first in zip(run, runs[0], strict=True))


@every_case
def test_tensors_that_are_not_contiguous(case, backend) -> None:
    distance, bandwidth = random_distance(6, 10), torch.tensor(0.7, dtype=torch.float64)
    arguments = arguments_of(case, distance)
    expected = everything(latent_affinity, distance, bandwidth, **arguments)
    if "uniform" in arguments:
        arguments["uniform"] = arguments["uniform"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for strided in (distance.T.contiguous().T, distance.repeat_interleave(2, -1)[:, ::2]):
        assert not strided.is_contiguous()
        found = everything(latent_affinity, strided, bandwidth, **arguments)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    if "threshold" in case:
        return
    leaf = distance.requires_grad_()
    out = latent_affinity(leaf, bandwidth, **arguments)
    row = torch.arange(10.0, dtype=torch.float64)
    (expanded,) = torch.autograd.grad(out, leaf, row.expand_as(out), retain_graph=True)
    (dense,) = torch.autograd.grad(out, leaf, row.expand_as(out).contiguous())
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@every_case
def test_no_edges(case, shape, backend) -> None:
    distance = torch.zeros(shape)
    arguments = arguments_of(case, distance)
    found = everything(latent_affinity, distance, torch.tensor(0.7), **arguments)
    assert found[0].shape == (*([3] if "seed" in arguments or "uniform" in arguments else []), *shape)
    for gradient, size in zip(found[1:], (shape, ()), strict=False):
        assert gradient.shape == size
        assert (gradient == 0).all()


def test_no_samples(backend) -> None:
    distance = random_distance(4, 6)
    for arguments in ({"samples": 0, "seed": torch.tensor(1)}, {"uniform": torch.zeros(0, 4, 6)}):
        out, *gradients = everything(latent_affinity, distance, torch.tensor(0.7), **arguments)
        assert out.shape == (0, 4, 6)
        assert all((gradient == 0).all() for gradient in gradients)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_that_are_not_numbers_are_seen(case, dtype, backend) -> None:
    distance = random_distance(3, 20, dtype=dtype)
    distance[1, 2] = distance[2, 19] = math.nan
    out = latent_affinity(distance, torch.tensor(0.7), **arguments_of(case, distance))
    assert torch.equal(out.isnan(), distance.isnan().expand_as(out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, backend) -> None:
    distance = random_distance(4, 6).to(dtype).requires_grad_()
    bandwidth = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    arguments = arguments_of(CASES["seed"], distance)
    out = latent_affinity(distance, bandwidth, **arguments)
    assert torch.equal(out, latent_affinity(distance.float(), bandwidth.float(), **arguments))
    assert out.dtype == torch.float32
    gradients = torch.autograd.grad(out, (distance, bandwidth), torch.ones_like(out))
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]


def test_signature_distance_is_in_single_precision_at_least() -> None:
    generator = torch.Generator().manual_seed(0)
    receivers, senders = (torch.randn(size, 8, generator=generator) for size in (4, 6))
    expected = 1.0 - torch.cosine_similarity(receivers[:, None], senders, dim=-1)
    distance = signature_distance(receivers, senders)
    torch.testing.assert_close(distance, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(signature_distance(receivers, senders), distance)
    assert signature_distance(receivers.bfloat16(), senders.bfloat16()).dtype == torch.float32
    assert signature_distance(receivers.double(), senders.double()).dtype == torch.float64


@every_case
def test_private_ops_are_sound(case, kernel) -> None:
    distance, bandwidth = random_distance(5, 7, dtype=torch.float32), torch.tensor(0.7)
    arguments = arguments_of(case, distance)
    seed, uniform, temperature = arguments.get("seed"), arguments.get("uniform"), arguments.get("temperature", 1.0)
    cut = (arguments.get("truncation"), "truncation_implementation" in arguments)
    samples = 3 if uniform is not None else arguments.get("samples")
    forward = (*cut, samples, seed, uniform, temperature, arguments.get("threshold"), "leaky" in case)
    torch.library.opcheck(torch.ops.m2mkd_fast._latent_affinity_forward.default, (distance, bandwidth, *forward))
    grad = torch.ops.m2mkd_fast._latent_affinity_forward(distance, bandwidth, *forward).clamp(-1.0)
    backward = (grad, distance, bandwidth, *cut, seed, uniform, temperature)
    torch.library.opcheck(torch.ops.m2mkd_fast._latent_affinity_backward.default, backward)


COMPILED = ["truncated", "threshold", "seed", "uniform"]


@pytest.mark.parametrize("case", [CASES[name] for name in COMPILED], ids=COMPILED)
def test_compiles_as_one_graph(case, kernel) -> None:
    check_compiled(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[name] for name in COMPILED], ids=COMPILED)
def test_reference_compiles_as_one_graph(case) -> None:
    with use_backend(latent_affinity="reference"):
        check_compiled(case, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[name] for name in COMPILED], ids=COMPILED)
def test_compiles_with_inductor(case, kernel) -> None:
    check_compiled(case, "inductor")


def check_compiled(case: dict[str, Any], compiler: str) -> None:
    torch._dynamo.reset()
    distance = random_distance(6, 10, dtype=torch.float32)

    def loss(distance: Tensor, bandwidth: Tensor, **arguments: Any) -> Tensor:
        return latent_affinity(2 * distance, bandwidth, normalize=True, **arguments).clamp(min=-9.0)

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for samples in (3, 5):  # the second time as a symbol
        arguments = arguments_of(case, distance, samples)
        found = everything(compiled, distance, torch.tensor(0.7), **arguments)
        for ours, theirs in zip(found, everything(loss, distance, torch.tensor(0.7), **arguments), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"distance": torch.zeros(2, 3, 4)}, r"distance has shape \(2, 3, 4\); expected \[receivers, senders\]"),
    ({"distance": torch.zeros(3, 4, dtype=torch.int64)}, "distance has dtype torch.int64"),
    ({"bandwidth": torch.ones(2)}, r"bandwidth has shape \(2,\); expected one number"),
    ({"bandwidth": torch.tensor(1)}, "bandwidth has dtype torch.int64"),
    ({"bandwidth": torch.tensor(0.0)}, "bandwidth is 0.0; it must be above zero"),
    ({"bandwidth": torch.tensor(-0.5)}, "bandwidth is -0.5; it must be above zero"),
    ({"bandwidth": torch.tensor(math.nan)}, "bandwidth is nan; it must be above zero"),
    ({"bandwidth": torch.ones((), device="meta")}, "bandwidth is on meta, distance on cpu"),
    ({"truncation": math.nan}, "truncation is nan"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be above zero"),
    ({"threshold": 0.0}, "threshold is 0.0; it must be above zero"),
    ({"samples": 2}, "samples and seed belong together"),
    ({"seed": torch.tensor(1)}, "samples and seed belong together"),
    ({"samples": -1, "seed": torch.tensor(1)}, "samples is -1; it must not be negative"),
    ({"samples": 2, "seed": torch.tensor(1.0)}, "seed has shape .*torch.float32"),
    ({"samples": 2, "seed": torch.tensor([1, 2])}, r"seed has shape \(2,\)"),
    ({"samples": 2, "seed": torch.tensor(1), "uniform": torch.rand(2, 3, 4)}, "two sources of noise"),
    ({"uniform": torch.rand(2, 3, 4), "threshold": 0.5}, "threshold is for edges that are not sampled"),
    ({"uniform": torch.rand(3, 4)}, r"uniform has shape \(3, 4\); expected \[samples, 3, 4\]"),
    ({"uniform": torch.ones(2, 3, 4, dtype=torch.int64)}, "uniform is torch.int64"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_arguments_are_named(change, message, backend) -> None:
    arguments = {"distance": torch.zeros(3, 4), "bandwidth": torch.tensor(1.0), **change}
    with pytest.raises(M2MKDError, match=message):
        latent_affinity(**arguments)


def test_unknown_truncation_implementation_is_named(backend) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'direct'"):
        latent_affinity(torch.zeros(3, 4), torch.tensor(1.0), truncation_implementation="dirct")


def test_bandwidths_that_are_not_positive_cannot_pass_unseen(kernel) -> None:
    distance = random_distance(3, 4, dtype=torch.float32)
    for bandwidth in (torch.tensor(0.0), torch.tensor(-1.0)):
        with pytest.raises(RuntimeError, match="bandwidth is .*; it must be above zero"):
            torch.ops.m2mkd_fast._latent_affinity_forward(
                distance, bandwidth, None, False, None, None, None, 1.0, None, False
            )
        # Where it cannot be looked at, as on a GPU:
        for arguments in ({}, {"threshold": 0.5}, {"uniform": torch.rand(2, 3, 4)}):
            assert latent_affinity_reference(distance, bandwidth, **arguments).isnan().all()


def test_without_the_compiled_module_the_reference_runs_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(op_module, "why_missing", lambda name: f"{name} was not built")
    distance = random_distance(3, 4)
    with pytest.warns(BackendFallbackWarning, match="latent_affinity runs its plain PyTorch reference"):
        out = latent_affinity(distance, torch.tensor(1.0))
    assert torch.equal(out, -distance)
    with use_backend("cpu"), pytest.raises(M2MKDError, match="cannot run latent_affinity: _C was not built"):
        latent_affinity(distance, torch.tensor(1.0))
