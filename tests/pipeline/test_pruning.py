"""Accuracy and latency of pruned circuits, and the learned graph that a step writes down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import prune_latents
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.pipeline.learned_graph import save_learned_graph
from m2mkd_fast.pipeline.pruning import pruning_frontier


@pytest.fixture
def circuit() -> nn.Module:
    torch.manual_seed(0)
    return create_model("nac_micro.ring", fit_signatures=False).eval()


def test_the_frontier_has_the_accuracies_of_the_pruned_circuits(circuit: nn.Module) -> None:
    images = torch.randn(40, 1, 16, 16)
    with torch.no_grad():
        labels = circuit(images).argmax(-1)
        expected = 100 * float((prune_latents(circuit, 1, keep_inputs=4)(images).argmax(-1) == labels).float().mean())
    whole, half, least = (
        pruning_frontier(circuit, [(images, labels)], (1.0, 0.5, 1), keep_inputs=keep_inputs, rounds=2)
        for keep_inputs in (1.0, 1.0, 4)
    )
    assert whole[0].accuracy == 100.0
    assert [(point.keep, point.mediators, point.inputs) for point in half] == [(1.0, 16, 8), (0.5, 8, 8), (1, 1, 8)]
    assert least[2].accuracy == pytest.approx(expected)
    assert all(point.latency_ms > 0 and point.speedup > 0 for point in half)
    with pytest.raises(M2MKDError, match="keeps is empty"):
        pruning_frontier(circuit, [(images, labels)], ())


def test_a_learned_graph_is_written_for_circuits_alone(circuit: nn.Module, tmp_path) -> None:
    assert save_learned_graph(tmp_path, nn.Linear(2, 2)) == []
    assert not list(tmp_path.iterdir())
    density = save_learned_graph(tmp_path, circuit)
    assert [layer["layer"] for layer in density] == ["propagators.0", "propagators.1", "read_out"]
    assert [path.name for path in tmp_path.iterdir()] == ["graph.npz"]
    with np.load(tmp_path / "graph.npz") as file:
        assert file["links"].shape == (16 + 4, 8 + 16)
        assert (int(file["num_inputs"]), int(file["num_mediators"])) == (8, 16)
        assert (np.sort(np.diag(file["links"][:16, 8:])) == 255).all(), "a mediator hears itself"
