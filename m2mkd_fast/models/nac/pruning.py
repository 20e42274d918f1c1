"""Smaller circuits from big ones: the latents that the graph connects least are taken out."""

from __future__ import annotations

import copy
import math
from numbers import Integral, Real

from torch import Tensor, nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac.blocks import ProjectionReadIn
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.latents import Latents
from m2mkd_fast.models.nac.links import circuit_graph, connectivity


def prune_latents(
    model: NeuralAttentiveCircuit,
    keep: float | int,
    *,
    keep_inputs: float | int = 1.0,
    score: Tensor | None = None,
    input_score: Tensor | None = None,
) -> NeuralAttentiveCircuit:
    """A copy of a circuit with fewer mediators: those with the highest scores stay, in their order.

    Layers have the same weights for all latents, so a latent is nothing but its signature, its codes and its initial
    state. These are taken out, and the rest computes as before on smaller matrices: the time of propagators and
    read-out falls with the number of mediators, without any sparse kernel. Nothing is trained. Logits change as far as
    removed latents were heard; removing those that nobody hears changes none.

    The copy's ``state_dict`` loads into a circuit built with the smaller ``num_mediator_latents`` and
    ``num_input_latents`` (and ``fit_signatures=False``: a graph preset has a number of nodes of its own). An optimizer
    of `model` knows nothing of the copy's parameters; make a new one.

    Args:
        model: stays as it is.
        keep: how many mediators stay: a fraction as a float, ``0 < keep <= 1``, rounded to the nearest number and at
            least one latent; or a number as an int.
        keep_inputs: how many input latents stay, likewise.
        score: ``[num_mediator_latents]``, high for what stays; by default the weight of all paths from inputs to
            outputs through a mediator, see :func:`~m2mkd_fast.models.nac.links.connectivity`. Of equal scores the
            earlier latents stay.
        input_score: ``[num_input_latents]``, likewise.

    Raises:
        M2MKDError: a fraction or number that cannot be kept, scores of another shape or with NaN, input latents that
            are bound to their tokens, or a model that is no circuit.

    Source: Rahaman et al., Neural Attentive Circuits, arXiv 2210.08031, on removing modules at inference by their
    connectivity (no code was published).
    """
    graph = circuit_graph(model)
    sets = {
        "keep": (graph.mediator_latents, keep, score, "score"),
        "keep_inputs": (graph.input_latents, keep_inputs, input_score, "input_score"),
    }
    numbers = {name: _number(name, wish, latents.num_latents) for name, (latents, wish, _, _) in sets.items()}
    if numbers["keep_inputs"] < graph.input_latents.num_latents and isinstance(graph.read_in, ProjectionReadIn):
        raise M2MKDError(
            f"keep_inputs is {keep_inputs}, but ProjectionReadIn gives every token an input latent of its own, so "
            f"all {graph.input_latents.num_latents} stay; leave keep_inputs out, or build the circuit with "
            "AttentiveReadIn"
        )
    degrees = connectivity(model)
    chosen = []
    for (name, (latents, _, given, argument)), degree in zip(sets.items(), reversed(degrees), strict=True):
        values = degree if given is None else _checked_score(argument, given, latents.num_latents)
        ranked = values.argsort(descending=True, stable=True)
        chosen.append(ranked[: numbers[name]].sort().values)
    return with_latents(model, mediators=chosen[0], inputs=chosen[1])


def with_latents(
    model: NeuralAttentiveCircuit, *, mediators: Tensor | None = None, inputs: Tensor | None = None
) -> NeuralAttentiveCircuit:
    """A copy of a circuit with the chosen latents, int64 indices, in the order in which they are given."""
    # Parameters are leaves; a gradient that hangs on them is of the old shape and stays with the old model.
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)
    for latents, index in ((copied.graph.mediator_latents, mediators), (copied.graph.input_latents, inputs)):
        if index is not None:
            _take(latents, index)
    return copied


def _take(latents: Latents, index: Tensor) -> None:
    index = index.to(latents.signatures_.device)
    for name, dim in (("signatures_", 0), ("codes_", -2), ("initial_states_", 0)):
        parameter = getattr(latents, name)
        if parameter is not None:
            taken = parameter.detach().index_select(dim, index)
            setattr(latents, name, nn.Parameter(taken, requires_grad=parameter.requires_grad))


def _number(name: str, keep: float | int, total: int) -> int:
    """How many of `total` latents stay."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise M2MKDError(f"{name} is {keep!r}; give a fraction (0.25) or a number of latents (1 to {total})")
    if isinstance(keep, Integral):
        if not 1 <= keep <= total:
            raise M2MKDError(
                f"{name} is the integer {keep}, a number of latents, and of {total} latents 1 to {total} can stay; "
                f"{_remedy(keep, total)}"
            )
        return int(keep)
    if not 0.0 < keep <= 1.0:
        raise M2MKDError(f"{name} is {keep}, and a fraction lies above 0 and is at most 1; {_remedy(keep, total)}")
    return max(1, math.floor(keep * total + 0.5))


def _remedy(keep: float, total: int) -> str:
    if keep > 1 and keep == int(keep) and keep <= total:
        return f"for {int(keep)} latents give the integer {int(keep)}"
    if 1 < keep <= 100:
        return f"for {keep:g} % give {keep / 100:g}"
    return "give for example 0.25 for a quarter"


def _checked_score(argument: str, score: Tensor, total: int) -> Tensor:
    if not isinstance(score, Tensor) or score.shape != (total,):
        shape = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise M2MKDError(f"{argument} should be a tensor [{total}], one number a latent, but it is {shape}")
    score = score.detach().double().cpu()
    if score.isnan().any():
        raise M2MKDError(f"{argument} of latent {int(score.isnan().nonzero()[0])} is not a number; give it a rank")
    return score
