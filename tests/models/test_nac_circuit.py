"""Circuits as a whole: determinism, precision, compilation, configuration errors, regularisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.models.nac import NeuralAttentiveCircuit
from m2mkd_fast.models.registry import create_model

IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def micro(graph: str = "ring", **overrides: Any) -> NeuralAttentiveCircuit:
    torch.manual_seed(0)
    return create_model(f"nac_micro.{graph}", **overrides)


def test_same_seed_same_model_and_same_noise() -> None:
    first, second = micro("scale_free"), micro("scale_free")
    for (name, tensor), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(first.train()(IMAGES))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], first(IMAGES)), "training is noisy"


@pytest.mark.parametrize("softmax", ["vanilla", "gumbel", "gumbel-hard"])
def test_evaluation_is_deterministic_unless_asked_otherwise(softmax: str) -> None:
    options = {"output_tokenizer_kwargs": {"softmax_type": softmax}}
    circuit = micro(**options).eval()
    assert torch.equal(circuit(IMAGES), circuit(IMAGES))
    noisy = micro(**options, stochastic_evaluation=True).eval()
    noisy.load_state_dict(circuit.state_dict())
    assert not torch.equal(noisy(IMAGES), noisy(IMAGES))


def test_an_image_is_evaluated_alone() -> None:
    circuit = micro().double().eval()
    images = IMAGES.double()
    alone = torch.cat([circuit(image) for image in images.split(1)])
    torch.testing.assert_close(circuit(images), alone, rtol=1e-12, atol=1e-12)


def test_kernel_that_samples_in_evaluation_is_noisy() -> None:
    kernel = {"kernel_kwargs": {"stochastic_eval_behaviour": "sample"}}
    circuit = micro(latent_graph_kwargs={"propagator_kwargs": {"latent_attention_kwargs": kernel}}).eval()
    assert not torch.equal(circuit(IMAGES), circuit(IMAGES))


def test_every_parameter_is_trained() -> None:
    circuit = micro().train()
    (circuit(IMAGES).square().sum() + circuit.regularization_loss()).backward()
    assert not [name for name, parameter in circuit.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_zero_codes_train() -> None:
    circuit = micro().train()
    for latents in (circuit.graph.input_latents, circuit.graph.mediator_latents, circuit.graph.output_latents):
        latents.codes_.data.zero_()
    circuit(IMAGES).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_isolated_mediators_stay_finite() -> None:
    """A signature of zero is at distance 1 from all others and itself: nobody is heard, and nothing is NaN."""
    circuit = micro().eval()
    circuit.graph.mediator_latents.signatures_.data[:3] = 0.0
    logits = circuit(IMAGES)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in circuit.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    circuit = micro().train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        logits = circuit(IMAGES)
        logits.float().square().sum().backward()
    torch.manual_seed(1)
    expected = circuit(IMAGES)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_break(training: bool) -> None:
    circuit = micro(latent_graph_kwargs={"num_iterations": 1}).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(circuit, fullgraph=True, backend="aot_eager")
    if training:
        compiled(IMAGES).sum().backward()
    else:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(IMAGES), circuit(IMAGES))


def test_half_precision_weights() -> None:
    circuit = micro().bfloat16().train()
    logits = circuit(IMAGES.bfloat16())
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert micro()(torch.empty(3, 1, 16, 16)).shape == (3, 10)


def test_state_dict_round_trip() -> None:
    circuit = micro().eval()
    other = create_model("nac_micro.ring", fit_signatures=False).eval()
    other.load_state_dict(circuit.state_dict(), strict=True)
    assert torch.equal(circuit(IMAGES), other(IMAGES))


@pytest.mark.parametrize(
    ("overrides", "near"),
    [
        ({"latent_graph_kwarg": {}}, "latent_graph_kwargs"),
        ({"latent_graph_kwargs": {"num_head": 4}}, "num_heads"),
        ({"latent_graph_kwargs": {"mod_fc_kwargs": {"scale_gian": 1.0}}}, "scale_gain"),
        ({"latent_graph_kwargs": {"read_in_kwargs": {"head_dims": 8}}}, "head_dim"),
        ({"latent_graph_kwargs": {"propagator_kwargs": {"use_geglue": True}}}, "use_geglu"),
        ({"latent_graph_kwargs": {"mediator_latent_kwargs": {"graph_presets": "complete"}}}, "graph_preset"),
        ({"latent_graph_kwargs": {"mediator_latent_kwargs": {"graph_preset": "ring-of-clique"}}}, "ring-of-cliques"),
        (
            {"latent_graph_kwargs": {"mediator_latent_kwargs": {"graph_generator_kwargs": {"n_cliques": 4}}}},
            "num_cliques",
        ),
        (
            {
                "latent_graph_kwargs": {
                    "propagator_kwargs": {"latent_attention_kwargs": {"kernel_kwargs": {"truncations": 0.9}}}
                }
            },
            "truncation",
        ),
        ({"input_tokenizer_kwargs": {"capacity_preset": "tinny"}}, "tiny"),
        ({"input_tokenizer_kwargs": {"positional_grid_kwargs": {"grid_sizes": [4, 4]}}}, "grid_size"),
        ({"input_tokenizer_type": "ConvNextImageTokenizer"}, "ConvNeXtImageTokenizer"),
        ({"output_tokenizer_type": "OutputLatentPool"}, "OutputLatentPooling"),
        ({"output_tokenizer_kwargs": {"softmax_type": "gumble"}}, "gumbel"),
        ({"graph_sparsity": {"type": "signature_hinge"}}, "signature_hinge_repulsion"),
        ({"graph_sparsity": {"kwargs": {"reductions": "sum"}}}, "reduction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_names_have_suggestions(overrides: dict[str, Any], near: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        micro(**overrides)
    assert near in error.value.near


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"latent_graph_kwargs": {"num_mediator_latents": 15}}, "16 nodes, but there are 15 latents"),
        ({"latent_graph_kwargs": {"num_iterations": 0}}, "num_iterations must be 1 or more, got 0"),
        ({"latent_graph_kwargs": {"path_drop_prob": 1.0}}, "below 1, got 1.0"),
        ({"latent_graph_kwargs": {"read_out_kwargs": {"path_drop_prob": 0.1}}}, "include_residual"),
        ({"input_tokenizer_kwargs": {"num_stages": 4}}, "num_stages must be 1, 2 or 3, got 4"),
        ({"img_size": 18}, "multiple of 4, got 18"),
    ],
)
def test_contradictions_are_explained(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(M2MKDError, match=message):
        micro(**overrides)


def test_missing_option_is_named() -> None:
    with pytest.raises(M2MKDError, match="'state_dim'"):
        NeuralAttentiveCircuit.from_config({"input_dim": 3, "output_dim": 10})


def test_image_of_another_size_is_explained() -> None:
    with pytest.raises(M2MKDError, match=r"\(4, 4\).*\(5, 5\)"):
        micro()(torch.randn(1, 1, 20, 20))


def test_projection_read_in_needs_as_many_latents_as_tokens() -> None:
    options = {"read_in_cls": "ProjectionReadIn", "read_in_kwargs": None}
    with pytest.raises(M2MKDError, match="8 latents and 16 tokens"):
        micro(latent_graph_kwargs=options)(IMAGES)


@pytest.mark.parametrize("graph", ["ring", "planted"])
def test_regularization_moves_signatures_alone(graph: str) -> None:
    circuit = micro(graph)
    loss = circuit.regularization_loss()
    assert loss.shape == ()
    loss.backward()
    moved = {name for name, parameter in circuit.named_parameters() if parameter.grad is not None}
    assert moved
    assert all(name.endswith(("signatures_", "kernel.bandwidth")) for name in moved)


def test_regularization_is_weighed_and_can_be_off() -> None:
    sparsity = {"type": "signature_hinge_repulsion", "use": True, "hinge": 0.4}
    losses = [
        micro(graph_sparsity=options).regularization_loss()
        for options in (sparsity | {"weight": 1.0}, sparsity | {"weight": 0.1}, sparsity | {"use": False})
    ]
    assert losses[0] < 0, "minus a sum of distances"
    torch.testing.assert_close(losses[1], 0.1 * losses[0])
    assert losses[2] == 0
