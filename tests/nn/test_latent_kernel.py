from __future__ import annotations

import math

import pytest
import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.latent_kernel import DotProductKernel
from m2mkd_fast.ops.latent_affinity import latent_affinity, signature_distance

SIGNATURES = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
DISTANCE = signature_distance(SIGNATURES, SIGNATURES)


def test_bandwidth_is_a_parameter_or_a_buffer() -> None:
    assert [name for name, _ in DotProductKernel().named_parameters()] == ["bandwidth"]
    fixed = DotProductKernel(learnable_bandwidth=False, initial_bandwidth=0.5)
    assert [name for name, _ in fixed.named_parameters()] == []
    assert fixed.state_dict() == {"bandwidth": torch.tensor(0.5)}


def test_shapes_and_modes() -> None:
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True)
    assert kernel(DISTANCE[:, :3], batch_size=2).shape == (2, 5, 3)
    kernel.eval()
    plain = kernel(DISTANCE[:, :3], batch_size=2)
    assert torch.equal(plain, latent_affinity(DISTANCE[:, :3], torch.tensor(1.0), truncation=0.9))
    kernel.evaluation = "threshold"
    assert set(kernel(DISTANCE, batch_size=2).unique().tolist()) == {-math.inf, 0.0}
    kernel.evaluation = "sample"
    assert kernel(DISTANCE, batch_size=2).shape == (2, 5, 5)


def test_samples_follow_torchs_generator() -> None:
    kernel = DotProductKernel(stochastic_kernel=True, stochastic_sampling_temperature=0.5)
    torch.manual_seed(3)
    first, second = kernel(DISTANCE, batch_size=2), kernel(DISTANCE, batch_size=2)
    torch.manual_seed(3)
    assert torch.equal(first, kernel(DISTANCE, batch_size=2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_the_dtype_of_the_signatures_does_not_change_the_noise() -> None:
    kernel = DotProductKernel(stochastic_kernel=True)
    torch.manual_seed(3)
    single = kernel(DISTANCE, batch_size=2)
    torch.manual_seed(3)
    torch.testing.assert_close(kernel.double()(DISTANCE.double(), batch_size=2).float(), single, rtol=0, atol=1e-4)


def test_truncated_edges_are_absent_or_leak() -> None:
    far = DISTANCE > 0.9
    for leaky in (False, True):
        kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True, leaky_truncation=leaky)
        out = kernel(DISTANCE, batch_size=40)
        assert out[:, ~far].isfinite().all()
        assert (out[:, far] == -math.inf).all().item() is not leaky
        assert out.exp()[:, far].mean() < 1e-4
        # What is not sampled does not leak.
        assert (kernel.eval()(DISTANCE, batch_size=40)[far] == -math.inf).all()


def test_normalized_affinities_sum_to_one() -> None:
    for kernel in (DotProductKernel(truncation=0.9), DotProductKernel(truncation=0.9, stochastic_kernel=True)):
        sums = kernel(DISTANCE, batch_size=2, normalize=True).exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_bandwidths_that_are_not_positive_are_refused(bandwidth: float) -> None:
    with pytest.raises(M2MKDError, match=f"initial_bandwidth is {bandwidth}; it must be above zero"):
        DotProductKernel(initial_bandwidth=bandwidth)
    kernel = DotProductKernel()
    with torch.no_grad():
        kernel.bandwidth.fill_(bandwidth)
    with pytest.raises(M2MKDError, match="lower the learning rate of the bandwidths"):
        kernel(DISTANCE, batch_size=2)


@pytest.mark.parametrize("option", ["stochastic_eval_behaviour", "truncation_implementation"])
def test_unknown_names_are_refused(option: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown {option} 'nothing'"):
        DotProductKernel(**{option: "nothing"})


def test_a_step_is_one_graph() -> None:
    torch._dynamo.reset()
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True)
    out = torch.compile(kernel, fullgraph=True, backend="aot_eager")(DISTANCE, batch_size=3)
    assert out.shape == (3, 5, 5)
    out[out.isfinite()].sum().backward()
    assert kernel.bandwidth.grad.isfinite()


def test_link_probabilities_are_never_sampled() -> None:
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True).train()
    links = kernel.link_probability(SIGNATURES)
    assert torch.equal(links, kernel.eval()(DISTANCE, batch_size=1).exp())
    torch.testing.assert_close(links.diagonal(), torch.ones(5))
    assert (links == 0).any()
