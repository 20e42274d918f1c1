"""Orders of latents in which the learned graph shows its clusters, or fills few tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.spatial.distance import squareform

from m2mkd_fast import _extension
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.links import LayerLinks, layer_links, tile_counts
from m2mkd_fast.models.nac.pruning import with_latents


class OrderedLinks(NamedTuple):
    """The learned graph as one matrix; see :func:`ordered_links`.

    Attributes:
        links: float64 ``[mediators + outputs, inputs + mediators]``, receivers by senders.
        num_inputs: columns of input latents.
        num_mediators: rows, and columns after the inputs', of mediators.
    """

    links: np.ndarray
    num_inputs: int
    num_mediators: int


def cluster_order(weights: np.ndarray) -> np.ndarray:
    """An order of nodes that puts those side by side that are linked strongly: int64 ``[U]``.

    The leaves of average-linkage clustering, in which two clusters are as close as their mean weight is high.
    Deterministic; 10 ms for 768 nodes.

    Args:
        weights: ``[U, U]``, finite; 0 where there is no link. Of the two directions of a link the mean counts.

    Raises:
        M2MKDError: not a square matrix of finite numbers.
    """
    weights = _square(weights).astype(np.float64)
    if not np.isfinite(weights).all():
        raise M2MKDError("weights hold numbers that are not finite; give link probabilities, with 0 for no link")
    if len(weights) < 2:
        return np.arange(len(weights))
    distance = weights.max() - (weights + weights.T) / 2
    return leaves_list(linkage(squareform(distance, checks=False), "average")).astype(np.int64)


def tile_order(edges: np.ndarray, tile: int = 64, weights: np.ndarray | None = None) -> np.ndarray:
    """An order of nodes in which few ``tile x tile`` tiles of the adjacency matrix hold an edge: int64 ``[U]``.

    The best of the present order, :func:`cluster_order` and reverse Cuthill-McKee (both scipy's), and of what the local
    search of ``m2mkd_fast._host.pack_tiles`` makes of each: it swaps nodes as long as that empties tiles. scipy finds
    planted clusters by itself; on other sparse graphs the search leaves down to half of the tiles that scipy leaves.
    Where the compiled module is missing, scipy's orders are all there is. Deterministic.

    Args:
        edges: bool ``[U, U]``, symmetric.
        tile: rows and columns of a tile, 1 to 1024.
        weights: ``[U, U]``, what :func:`cluster_order` starts from; by default the edges.

    Raises:
        M2MKDError: not a symmetric matrix, or a tile of another size.
    """
    edges = _square(edges).astype(bool)
    if not 1 <= tile <= 1024:
        raise M2MKDError(f"tile is {tile}, and tiles of 1 to 1024 rows are possible; kernels use 64")
    if (edges != edges.T).any():
        raise M2MKDError("edges are not symmetric; give edges | edges.T, which has room for both directions")
    starts = [
        np.arange(len(edges)),
        cluster_order(edges if weights is None else weights),
        reverse_cuthill_mckee(csr_array(edges), symmetric_mode=True).astype(np.int64),
    ]
    host, _ = _extension.load("_host")
    if host is not None:
        starts += [host.pack_tiles(edges, order, tile) for order in starts]
    return min(starts, key=lambda order: np.count_nonzero(tile_counts(edges[np.ix_(order, order)], tile, tile)))


def reorder_latents(model: NeuralAttentiveCircuit, tile: int = 64) -> NeuralAttentiveCircuit:
    """A copy of a circuit whose mediators stand in the :func:`tile_order` of its graph.

    Mediators are a set: their order decides nothing, logits change by rounding alone. But where the graph has clusters,
    a kernel that skips empty tiles (see :func:`~m2mkd_fast.models.nac.links.plan_tiles`) has more to skip. An edge that
    any propagator uses in evaluation counts. :func:`~m2mkd_fast.models.nac.links.density_report` says what it brings:
    with the published presets, whose kernels connect a fifth of all pairs at random, nothing.

    Raises:
        M2MKDError: the model is no circuit, or a tile of another size.
    """
    *propagators, _ = layer_links(model)
    edges = np.any([layer.edges[:, layer.num_inputs :] for layer in propagators], axis=0)
    order = tile_order(edges | edges.T, tile, mean_mediator_links(propagators))
    return with_latents(model, mediators=torch.from_numpy(order))


def ordered_links(model: NeuralAttentiveCircuit) -> OrderedLinks:
    """Link probabilities of the whole circuit, for the eye: mediators by cluster, the others beside what they link to.

    Mediators stand in the :func:`cluster_order` of their links, inputs and outputs each by the mean place of the
    mediators they are linked to. Of the propagators the mean is taken, links of inputs among those they send to.

    Raises:
        M2MKDError: the model is no circuit.
    """
    *propagators, read_out = layer_links(model)
    between = mean_mediator_links(propagators)
    order = cluster_order(between)
    heard = [layer.probability[:, : layer.num_inputs] for layer in propagators if layer.num_inputs]
    inputs = torch.stack(heard).mean(dim=0).numpy()[order]
    outputs = read_out.probability.numpy()
    num_inputs, num_mediators = inputs.shape[1], len(order)
    to_outputs = outputs[:, read_out.num_inputs :][:, order]
    from_inputs = outputs[:, : read_out.num_inputs] if read_out.num_inputs else np.zeros((len(outputs), num_inputs))
    columns, rows = _by_mean_place(inputs.T), _by_mean_place(to_outputs)
    links = np.block([[inputs[:, columns], between[np.ix_(order, order)]], [from_inputs[:, columns], to_outputs]])
    links[num_mediators:] = links[num_mediators:][rows]
    return OrderedLinks(links, num_inputs, num_mediators)


def mean_mediator_links(propagators: Sequence[LayerLinks]) -> np.ndarray:
    """Link probability between mediators, the mean over the propagators: ``[U, U]``."""
    links = [layer.probability[:, layer.num_inputs :] for layer in propagators]
    return torch.stack(links).mean(dim=0).numpy()


def _by_mean_place(links: np.ndarray) -> np.ndarray:
    """Order of the rows by the mean column of their links; rows without any come first."""
    total = np.maximum(links.sum(axis=1), np.finfo(float).tiny)
    return np.argsort((links @ np.arange(links.shape[1])) / total, kind="stable")


def _square(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise M2MKDError(f"links of U nodes are a matrix [U, U], but this array has shape {list(matrix.shape)}")
    return matrix
