"""Circuits without their least connected latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NeuralAttentiveCircuit, connectivity, prune_latents
from m2mkd_fast.models.nac.links import layer_links
from m2mkd_fast.models.nac.variants import variant_config
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.nn.latent_attention import LatentAttention

IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
TRUNCATED_READ_OUT = {"latent_attention_kwargs": {"kernel_kwargs": {"truncation": 0.9}}}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "codes of every layer": {"share_codes_between_iterations": False},
    "shared propagators": {"share_propagator_weights": True},
    "shared feed-forward": {"share_ffn_between_propagators": True},
    "learned states": {"use_latent_seeder": False},
    "inputs send once": {"enable_persistent_input_mediator_communication": False},
    "inputs send to mediators alone": {"enable_input_output_communication": False},
    "one of a kind": {
        "use_latent_seeder": False,
        "share_codes_between_iterations": False,
        "share_propagator_weights": True,
        "enable_persistent_input_mediator_communication": False,
    },
    "edges of one half": {
        "propagator_kwargs": {"latent_attention_kwargs": {"kernel_kwargs": {"stochastic_eval_behaviour": "threshold"}}}
    },
}


def micro(**latent_graph: Any) -> NeuralAttentiveCircuit:
    torch.manual_seed(0)
    return create_model("nac_micro.ring", latent_graph_kwargs=latent_graph, fit_signatures=False).eval()


def place(circuit: NeuralAttentiveCircuit, axes: dict[str, list[int]]) -> None:
    """Latents' signatures along axes: those of one axis are linked, all others are at distance 1, beyond the cut."""
    for name, chosen in axes.items():
        signatures = getattr(circuit.graph, name).signatures_
        signatures.data = torch.eye(signatures.shape[1])[chosen]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_mediators_that_nobody_hears_change_nothing(options: dict[str, Any]) -> None:
    circuit = micro(read_out_kwargs=TRUNCATED_READ_OUT, **options).double()
    place(circuit, {"input_latents": [0] * 8, "output_latents": [0] * 4, "mediator_latents": [0, 1] * 8})
    pruned = prune_latents(circuit, 0.5)
    assert connectivity(circuit).mediator_latents[1::2].eq(0).all()
    torch.testing.assert_close(pruned(IMAGES.double()), circuit(IMAGES.double()), rtol=1e-12, atol=1e-12)
    assert pruned.graph.mediator_latents.num_latents == 8
    assert circuit.graph.mediator_latents.num_latents == 16


def test_mediators_that_are_heard_change_something() -> None:
    circuit = micro()
    assert not torch.allclose(prune_latents(circuit, 15)(IMAGES), circuit(IMAGES), atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_state_dict_loads_into_a_circuit_built_that_small(options: dict[str, Any]) -> None:
    pruned = prune_latents(micro(**options), 0.25, keep_inputs=5)
    numbers = {"num_mediator_latents": 4, "num_input_latents": 5}
    built = create_model("nac_micro.ring", latent_graph_kwargs={**options, **numbers}, fit_signatures=False).eval()
    built.load_state_dict(pruned.state_dict())
    assert torch.equal(built(IMAGES), pruned(IMAGES))
    pruned.train()(IMAGES).square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in pruned.parameters())
    assert pruned.graph.mediator_latents.codes_.grad.shape[-2] == 4


def test_input_latents_that_nobody_hears_change_nothing() -> None:
    circuit = micro(read_out_kwargs=TRUNCATED_READ_OUT).double()
    place(circuit, {"input_latents": [0, 0, 1, 0, 1, 0, 0, 0], "output_latents": [0] * 4, "mediator_latents": [0] * 16})
    assert connectivity(circuit).input_latents.eq(0).nonzero().flatten().tolist() == [2, 4]
    pruned = prune_latents(circuit, 1.0, keep_inputs=6)
    torch.testing.assert_close(pruned(IMAGES.double()), circuit(IMAGES.double()), rtol=1e-12, atol=1e-12)


def test_a_score_decides_and_the_order_stays() -> None:
    circuit = micro()
    score = torch.zeros(16)
    score[[11, 3, 7]] = torch.tensor([1.0, 2.0, 3.0])
    score[5] = -torch.inf
    pruned = prune_latents(circuit, 4, score=score, keep_inputs=2, input_score=torch.arange(8))
    mediators, inputs = circuit.graph.mediator_latents, circuit.graph.input_latents
    # Of the zeros the first stays.
    assert torch.equal(pruned.graph.mediator_latents.signatures, mediators.signatures[[0, 3, 7, 11]])
    assert torch.equal(pruned.graph.mediator_latents.codes_, mediators.codes_[[0, 3, 7, 11]])
    assert torch.equal(pruned.graph.input_latents.signatures, inputs.signatures[[6, 7]])
    assert torch.equal(prune_latents(circuit, 1.0)(IMAGES), circuit(IMAGES))


