"""Log affinities: golden samples, gradients, truncation, precision."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from m2mkd_fast.ops.latent_affinity import latent_affinity, signature_distance


def check_samples(path: Path, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(path)
    for case, arguments in metadata.items():
        if f"{case}/out" not in tensors:
            continue
        receivers = tensors[f"{case}/receiver_signatures"].requires_grad_()
        senders = tensors[f"{case}/sender_signatures"].requires_grad_()
        # A parameter is made in single precision before the model becomes double.
        bandwidth = torch.tensor(arguments["bandwidth"], dtype=torch.float32).double().requires_grad_()
        out = latent_affinity(
            receivers,
            senders,
            bandwidth,
            truncation=arguments["truncation"],
            uniform=tensors[f"{case}/uniform"],
            temperature=arguments["temperature"],
            normalize=arguments["normalize_dim"] == -1,
        )
        assert_golden(out, tensors[f"{case}/out"], f"{case}/out")
        out.backward(tensors[f"{case}/grad_out"])
        assert_golden(receivers.grad, tensors[f"{case}/grad_receiver"], f"{case}/grad_receiver")
        assert_golden(senders.grad, tensors[f"{case}/grad_sender"], f"{case}/grad_sender")
        assert_golden(bandwidth.grad, tensors[f"{case}/grad_bandwidth"], f"{case}/grad_bandwidth")


@pytest.mark.golden_case("nac_sampled_affinity*")
def test_golden_samples(golden_case, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(golden_case)
    assert sum(f"{case}/out" in tensors for case in metadata) == sum(key.endswith("/out") for key in tensors) > 0
    check_samples(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("nac_sampled_affinity*")
@pytest.mark.parametrize("suffix", ["out", "grad_receiver", "grad_sender", "grad_bandwidth"])
def test_golden_samples_check_notices_one_wrong_number(
    golden_case, suffix, altered_golden, read_golden, assert_golden
) -> None:
    metadata, _ = read_golden(golden_case)
    name = f"{sorted(case for case in metadata if case != 'dtype')[-1]}/{suffix}"
    with pytest.raises(AssertionError, match=name):
        check_samples(altered_golden(golden_case, name), read_golden, assert_golden)


def signatures(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    receivers = torch.randn(4, 6, generator=generator, dtype=dtype)
    senders = torch.randn(5, 6, generator=generator, dtype=dtype)
    return receivers.requires_grad_(), senders.requires_grad_(), torch.tensor(0.7, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("truncation", [None, 1.1])
def test_gradients_are_those_of_finite_differences(sampled: bool, normalize: bool, truncation: float | None) -> None:
    uniform = torch.rand(2, 4, 5, dtype=torch.float64) * 0.8 + 0.1 if sampled else None

    def kept(*inputs: torch.Tensor) -> torch.Tensor:
        out = latent_affinity(*inputs, truncation=truncation, uniform=uniform, temperature=0.8, normalize=normalize)
        return out.masked_fill(out == -math.inf, 0.0)

    assert torch.autograd.gradcheck(kept, signatures())


@pytest.mark.parametrize("implementation", ["direct", "masked"])
def test_truncation_cuts_far_edges_and_their_gradients(implementation: str) -> None:
    receivers, senders, bandwidth = signatures()
    distance = signature_distance(receivers, senders)
    out = latent_affinity(receivers, senders, bandwidth, truncation=0.9, truncation_implementation=implementation)
    far = distance > 0.9
    assert far.any()
    assert (~far).any()
    torch.testing.assert_close(out[~far], (-distance / 0.7)[~far])
    assert (out[far] == -math.inf).all()
    (gradient,) = torch.autograd.grad(out, distance_leaf := receivers, torch.where(far, 1.0, 0.0), retain_graph=True)
    assert distance_leaf.shape == gradient.shape
    assert (gradient == 0).all()


def test_truncation_implementations_differ_at_the_boundary_alone() -> None:
    receivers = torch.eye(2, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    direct = latent_affinity(receivers, receivers, one, truncation=1.0)
    masked = latent_affinity(receivers, receivers, one, truncation=1.0, truncation_implementation="masked")
    assert torch.equal(direct, torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=torch.float64))
    assert torch.equal(masked, torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64))


def test_rows_without_edges_stay_without_when_normalized() -> None:
    receivers = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)  # a zero signature is at distance 1 of all
    senders = torch.tensor([[1.0, 0.1], [1.0, -0.2]])
    out = latent_affinity(receivers, senders, torch.tensor(1.0), truncation=0.9, normalize=True)
    assert (out[1] == -math.inf).all()
    torch.testing.assert_close(out[0].logsumexp(0), torch.tensor(0.0))
    out[0].sum().backward()
    assert receivers.grad.isfinite().all()


def test_threshold_makes_edges_binary() -> None:
    receivers, senders, bandwidth = signatures()
    probability = latent_affinity(receivers, senders, bandwidth).exp()
    out = latent_affinity(receivers, senders, bandwidth, threshold=0.5)
    assert torch.equal(out == 0.0, probability >= 0.5)
    assert torch.equal(out == -math.inf, probability < 0.5)


def test_samples_have_the_distribution_of_torch() -> None:
    torch.manual_seed(0)
    probability = 0.3
    receivers = torch.tensor([[1.0, 0.0]])
    bandwidth = torch.tensor(-1.0 / math.log(probability))  # senders at distance 1 are linked with this probability
    draws = 20000
    out = latent_affinity(
        receivers, torch.tensor([[0.0, 1.0]]), bandwidth, uniform=torch.rand(draws, 1, 1), temperature=0.5
    )
    ours = out.exp().flatten().sort().values
    theirs = torch.distributions.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(probability)).sample((draws,))
    # Two-sample Kolmogorov-Smirnov distance, bound for p = 0.001.
    levels = torch.linspace(0, 1, 512)
    ours, theirs = (torch.searchsorted(sample.contiguous(), levels) / draws for sample in (ours, theirs.sort().values))
    assert (ours - theirs).abs().max() < 1.95 * math.sqrt(2 / draws)


def test_half_precision_signatures_are_compared_in_single_precision() -> None:
    receivers, senders, bandwidth = signatures(dtype=torch.float32)
    expected = latent_affinity(receivers, senders, bandwidth, truncation=0.9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(latent_affinity(receivers, senders, bandwidth, truncation=0.9), expected)
    rounded = latent_affinity(receivers.bfloat16(), senders.bfloat16(), bandwidth.bfloat16(), truncation=0.9)
    assert rounded.dtype == torch.float32
