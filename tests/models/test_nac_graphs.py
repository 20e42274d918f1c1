"""Graph presets, and signatures fitted to them."""

from __future__ import annotations

import pytest
import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.nac.graphs import FIT_TRUNCATION, fit_signatures, initial_signatures, preset_adjacency
from m2mkd_fast.models.nac.latents import Latents
from m2mkd_fast.ops.latent_affinity import signature_distance

PRESETS = {
    "barabasi-albert": {"n": 32, "m": 2},
    "erdos-renyi": {"n": 32, "p": 0.1},
    "planted-partition": {"l": 4, "k": 8, "p_in": 0.9, "p_out": 0.2},
    "ring-of-cliques": {"num_cliques": 4, "clique_size": 8},
    "watts-strogatz": {"n": 32, "k": 4, "p": 0.4},
}


def neighbours(signatures: torch.Tensor) -> torch.Tensor:
    return signature_distance(signatures, signatures) < FIT_TRUNCATION


@pytest.mark.parametrize("preset", PRESETS)
def test_adjacency_is_symmetric_and_reproducible(preset: str) -> None:
    torch.manual_seed(0)
    first = preset_adjacency(preset, 32, PRESETS[preset])
    torch.manual_seed(0)
    assert torch.equal(first, preset_adjacency(preset, 32, PRESETS[preset]))
    assert torch.equal(first, first.T)
    assert 0 < first.mean() < 1
    if preset != "ring-of-cliques":
        assert not torch.equal(first, preset_adjacency(preset, 32, PRESETS[preset])), "the next one is another"


@pytest.mark.parametrize("preset", ["ring-of-cliques", "barabasi-albert"])
def test_truncated_distances_are_the_graph(preset: str) -> None:
    torch.manual_seed(0)
    adjacency = preset_adjacency(preset, 32, PRESETS[preset])
    signatures = fit_signatures(adjacency, 24)
    assert torch.equal(neighbours(signatures), (adjacency + torch.eye(32)) > 0)
    assert not signatures.requires_grad


def test_fit_follows_the_gradient_of_the_published_loss() -> None:
    """The hand-written gradient moves signatures as Adam on the loss itself does."""
    torch.manual_seed(0)
    adjacency = preset_adjacency("erdos-renyi", 32, {"n": 32, "p": 0.2})
    torch.manual_seed(1)
    fitted = fit_signatures(adjacency, 16, steps=20)
    torch.manual_seed(1)
    signatures = torch.nn.init.orthogonal_(torch.empty(32, 16)).requires_grad_()
    optimizer = torch.optim.Adam([signatures], lr=1e-3)
    for _ in range(20):
        distance = signature_distance(signatures, signatures)
        near = torch.maximum(distance, torch.tensor(FIT_TRUNCATION))
        far = torch.maximum(-distance, torch.tensor(-FIT_TRUNCATION))
        optimizer.zero_grad()
        torch.where(adjacency == 1, near, far).mean().backward()
        optimizer.step()
    # Adam divides by the gradient's size: entries whose gradient is rounding noise differ.
    assert ((fitted - signatures.detach()).abs() < 1e-5).float().mean() > 0.99


def test_fit_does_not_depend_on_the_number_of_threads() -> None:
    adjacency = preset_adjacency("ring-of-cliques", 32, PRESETS["ring-of-cliques"])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(fit_signatures(adjacency, 24, steps=50))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_complete_graph_has_equal_signatures() -> None:
    assert neighbours(initial_signatures(5, 8, "complete")).all()


def test_fit_can_be_skipped() -> None:
    options = {"graph_preset": "ring-of-cliques", "graph_generator_kwargs": PRESETS["ring-of-cliques"]}
    fitted = Latents(32, 24, 4, **options)
    skipped = Latents(32, 24, 4, **options, fit_signatures=False)
    with torch.device("meta"):
        unmade = Latents(32, 24, 4, **options)
    graph = preset_adjacency("ring-of-cliques", 32, PRESETS["ring-of-cliques"]) + torch.eye(32) > 0
    assert torch.equal(neighbours(fitted.signatures), graph)
    assert not torch.equal(neighbours(skipped.signatures), graph)
    assert unmade.signatures.is_meta
    assert fitted.signatures.shape == skipped.signatures.shape == unmade.signatures.shape == (32, 24)


def test_errors() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'erdos-renyi'"):
        preset_adjacency("erdos-reny", 32, {"n": 32, "p": 0.1})
    with pytest.raises(M2MKDError, match="has 30 nodes, but there are 32 latents"):
        preset_adjacency("erdos-renyi", 32, {"n": 30, "p": 0.1})
    with pytest.raises(M2MKDError, match="'p'"):
        preset_adjacency("erdos-renyi", 32, {"n": 32})
    with pytest.raises(M2MKDError, match="do not make a barabasi-albert graph"):
        preset_adjacency("barabasi-albert", 32, {"n": 32, "m": 40})
