"""How accurate and how fast a circuit is when latents are taken out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.evaluate.frontier import measure_frontier
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.pruning import prune_latents


@dataclass(frozen=True)
class PruningPoint:
    """A pruned circuit; accuracy in per cent, median latency, speedup against the whole circuit in paired passes."""

    keep: float | int
    mediators: int
    inputs: int
    accuracy: float
    latency_ms: float
    speedup: float


def pruning_frontier(
    model: NeuralAttentiveCircuit,
    batches: Iterable[tuple[Tensor, Tensor]],
    keeps: Sequence[float | int] = (1.0, 0.75, 0.5, 0.25, 0.125),
    *,
    keep_inputs: float | int = 1.0,
    score: Tensor | None = None,
    latency_images: Tensor | None = None,
    rounds: int = 20,
) -> list[PruningPoint]:
    """Accuracy against latency of :func:`~m2mkd_fast.models.nac.pruning.prune_latents`; nothing is trained in between.

    Args:
        model: stays as it is.
        batches: held-out images and labels.
        keeps: as `keep` of `prune_latents`, one point each.
        keep_inputs: the same in all points.
        score: as in `prune_latents`.
        latency_images: what passes are timed on; the first batch by default. Latency depends on the batch size.
        rounds: timed passes of each, see :func:`~m2mkd_fast.evaluate.frontier.measure_frontier`.

    Raises:
        M2MKDError: as `prune_latents` and `measure_frontier`; no `keeps`.
    """
    if not keeps:
        raise M2MKDError("keeps is empty; give at least one fraction or number of mediators, for example (1.0, 0.5)")
    pruned = [prune_latents(model, keep, keep_inputs=keep_inputs, score=score) for keep in keeps]
    models = {"whole": model} | {str(index): circuit for index, circuit in enumerate(pruned)}
    _, *points = measure_frontier(models, batches, latency_images=latency_images, rounds=rounds)
    return [
        PruningPoint(
            keep,
            circuit.graph.mediator_latents.num_latents,
            circuit.graph.input_latents.num_latents,
            point.accuracy,
            point.latency_ms,
            point.speedup,
        )
        for keep, circuit, point in zip(keeps, pruned, points, strict=True)
    ]