@pytest.mark.parametrize(("keep", "kept"), [(1.0, 16), (1, 1), (16, 16), (0.5, 8), (0.01, 1), (0.47, 8), (0.46, 7)])
def test_fractions_and_numbers(keep: float | int, kept: int) -> None:
    assert prune_latents(micro(), keep).graph.mediator_latents.num_latents == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "of 16 latents 1 to 16 can stay"),
        ({"keep": 25}, "for 25 % give 0.25"),
        ({"keep": 8.0}, "for 8 latents give the integer 8"),
        ({"keep": 0.0}, "a fraction lies above 0"),
        ({"keep": -0.5}, "a fraction lies above 0"),
        ({"keep": float("nan")}, "a fraction lies above 0"),
        ({"keep": True}, "give a fraction"),
        ({"keep": "half"}, "give a fraction"),
        ({"keep": 0.5, "keep_inputs": 9}, "keep_inputs is the integer 9"),
        ({"keep": 0.5, "score": torch.zeros(8)}, "score should be a tensor [16]"),
        ({"keep": 0.5, "score": [0.0] * 16}, "score should be a tensor [16]"),
        ({"keep": 0.5, "score": torch.zeros(16).index_fill(0, torch.tensor(3), torch.nan)}, "score of latent 3"),
        ({"keep": 0.5, "input_score": torch.zeros(16)}, "input_score should be a tensor [8]"),
    ],
)
def test_mistakes_name_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(M2MKDError) as error:
        prune_latents(micro(), **options)
    assert message in str(error.value)


def test_what_is_no_circuit_is_refused() -> None:
    with pytest.raises(M2MKDError, match="this is a Linear"):
        prune_latents(torch.nn.Linear(2, 2), 0.5)


def test_latents_bound_to_tokens_stay() -> None:
    config = variant_config("nac_micro", "ring", latent_graph_kwargs={"num_input_latents": 16})
    config["latent_graph_kwargs"] |= {"read_in_cls": "ProjectionReadIn", "read_in_kwargs": {}}
    circuit = NeuralAttentiveCircuit.from_config(config, fit_signatures=False).eval()
    with pytest.raises(M2MKDError, match="build the circuit with AttentiveReadIn"):
        prune_latents(circuit, 0.5, keep_inputs=0.5)
    assert prune_latents(circuit, 0.5)(IMAGES).shape == (3, 10)


def test_a_copy_has_parameters_of_its_own() -> None:
    circuit = micro(share_propagator_weights=True)
    circuit(IMAGES).sum().backward()
    circuit.graph.mediator_latents.codes_.requires_grad_(False)
    pruned = prune_latents(circuit, 0.5)
    assert all(parameter.grad is None for parameter in pruned.parameters())
    assert not pruned.graph.mediator_latents.codes_.requires_grad
    assert pruned.graph.propagators[0] is pruned.graph.propagators[1], "shared layers stay shared"
    assert not {id(parameter) for parameter in circuit.parameters()} & {id(p) for p in pruned.parameters()}


def walk_weights(circuit: NeuralAttentiveCircuit) -> tuple[Tensor, Tensor]:
    """The score by its definition: every path of messages and residuals from an input to an output, one by one."""
    *propagators, read_out = layer_links(circuit)
    shares = [layer.probability / layer.probability.sum(dim=1, keepdim=True) for layer in [*propagators, read_out]]
    inputs, mediators = shares[0].shape[1] - shares[0].shape[0], shares[0].shape[0]
    through, into = torch.zeros(mediators), torch.zeros(inputs)

    def walk(depth: int, node: int, weight: float, source: int, heard_by: list[int]) -> None:
        """`node` holds what came from `source` before layer `depth`; `heard_by` are the mediators it has entered."""
        if depth == len(propagators):
            ends = weight * float(shares[-1][:, inputs + node].mean())
            into[source] += ends
            for mediator in heard_by:
                through[mediator] += ends
            return
        walk(depth + 1, node, weight, source, heard_by)
        for receiver in range(mediators):
            step = float(shares[depth][receiver, inputs + node])
            if step:
                walk(depth + 1, receiver, weight * step, source, [*heard_by, receiver])

    for source in range(inputs):
        into[source] += float(shares[-1][:, source].mean())
        for depth in range(len(propagators)):
            for receiver in range(mediators):
                step = float(shares[depth][receiver, source])
                if step:
                    walk(depth + 1, receiver, step, source, [receiver])
    return into, through


def test_connectivity_is_the_weight_of_all_paths() -> None:
    circuit = micro(num_input_latents=2, num_mediator_latents=4, num_output_latents=2, num_iterations=3)
    circuit.graph.mediator_latents.signatures_.data.copy_(torch.randn(4, 16))
    into, through = walk_weights(circuit)
    degrees = connectivity(circuit)
    torch.testing.assert_close(degrees.input_latents.float(), into)
    torch.testing.assert_close(degrees.mediator_latents.float(), through)


def test_without_a_kernel_all_pairs_are_linked() -> None:
    circuit = micro()
    circuit.graph.propagators[0].latent_attention.kernel = None
    attention = circuit.graph.propagators[1].latent_attention
    attention.mask_scores = attention.scale_weights = False
    assert [bool(layer.probability.eq(1).all()) for layer in layer_links(circuit)] == [True, True, False]
    assert prune_latents(circuit, 4)(IMAGES).isfinite().all()


def test_links_follow_each_layers_kernel() -> None:
    circuit = micro(enable_persistent_input_mediator_communication=False)
    first, second = (propagator.latent_attention for propagator in circuit.graph.propagators)
    assert isinstance(second, LatentAttention)
    second.kernel.bandwidth.data.fill_(0.5)
    before, after, read_out = layer_links(circuit)
    assert [layer.name for layer in (before, after, read_out)] == ["propagators.0", "propagators.1", "read_out"]
    assert [layer.num_inputs for layer in (before, after, read_out)] == [8, 0, 8]
    assert first is before.attention
    torch.testing.assert_close(before.probability[:, 8:].square(), after.probability)
