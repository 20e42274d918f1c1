"""Writes down the graph that a step's circuit has learned, for the report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.models.nac.circuit import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.links import density_report
from m2mkd_fast.models.nac.ordering import ordered_links


def save_learned_graph(folder: Path, model: nn.Module) -> list[dict[str, Any]]:
    """Write ``graph.npz`` and return the density of every layer; nothing for a model that is no circuit.

    The file holds ``links``, uint8 ``[mediators + outputs, inputs + mediators]``, probabilities in units of 1/255, and
    ``num_inputs``, ``num_mediators``; see :func:`~m2mkd_fast.models.nac.ordering.ordered_links`.
    """
    if not isinstance(model, NeuralAttentiveCircuit):
        return []
    graph = ordered_links(model)
    arrays = {
        "links": np.rint(255 * graph.links).astype(np.uint8),
        "num_inputs": np.array(graph.num_inputs),
        "num_mediators": np.array(graph.num_mediators),
    }

    def write(path: Path) -> None:
        with path.open("wb") as file:  # a name without .npz would get that ending
            np.savez_compressed(file, **arrays)

    write_atomically(folder / "graph.npz", write)
    return [asdict(layer) for layer in density_report(model)]
