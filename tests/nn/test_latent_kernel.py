from __future__ import annotations

import math

import torch

from m2mkd_fast.nn.latent_kernel import DotProductKernel
from m2mkd_fast.ops.latent_affinity import latent_affinity

SIGNATURES = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_bandwidth_is_a_parameter_or_a_buffer() -> None:
    assert [name for name, _ in DotProductKernel().named_parameters()] == ["bandwidth"]
    fixed = DotProductKernel(learnable_bandwidth=False, initial_bandwidth=0.5)
    assert [name for name, _ in fixed.named_parameters()] == []
    assert fixed.state_dict() == {"bandwidth": torch.tensor(0.5)}


def test_shapes_and_modes() -> None:
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True)
    assert kernel(SIGNATURES, SIGNATURES[:3], batch_size=2).shape == (2, 5, 3)
    kernel.eval()
    plain = kernel(SIGNATURES, SIGNATURES[:3], batch_size=2)
    assert torch.equal(plain, latent_affinity(SIGNATURES, SIGNATURES[:3], torch.tensor(1.0), truncation=0.9))
    kernel.evaluation = "threshold"
    assert set(kernel(SIGNATURES, SIGNATURES, batch_size=2).unique().tolist()) == {-math.inf, 0.0}
    kernel.evaluation = "sample"
    assert kernel(SIGNATURES, SIGNATURES, batch_size=2).shape == (2, 5, 5)


def test_link_probabilities_are_never_sampled() -> None:
    kernel = DotProductKernel(truncation=0.9, stochastic_kernel=True).train()
    links = kernel.link_probability(SIGNATURES)
    assert torch.equal(links, kernel.eval()(SIGNATURES, SIGNATURES, batch_size=1).exp())
    torch.testing.assert_close(links.diagonal(), torch.ones(5))
    assert (links == 0).any()
