"""Regularisers beyond the golden numbers: edge cases and errors."""

from __future__ import annotations

import itertools

import pytest
import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.nac.regularizers import (
    SignatureHingeRepulsion,
    StochasticBlockModelRegularization,
    block_graphon,
    signature_hinge_repulsion,
    stochastic_block_model_loss,
)
from m2mkd_fast.models.registry import create_model


def test_repulsion_pushes_close_pairs_alone() -> None:
    signatures = torch.tensor([[1.0, 0.0], [1.0, 0.3], [-1.0, 0.0]], requires_grad=True)
    signature_hinge_repulsion(signatures, hinge=0.4).backward()
    assert (signatures.grad[:2] != 0).any(dim=1).all()
    assert (signatures.grad[2] == 0).all()
    with torch.no_grad():
        moved = signatures - 0.1 * signatures.grad
    assert signature_hinge_repulsion(moved, hinge=0.4) < signature_hinge_repulsion(signatures, hinge=0.4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_repulsion_without_close_pairs_is_zero(reduction: str) -> None:
    signatures = torch.eye(3, requires_grad=True)
    loss = signature_hinge_repulsion(signatures, 0.4, reduction)
    loss.backward()
    assert loss == 0
    assert (signatures.grad == 0).all()


def test_graphon_has_blocks_of_one_size() -> None:
    graphon = block_graphon(2, 0.9, 0.1, like=torch.empty(4, 4))
    assert torch.equal(graphon, torch.tensor([[9, 9, 1, 1], [9, 9, 1, 1], [1, 1, 9, 9], [1, 1, 9, 9]]) / 10)
    with pytest.raises(M2MKDError, match="5 latents do not divide into 2 clusters"):
        block_graphon(2, 0.9, 0.1, like=torch.empty(5, 5))


def test_rows_are_matched_at_least_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    link = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    graphon = block_graphon(2, 0.9, 0.1, like=link)
    least = min((link[list(order)] - graphon).square().mean() for order in itertools.permutations(range(4)))
    torch.testing.assert_close(stochastic_block_model_loss(link, graphon), least)
    torch.testing.assert_close(stochastic_block_model_loss(link[[2, 0, 3, 1]], graphon), least)


def test_clip_silences_small_differences() -> None:
    graphon = block_graphon(2, 0.9, 0.1, like=torch.empty(4, 4))
    link = (graphon + 0.01).requires_grad_()
    loss = stochastic_block_model_loss(link, graphon, clip=0.01)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(0.01))
    assert (link.grad == 0).all()


def test_one_fixed_kernel_counts_once() -> None:
    losses = []
    for learnable in (True, False):
        torch.manual_seed(0)
        kernel = {"kernel_kwargs": {"learnable_bandwidth": learnable}}
        options = {"propagator_kwargs": {"latent_attention_kwargs": kernel}}
        circuit = create_model("nac_micro.planted", latent_graph_kwargs=options)
        losses.append(circuit.regularization_loss())
    torch.testing.assert_close(losses[0], 2 * losses[1])


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match="reduction 'median'"):
        signature_hinge_repulsion(torch.eye(3), 0.4, "median")
    with pytest.raises(M2MKDError, match="leaves no graph"):
        StochasticBlockModelRegularization(
            regularize_input_latents=False, regularize_mediator_latents=False, regularize_output_latents=False
        )
    options = {"propagator_kwargs": {"latent_attention_kwargs": {"kernel_type": None}}}
    circuit = create_model("nac_micro.planted", latent_graph_kwargs=options, fit_signatures=False)
    with pytest.raises(M2MKDError, match="no kernels to regularise"):
        circuit.regularization_loss()
    assert SignatureHingeRepulsion(0.4)(circuit.graph).isfinite(), "needs no kernel"
