"""Losses on signatures that shape the learned graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.options import build
from m2mkd_fast.ops.latent_affinity import signature_distance

if TYPE_CHECKING:
    from m2mkd_fast.models.nac.latent_graph import LatentGraph


def signature_hinge_repulsion(signatures: Tensor, hinge: float, reduction: str = "sum") -> Tensor:
    """Minus the distances of all pairs closer than a hinge, so that minimising it pushes them apart.

    Args:
        signatures: ``[U, S]``.
        hinge: cosine distance from which on a pair is left alone.
        reduction: ``"sum"`` or ``"mean"`` over those pairs.

    Returns:
        A scalar; 0 where no pair is that close.
    """
    if reduction not in ("sum", "mean"):
        raise UnknownNameError("reduction", reduction, ["sum", "mean"])
    distances = signature_distance(signatures, signatures).tril(diagonal=-1)
    pairs = torch.ones_like(distances, dtype=torch.bool).tril(diagonal=-1)
    close = pairs & (distances.detach() < hinge)
    total = -distances.masked_fill(~close, 0.0).sum()
    return total / close.sum().clamp(min=1) if reduction == "mean" else total


def block_graphon(num_clusters: int, p_in: float, p_out: float, like: Tensor) -> Tensor:
    """Link probabilities of a stochastic block model, like a ``[U, U]`` matrix: p_in within a cluster, p_out outside.

    Raises:
        M2MKDError: the clusters would not be of one size.
    """
    num_latents = like.shape[0]
    if num_latents % num_clusters:
        raise M2MKDError(
            f"{num_latents} latents do not divide into {num_clusters} clusters of one size; choose num_clusters among "
            "the divisors, or regularise another set of latents"
        )
    cluster = torch.arange(num_latents, device=like.device) // (num_latents // num_clusters)
    return torch.full_like(like, p_out).masked_fill(cluster[:, None] == cluster, p_in)


def stochastic_block_model_loss(link_probability: Tensor, graphon: Tensor, clip: float = 0.0) -> Tensor:
    """Mean squared difference between link probabilities and a block model's, rows matched first.

    Latents are matched to rows of the graphon by the assignment of least total squared difference (Hungarian algorithm,
    on the CPU). Only rows are permuted, as published; columns keep their order.

    Args:
        link_probability: ``[U, U]``.
        graphon: ``[U, U]``, of the same dtype, see :func:`block_graphon`.
        clip: squared differences below this count as this, and have no gradient.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, appendix.
    """
    with torch.no_grad():
        # |t - a|^2 without the [U, U, U] tensor; |t|^2 and |a|^2 are constants of a row or column of the assignment.
        cost = -(graphon.double() @ link_probability.double().T)
        _, order = linear_sum_assignment(cost.cpu().numpy())
        order = torch.from_numpy(order).to(link_probability.device)
    difference = F.mse_loss(link_probability[order], graphon, reduction="none")
    return difference.clamp(min=clip).mean() if clip else difference.mean()


class SignatureHingeRepulsion(nn.Module):
    """:func:`signature_hinge_repulsion` of all latents of a graph."""

    def __init__(self, hinge: float, reduction: str = "sum") -> None:
        super().__init__()
        self.hinge, self.reduction = hinge, reduction

    def forward(self, graph: LatentGraph) -> Tensor:
        sets = (graph.input_latents, graph.mediator_latents, graph.output_latents)
        return signature_hinge_repulsion(torch.cat([s.signatures for s in sets]), self.hinge, self.reduction)


class StochasticBlockModelRegularization(nn.Module):
    """:func:`stochastic_block_model_loss` of the graph that each propagator's kernel makes, summed.

    Args:
        num_clusters: clusters of the block model.
        p_in: link probability within a cluster.
        p_out: link probability between clusters.
        regularize_input_latents: whether these latents belong to the graph; the next two likewise.
        regularize_mediator_latents: mediators.
        regularize_output_latents: output latents.
        clip: see :func:`stochastic_block_model_loss`.
    """

    def __init__(
        self,
        num_clusters: int = 10,
        p_in: float = 0.9,
        p_out: float = 0.05,
        regularize_input_latents: bool = True,
        regularize_mediator_latents: bool = True,
        regularize_output_latents: bool = True,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_clusters, self.p_in, self.p_out, self.clip = num_clusters, p_in, p_out, clip
        chosen = {
            "input_latents": regularize_input_latents,
            "mediator_latents": regularize_mediator_latents,
            "output_latents": regularize_output_latents,
        }
        self.latents = tuple(name for name, regularize in chosen.items() if regularize)
        if not self.latents:
            raise M2MKDError("all of regularize_*_latents are off, which leaves no graph to regularise; turn one on")

    def forward(self, graph: LatentGraph) -> Tensor:
        signatures = torch.cat([getattr(graph, name).signatures for name in self.latents])
        links = [kernel.link_probability(signatures) for kernel in self._kernels(graph)]
        graphon = block_graphon(self.num_clusters, self.p_in, self.p_out, like=links[0].detach())
        return torch.stack([stochastic_block_model_loss(link, graphon, self.clip) for link in links]).sum()

    @staticmethod
    def _kernels(graph: LatentGraph) -> Sequence[nn.Module]:
        """One kernel per propagator, and one alone where all are alike and stay so."""
        kernels = [propagator.latent_attention.kernel for propagator in graph.propagators]
        if any(kernel is None for kernel in kernels):
            raise M2MKDError("this graph has no kernels to regularise; build its propagators with a kernel_type")
        fixed = all(not isinstance(kernel.bandwidth, nn.Parameter) for kernel in kernels)
        return kernels[:1] if fixed else kernels


REGULARIZERS: dict[str, type[nn.Module]] = {
    "signature_hinge_repulsion": SignatureHingeRepulsion,
    "stochastic_block_model_regularization": StochasticBlockModelRegularization,
}


class GraphSparsity(nn.Module):
    """The regulariser of a published configuration's ``criterion.graph_sparsity``, times its weight.

    Args:
        type: a name in `REGULARIZERS`.
        weight: factor of the loss.
        hinge: of the hinge repulsion, which the published files keep outside of `kwargs`.
        kwargs: options of the regulariser.
        use: whether it counts; 0 otherwise.
    """

    def __init__(
        self,
        type: str = "signature_hinge_repulsion",
        weight: float = 1.0,
        hinge: float | None = None,
        kwargs: Mapping[str, Any] | None = None,
        use: bool = False,
    ) -> None:
        super().__init__()
        if type not in REGULARIZERS:
            raise UnknownNameError("graph_sparsity type", type, REGULARIZERS)
        self.weight = weight if use else 0.0
        defaults = {} if hinge is None else {"hinge": hinge}
        self.regularizer = build(REGULARIZERS[type], "graph_sparsity.kwargs", kwargs, **defaults) if use else None

    def forward(self, graph: LatentGraph) -> Tensor:
        if self.regularizer is None:
            return graph.mediator_latents.signatures.new_zeros(())
        return self.weight * self.regularizer(graph)
