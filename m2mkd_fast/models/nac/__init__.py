"""Neural Attentive Circuits: latents wired by a learned graph, and their parts as student modules."""

from __future__ import annotations

from m2mkd_fast.models.nac import variants  # noqa: F401 (registers the names of this family)
from m2mkd_fast.models.nac.circuit import CircuitStates, NeuralAttentiveCircuit
from m2mkd_fast.models.nac.links import connectivity, density_report, plan_tiles
from m2mkd_fast.models.nac.ordering import reorder_latents
from m2mkd_fast.models.nac.pruning import prune_latents
from m2mkd_fast.models.nac.student import NACMediator, NACReadIn, NACReadOut, student_modules

__all__ = [
    "CircuitStates",
    "NACMediator",
    "NACReadIn",
    "NACReadOut",
    "NeuralAttentiveCircuit",
    "connectivity",
    "density_report",
    "plan_tiles",
    "prune_latents",
    "reorder_latents",
    "student_modules",
]
