"""Orders of latents, tiles of the learned graph, and what its density report says."""

from __future__ import annotations

import dataclasses
import json
import os

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from m2mkd_fast import _extension
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NeuralAttentiveCircuit, density_report, plan_tiles, reorder_latents
from m2mkd_fast.models.nac.links import layer_links, tile_counts
from m2mkd_fast.models.nac.ordering import cluster_order, ordered_links, tile_order
from m2mkd_fast.models.registry import create_model

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
EXAMPLES = int(os.environ.get("M2MKD_FUZZ_EXAMPLES", "50"))
HOST, _ = _extension.load("_host")
needs_host = pytest.mark.skipif(HOST is None, reason="m2mkd_fast._host was not built")


def ring_of_clusters(clusters: int, size: int) -> np.ndarray:
    """bool [n, n]: all pairs within a cluster, and one between neighbouring clusters."""
    edges = np.kron(np.eye(clusters, dtype=bool), np.ones((size, size), dtype=bool))
    for cluster in range(clusters):
        a, b = cluster * size, (cluster + 1) * size % len(edges)
        edges[a, b] = edges[b, a] = True
    return edges


def shuffled(edges: np.ndarray, seed: int = 0) -> np.ndarray:
    places = np.random.default_rng(seed).permutation(len(edges))
    return edges[np.ix_(places, places)]


def tiles(edges: np.ndarray, order: np.ndarray, tile: int) -> int:
    return int((tile_counts(edges[np.ix_(order, order)], tile, tile) > 0).sum())


