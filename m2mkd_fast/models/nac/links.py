"""The learned graph of a circuit in numbers: who can hear whom in every layer, how dense that is, and who matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.latent_graph import LatentGraph
from m2mkd_fast.models.nac.latents import Latents
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.nn.latent_kernel import EDGE_THRESHOLD

TILE_SIZES = (16, 32, 64)


class LayerLinks(NamedTuple):
    """Links of one layer of a circuit.

    Attributes:
        name: ``"propagators.<depth>"`` or ``"read_out"``.
        attention: the layer's attention; shared propagators have one for all depths.
        num_inputs: how many senders are input latents; they come before the mediators.
        probability: float64 ``[U, V]`` on the CPU: :math:`e^{k_{uv}}` of receiver u and sender v, 0 where truncated.
    """

    name: str
    attention: LatentAttention
    num_inputs: int
    probability: Tensor

    @property
    def edges(self) -> np.ndarray:
        """bool ``[U, V]``: the pairs that count in evaluation, which ``threshold`` leaves to the probable ones."""
        kernel = self.attention.kernel
        binary = kernel is not None and kernel.stochastic and kernel.evaluation == "threshold"
        return (self.probability >= EDGE_THRESHOLD if binary else self.probability > 0).numpy()


class Connectivity(NamedTuple):
    """How much every latent connects inputs with outputs, float64 ``[U]`` of each set; see :func:`connectivity`."""

    input_latents: Tensor
    mediator_latents: Tensor


@dataclass(frozen=True)
class LayerDensity:
    """What :func:`density_report` says of one layer. Densities and shares are between 0 and 1.

    Attributes:
        layer: ``"propagators.<depth>"`` or ``"read_out"``.
        receivers: U.
        senders: V.
        edges: share of pairs within the truncation.
        tiles: by tile size, the share of tiles of the ``[U, V]`` matrix that hold an edge.
        probable_edges: share of pairs of probability 1/2 and more, all that ``threshold`` evaluation keeps.
        probable_tiles: as `tiles`, of those pairs.
        receivers_without_sender: how many receivers hear nobody; their message is zero.
    """

    layer: str
    receivers: int
    senders: int
    edges: float
    tiles: dict[int, float]
    probable_edges: float
    probable_tiles: dict[int, float]
    receivers_without_sender: int


def circuit_graph(model: nn.Module) -> LatentGraph:
    """The latent graph of a circuit.

    Raises:
        M2MKDError: the model is no :class:`NeuralAttentiveCircuit`.
    """
    if not isinstance(model, NeuralAttentiveCircuit):
        raise M2MKDError(
            f"a learned graph belongs to a NeuralAttentiveCircuit, and this is a {type(model).__name__}; give the "
            "circuit itself: what a wrapper holds (model._orig_mod, model.module), or modules assembled with "
            "stitches='dropped'"
        )
    return model.graph


@torch.no_grad()
def layer_links(model: nn.Module) -> list[LayerLinks]:
    """Links of all propagators, in their order, and of the read-out.

    Attention without a kernel, or one that uses its affinities nowhere, links all pairs with probability 1.

    Raises:
        M2MKDError: the model is no circuit.
    """
    graph = circuit_graph(model)
    inputs, mediators, outputs = graph.input_latents, graph.mediator_latents, graph.output_latents
    layers = [
        _links(
            f"propagators.{depth}",
            propagator.latent_attention,
            mediators,
            mediators,
            inputs if depth == 0 or graph.inputs_always_send else None,
        )
        for depth, propagator in enumerate(graph.propagators)
    ]
    senders = inputs if graph.inputs_send_to_outputs else None
    return [*layers, _links("read_out", graph.read_out.latent_attention, outputs, mediators, senders)]


def connectivity(model: nn.Module) -> Connectivity:
    r"""How much each latent connects the input latents with the output latents: the weight of all paths through it.

    A receiver's attention shares are :math:`a_{uv} = p_{uv} / \sum_w p_{uw}` as far as the graph decides: what the
    softmax gives where all scores of queries and keys are equal. With :math:`A_l` the shares of propagator l
    among mediators, :math:`B_l` those of the inputs, :math:`C` the output latents' mean share, and states that are
    carried on by the residual,

    .. math::
        m_l &= B_l 1 + A_l x_l, & x_{l+1} &= x_l + m_l, & x_0 &= 0
            && \text{what arrives from the inputs} \\
        y_l &= y_{l+1} + A_l^T y_{l+1}, & y_L &= C && && \text{how much the outputs hear of it}

    a mediator's score is :math:`\sum_l m_l \, y_{l+1}` and an input's :math:`C + \sum_l B_l^T y_{l+1}`. A mediator
    between inputs and outputs scores high; one amid many links of its own kind, whose neighbours could stand in for
    it, does not, unlike with a node's degree. 0 says that nothing gets from the inputs to the outputs through a latent.

    Raises:
        M2MKDError: the model is no circuit.
    """
    *propagators, read_out = layer_links(model)
    arrived = torch.zeros(read_out.probability.shape[1] - read_out.num_inputs, dtype=torch.float64)
    messages = []
    for layer in propagators:
        from_inputs, from_mediators = _attention_shares(layer)
        messages.append(from_inputs.sum(dim=1) + from_mediators @ arrived)
        arrived = messages[-1] + arrived if layer.attention.include_residual else messages[-1]
    num_inputs = circuit_graph(model).input_latents.num_latents
    from_inputs, from_mediators = _attention_shares(read_out)
    inputs = from_inputs.mean(dim=0) if read_out.num_inputs else arrived.new_zeros(num_inputs)
    heard = from_mediators.mean(dim=0)
    mediators = torch.zeros_like(heard)
    for layer, message in zip(reversed(propagators), reversed(messages), strict=True):
        from_inputs, from_mediators = _attention_shares(layer)
        mediators += message * heard
        if layer.num_inputs:
            inputs = inputs + from_inputs.T @ heard
        passed_on = from_mediators.T @ heard
        heard = passed_on + heard if layer.attention.include_residual else passed_on
    return Connectivity(inputs, mediators)


def tile_counts(edges: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many edges every tile of a boolean matrix holds.

    Args:
        edges: ``[U, V]``.
        rows: height of a tile; the last ones may be lower.
        columns: width of a tile.

    Returns:
        int64 ``[ceil(U / rows), ceil(V / columns)]``. ``scipy.sparse.csr_array(counts)`` lists the non-empty ones.

    Raises:
        M2MKDError: not a matrix, or a tile of no size.
    """
    edges = np.asarray(edges, dtype=bool)
    if edges.ndim != 2 or rows < 1 or columns < 1:
        raise M2MKDError(
            f"tiles of {rows} x {columns} do not fit an array of shape {edges.shape}; give a matrix and at least 1 x 1"
        )
    if not edges.size:
        return np.zeros((-(-edges.shape[0] // rows), -(-edges.shape[1] // columns)), dtype=np.int64)
    tops, lefts = np.arange(0, edges.shape[0], rows), np.arange(0, edges.shape[1], columns)
    return np.add.reduceat(np.add.reduceat(edges, tops, axis=0, dtype=np.int64), lefts, axis=1)


def density_report(model: nn.Module) -> list[LayerDensity]:
    """How dense the learned graph is, layer by layer, edge by edge and in tiles that a kernel could skip.

    ``dataclasses.asdict`` makes an entry JSON-able.

    Raises:
        M2MKDError: the model is no circuit.
    """
    report = []
    for layer in layer_links(model):
        edges, probable = (layer.probability > 0).numpy(), (layer.probability >= EDGE_THRESHOLD).numpy()
        report.append(
            LayerDensity(
                layer.name,
                *edges.shape,
                float(edges.mean()),
                tile_shares(edges),
                float(probable.mean()),
                tile_shares(probable),
                int((~edges.any(axis=1)).sum()),
            )
        )
    return report


def tile_shares(edges: np.ndarray) -> dict[int, float]:
    """Share of tiles with an edge, by the tile's size."""
    return {size: float((tile_counts(edges, size, size) > 0).mean()) for size in TILE_SIZES}


def plan_tiles(model: nn.Module, below: float = 0.5) -> dict[str, bool]:
    """Let the layers whose graph is sparse in tiles skip empty ones: sets ``skip_empty_tiles`` of their attention.

    A layer skips where its share of non-empty tiles of 64 is below the limit, counted on the edges that its evaluation
    uses. Skipping never changes a result: a kernel decides for each tile from its affinities. Plan again after the
    graph has changed much. Propagators that share weights skip where all depths are sparse.

    Args:
        model: the circuit; its layers are changed in place.
        below: the limit; 0 lets no layer skip.

    Returns:
        Whether each layer skips, by its name.

    Raises:
        M2MKDError: a limit outside of 0 to 1, or no circuit.
    """
    if not 0.0 <= below <= 1.0:
        raise M2MKDError(f"below is {below}, and a share of tiles lies between 0 and 1; 0.5 is the usual limit")
    layers = layer_links(model)
    sparse: dict[int, bool] = {}
    for layer in layers:
        share = tile_shares(layer.edges)[64]
        sparse[id(layer.attention)] = sparse.get(id(layer.attention), True) and share < below
    for layer in layers:
        layer.attention.skip_empty_tiles = sparse[id(layer.attention)]
    return {layer.name: layer.attention.skip_empty_tiles for layer in layers}


def _attention_shares(layer: LayerLinks) -> tuple[Tensor, Tensor]:
    """Rows of probability made to sum to one, of the inputs and of the mediators; a row without any stays zero."""
    total = layer.probability.sum(dim=1, keepdim=True)
    return (layer.probability / total.masked_fill(total == 0, 1.0)).tensor_split([layer.num_inputs], dim=1)


def _links(
    name: str, attention: LatentAttention, receivers: Latents, mediators: Latents, inputs: Latents | None
) -> LayerLinks:
    senders = mediators.signatures if inputs is None else torch.cat([inputs.signatures, mediators.signatures])
    num_receivers, num_inputs = receivers.num_latents, 0 if inputs is None else inputs.num_latents
    if attention.kernel is None or not (attention.mask_scores or attention.scale_weights):
        probability = torch.ones(num_receivers, len(senders), dtype=torch.float64)
    else:
        # In float64, where e^k of the smallest bandwidths is still more than nothing.
        signatures = torch.cat([receivers.signatures, senders]).double()
        probability = attention.kernel.link_probability(signatures)[:num_receivers, num_receivers:].cpu()
    return LayerLinks(name, attention, num_inputs, probability)
