"""Graph presets, and signatures whose truncated distances reproduce a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import networkx
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.options import build

# The value says whether the generator draws random numbers.
GENERATORS: dict[str, tuple[Callable[..., networkx.Graph], bool]] = {
    "barabasi-albert": (networkx.barabasi_albert_graph, True),
    "erdos-renyi": (networkx.erdos_renyi_graph, True),
    "planted-partition": (networkx.planted_partition_graph, True),
    "ring-of-cliques": (networkx.ring_of_cliques, False),
    "watts-strogatz": (networkx.watts_strogatz_graph, True),
}

# The published graphs are fitted at this distance although the kernels cut at 0.9: a margin that the noise of training
# uses up, and the reason for some edges that are not in the graph.
FIT_TRUNCATION = 0.8
FIT_STEPS = 1000
FIT_LEARNING_RATE = 1e-3


def preset_adjacency(preset: str, num_latents: int, options: Mapping[str, Any] | None = None) -> Tensor:
    """Symmetric 0/1 matrix ``[num_latents, num_latents]`` of a graph, drawn with torch's random numbers.

    Args:
        preset: a name in `GENERATORS`.
        num_latents: number of nodes.
        options: arguments of the networkx generator of that name.

    Raises:
        UnknownNameError: no such preset, or no such option of the generator.
        M2MKDError: the options do not make `num_latents` nodes, or not a graph.
    """
    if preset not in GENERATORS:
        raise UnknownNameError("graph_preset", preset, [*GENERATORS, "complete"])
    generator, random = GENERATORS[preset]
    seed = {"seed": int(torch.randint(2**31, (), device="cpu"))} if random else {}
    try:
        graph = build(generator, "graph_generator_kwargs", options, **seed)
    except networkx.NetworkXException as error:
        raise M2MKDError(
            f"graph_generator_kwargs {dict(options or {})} do not make a {preset} graph: {error}"
        ) from error
    if graph.number_of_nodes() != num_latents:
        raise M2MKDError(
            f"the {preset} graph of {dict(options or {})} has {graph.number_of_nodes()} nodes, but there are "
            f"{num_latents} latents; change graph_generator_kwargs or the number of latents"
        )
    return torch.from_numpy(networkx.to_numpy_array(graph)).to(torch.float32)


def fit_signatures(
    adjacency: Tensor,
    signature_dim: int,
    truncation: float = FIT_TRUNCATION,
    steps: int = FIT_STEPS,
    learning_rate: float = FIT_LEARNING_RATE,
) -> Tensor:
    r"""Signatures ``[U, signature_dim]`` close to their neighbours in a graph and far from all others.

    From orthogonal signatures, Adam minimises the mean over pairs of

    .. math::
        \max(d_{uv}, t) \text{ for neighbours}, \qquad \max(-d_{uv}, -t) \text{ for others},

    d being the cosine distance, so signatures move just as far as a cut at t needs. The gradient is written out below:
    it is a sparse sign pattern times the signatures, which makes a step two matrix products.
    """
    size = adjacency.shape[0]
    neighbour = adjacency.to(torch.bool)
    # One thread: the result does not depend on their number, and products this small only wait for a second one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        signatures = torch.nn.init.orthogonal_(torch.empty(size, signature_dim, device="cpu"))
        _descend(signatures, neighbour, truncation, steps, learning_rate)
    finally:
        torch.set_num_threads(threads)
    return signatures


def _descend(signatures: Tensor, neighbour: Tensor, truncation: float, steps: int, learning_rate: float) -> None:
    """Move `signatures` in place; see :func:`fit_signatures`."""
    optimizer = torch.optim.Adam([signatures], lr=learning_rate, foreach=False)
    for _ in range(steps):
        norm = signatures.norm(dim=-1, keepdim=True)
        unit = F.normalize(signatures, dim=-1)
        distance = 1.0 - unit @ unit.T
        # +1 for neighbours too far, -1 for others too close.
        sign = (neighbour & (distance > truncation)).float() - (~neighbour & (distance < truncation)).float()
        gradient = (-2.0 / sign.numel()) * (sign @ unit)
        signatures.grad = (gradient - (gradient * unit).sum(dim=-1, keepdim=True) * unit) / norm
        optimizer.step()
    signatures.grad = None


def initial_signatures(
    num_latents: int,
    signature_dim: int,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    fit: bool = True,
) -> Tensor:
    """Signatures at the start: normal without a preset, equal for ``"complete"``, else fitted to the preset's graph.

    ``fit=False`` skips the fit and takes normal signatures, for a model whose tensors are loaded afterwards.
    """
    if preset == "complete":
        return F.one_hot(torch.zeros(num_latents, dtype=torch.long), signature_dim).float()
    if preset is None or not fit:
        return torch.randn(num_latents, signature_dim)
    return fit_signatures(preset_adjacency(preset, num_latents, options), signature_dim)