def ring_circuit(num_mediators: int = 64, **latent_graph: object) -> NeuralAttentiveCircuit:
    """Mediators in clusters of at least 8 that hear only their own; where they stand is drawn at random."""
    torch.manual_seed(0)
    options = {"num_mediator_latents": num_mediators, "signature_dim": 16, **latent_graph}
    circuit = create_model("nac_micro.ring", latent_graph_kwargs=options, fit_signatures=False).eval()
    clusters = torch.arange(num_mediators)[torch.randperm(num_mediators)] % min(16, num_mediators // 8)
    circuit.graph.mediator_latents.signatures_.data = torch.eye(16)[clusters]
    return circuit


@pytest.mark.parametrize("size", [(5, 7), (64, 64), (65, 320), (1, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("tile", [(1, 1), (16, 64), (64, 16), (100, 100)])
def test_tiles_are_counted_as_by_hand(size: tuple[int, int], tile: tuple[int, int]) -> None:
    edges = np.random.default_rng(0).random(size) < 0.1
    counts = tile_counts(edges, *tile)
    rows, columns = -(-size[0] // tile[0]), -(-size[1] // tile[1])
    assert counts.shape == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = edges[row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
            assert counts[row, column] == part.sum()


def test_clusters_stand_together() -> None:
    weights = shuffled(ring_of_clusters(8, 8)) * 0.5
    order = cluster_order(weights)
    assert sorted(order) == list(range(64))
    assert tiles(weights > 0, order, 8) <= 8 + 2 * 8
    for few in (0, 1, 2):
        assert sorted(cluster_order(np.zeros((few, few)))) == list(range(few))


@pytest.mark.parametrize("tile", [8, 16, 32])
def test_a_shuffled_ring_is_put_back_into_its_tiles(tile: int) -> None:
    ring = ring_of_clusters(12, 16)
    edges = shuffled(ring)
    order = tile_order(edges, tile)
    assert sorted(order) == list(range(len(ring)))
    assert tiles(edges, order, tile) <= tiles(ring, np.arange(len(ring)), tile) < tiles(edges, np.arange(192), tile)
    assert np.array_equal(order, tile_order(edges, tile)), "the same order every time"


@needs_host
@hypothesis.settings(max_examples=EXAMPLES)
@hypothesis.given(
    size=strategies.integers(0, 70),
    tile=strategies.integers(1, 40),
    density=strategies.floats(0, 1),
    seed=strategies.integers(0, 2**32 - 1),
)
def test_fuzz_packing_permutes_and_never_raises_the_cost(size: int, tile: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    edges = random.random((size, size)) < density
    edges |= edges.T
    start = random.permutation(size)
    packed = HOST.pack_tiles(edges, start, tile)
    assert sorted(packed) == list(range(size))
    cost = [np.log1p(tile_counts(edges[np.ix_(order, order)], tile, tile)).sum() for order in (start, packed)]
    assert cost[1] <= cost[0] + 1e-9
    # What it gains swap by swap is what it gains in all: its running counts are right.
    once = HOST.pack_tiles(edges, packed, tile)
    assert np.log1p(tile_counts(edges[np.ix_(once, once)], tile, tile)).sum() <= cost[1] + 1e-9


@needs_host
def test_packing_ends_where_no_swap_helps() -> None:
    edges = np.random.default_rng(3).random((36, 36)) < 0.08
    edges |= edges.T
    tile = 6

    def cost(order: np.ndarray) -> float:
        return float(np.log1p(tile_counts(edges[np.ix_(order, order)], tile, tile)).sum())

    start = np.arange(36)
    packed = HOST.pack_tiles(edges, start, tile, 1000)
    assert cost(packed) < cost(start) - 1
    for i in range(36):
        for j in range(i):
            other = packed.copy()
            other[[i, j]] = other[[j, i]]
            assert cost(other) > cost(packed) - 1e-8


@needs_host
@pytest.mark.parametrize(
    ("edges", "order", "tile", "message"),
    [
        (np.ones((2, 3), bool), [0, 1], 2, "square"),
        (np.array([[0, 1], [0, 0]], bool), [0, 1], 2, "symmetric"),
        (np.eye(3, dtype=bool), [0, 1], 2, "each of the 3 nodes once"),
        (np.eye(3, dtype=bool), [0, 1, 1], 2, "node 1 at place 2"),
        (np.eye(3, dtype=bool), [0, 1, 3], 2, "node 3 at place 2"),
        (np.eye(3, dtype=bool), [0, 1, -1], 2, "node -1 at place 2"),
        (np.eye(3, dtype=bool), [0, 1, 2], 0, "between 1 and 1024"),
    ],
)
def test_the_compiled_search_checks_its_arguments(edges, order, tile, message) -> None:
    with pytest.raises(ValueError, match=message):
        HOST.pack_tiles(edges, order, tile)


def test_without_the_compiled_module_scipy_orders_alone(monkeypatch) -> None:
    edges = shuffled(ring_of_clusters(8, 16))
    monkeypatch.setattr(_extension, "load", lambda name: (None, "was not built"))
    assert tiles(edges, tile_order(edges, 16), 16) < tiles(edges, np.arange(128), 16) / 2


@pytest.mark.parametrize(
    ("function", "matrix", "message"),
    [
        (cluster_order, np.ones((2, 3)), "shape [2, 3]"),
        (cluster_order, np.full((3, 3), np.nan), "not finite"),
        (tile_order, np.ones(4), "shape [4]"),
        (tile_order, np.triu(np.ones((4, 4))), "give edges | edges.T"),
        (lambda edges: tile_order(edges, 0), np.eye(4), "tile is 0"),
        (lambda edges: tile_counts(edges, 0, 1), np.eye(4), "0 x 1"),
        (lambda edges: tile_counts(edges, 1, 1), np.ones(4), "(4,)"),
    ],
)
def test_mistakes_name_the_remedy(function, matrix, message: str) -> None:
    with pytest.raises(M2MKDError) as error:
        function(matrix)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options", [{}, {"use_latent_seeder": False, "share_codes_between_iterations": False}], ids=["codes", "states"]
)
def test_reordering_changes_tiles_and_no_logits(options: dict[str, object]) -> None:
    circuit = ring_circuit(**options).double()
    ordered = reorder_latents(circuit, tile=16)
    before, after = density_report(circuit), density_report(ordered)
    torch.testing.assert_close(ordered(IMAGES.double()), circuit(IMAGES.double()), rtol=1e-10, atol=1e-10)
    assert [layer.edges for layer in before] == pytest.approx([layer.edges for layer in after])
    links = [layer_links(model)[1].probability[:, 8:].numpy() > 0 for model in (circuit, ordered)]
    shares = [(tile_counts(edges, 16, 16) > 0).mean() for edges in links]
    assert shares == [1.0, 0.25]


def test_the_report_counts_what_is_there() -> None:
    circuit = ring_circuit(32)
    circuit.graph.mediator_latents.signatures_.data[0] = torch.eye(16)[15]
    circuit.graph.input_latents.signatures_.data = torch.eye(16)[[14] * 8]
    first, _, read_out = density_report(circuit)
    probability = layer_links(circuit)[0].probability
    assert (first.layer, first.receivers, first.senders) == ("propagators.0", 32, 40)
    assert first.edges == float((probability > 0).double().mean())
    assert first.probable_edges == float((probability >= 0.5).double().mean())
    assert first.tiles[64] == 1.0
    assert first.receivers_without_sender == 0, "a mediator hears itself"
    assert read_out.edges == 1.0, "the read-out is not truncated"
    circuit.graph.mediator_latents.signatures_.data[3:5] = 0.0
    assert density_report(circuit)[0].receivers_without_sender == 2
    json.dumps(dataclasses.asdict(first))


def test_layers_skip_tiles_where_few_hold_an_edge() -> None:
    circuit = ring_circuit(256, num_input_latents=64)
    circuit.graph.input_latents.signatures_.data = torch.eye(16)[torch.arange(64) // 4]
    signatures = circuit.graph.mediator_latents.signatures_
    signatures.data = torch.eye(16)[torch.arange(256) // 16]
    assert plan_tiles(circuit) == {"propagators.0": True, "propagators.1": True, "read_out": False}
    assert circuit.graph.propagators[0].latent_attention.skip_empty_tiles is True
    assert plan_tiles(circuit, below=0.3) == dict.fromkeys(["propagators.0", "propagators.1", "read_out"], False)
    assert circuit.graph.propagators[0].latent_attention.skip_empty_tiles is False
    signatures.data = signatures.data[torch.randperm(256)]
    assert not any(plan_tiles(circuit).values())
    with pytest.raises(M2MKDError, match="share of tiles lies between 0 and 1"):
        plan_tiles(circuit, below=50)


def test_shared_propagators_skip_where_all_depths_are_sparse() -> None:
    """The first depth hears the inputs, which link to all; the second one does not."""
    options = {"num_input_latents": 64, "enable_persistent_input_mediator_communication": False}
    signatures = torch.eye(16)[torch.arange(256) // 32]
    for shared, expected in ((False, [False, True]), (True, [False, False])):
        circuit = ring_circuit(256, share_propagator_weights=shared, **options)
        circuit.graph.mediator_latents.signatures_.data = signatures
        circuit.graph.input_latents.signatures_.data.fill_(1.0)
        plan = plan_tiles(circuit, below=0.4)
        assert [plan["propagators.0"], plan["propagators.1"]] == expected


def test_edges_are_those_that_evaluation_uses() -> None:
    kernel = {"kernel_kwargs": {"stochastic_eval_behaviour": "threshold"}}
    circuit = ring_circuit(propagator_kwargs={"latent_attention_kwargs": kernel})
    layer = layer_links(circuit)[0]
    layer.attention.kernel.bandwidth.data.fill_(100.0)
    assert layer_links(circuit)[0].edges.mean() == pytest.approx((layer.probability > 0).double().mean().item())
    layer.attention.kernel.bandwidth.data.fill_(0.01)
    probability = layer_links(circuit)[0].probability
    assert (probability > 0).sum() > (probability >= 0.5).sum(), "float64 keeps what float32 would lose"
    assert layer_links(circuit)[0].edges.sum() == (probability >= 0.5).sum()


def test_links_in_order_for_the_eye() -> None:
    circuit = ring_circuit(enable_input_output_communication=False)
    graph = ordered_links(circuit)
    assert graph.links.shape == (64 + 4, 8 + 64)
    assert (graph.num_inputs, graph.num_mediators) == (8, 64)
    between = graph.links[:64, 8:]
    assert between[np.kron(np.eye(8, dtype=bool), np.ones((8, 8), bool))].min() == pytest.approx(1.0)
    assert between[~np.kron(np.eye(8, dtype=bool), np.ones((8, 8), bool))].max() == 0.0
    assert (graph.links[64:, :8] == 0).all(), "inputs do not send to outputs here"
    total = sum(layer.probability.sum().item() for layer in layer_links(circuit)[:2]) / 2
    assert graph.links[:64].sum() == pytest.approx(total)
