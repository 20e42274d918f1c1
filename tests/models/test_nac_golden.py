"""Circuits and regularisers against what the published code computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.nac import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.regularizers import SignatureHingeRepulsion, StochasticBlockModelRegularization
from m2mkd_fast.modules.state import load_strict

NO_CIRCUIT = ("nac_sampled_affinity*", "nac_regularizers*")


def load_circuit(metadata, tensors) -> NeuralAttentiveCircuit:
    circuit = NeuralAttentiveCircuit.from_config(metadata["config"], fit_signatures=False).double().eval()
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    load_strict(circuit, state, "the golden file")  # also finds two values for one shared weight
    return circuit


def check_gradients(module: torch.nn.Module, tensors, prefix: str, assert_golden) -> None:
    """Every gradient of the file, and none beside them."""
    gradients = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    computed = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == computed.keys()
    for name, expected in gradients.items():
        assert_golden(computed[name], expected, prefix + name)


def check_circuit(path: Path, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(path)
    circuit = load_circuit(metadata, tensors)
    images = tensors["in/x"].requires_grad_()
    states = circuit.forward_states(images)
    assert_golden(states.logits, tensors["out/y"], "out/y")
    for key, expected in tensors.items():
        if key.startswith("mid/"):
            assert_golden(getattr(states, key.removeprefix("mid/")), expected, key)
    (states.logits * tensors["in/grad_y"]).sum().backward()
    check_gradients(circuit, tensors, "grad/", assert_golden)
    assert_golden(images.grad, tensors["grad_in/x"], "grad_in/x")


@pytest.mark.golden_case("nac_*.safetensors", exclude=NO_CIRCUIT)
def test_golden_circuit(golden_case, read_golden, assert_golden) -> None:
    check_circuit(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("nac_shared_weights_*.safetensors")
def test_golden_circuit_check_notices_a_shared_weight_with_two_values(
    golden_case, altered_golden, read_golden, assert_golden
) -> None:
    name = "latent_graphs.0.propagators.0.latent_attention.query_compiler.scale_gain"
    with pytest.raises(M2MKDError, match="contradictory .*query_compiler.scale_gain"):
        check_circuit(altered_golden(golden_case, f"state/{name}"), read_golden, assert_golden)


@pytest.mark.golden_case("nac_*.safetensors", exclude=NO_CIRCUIT)
@pytest.mark.parametrize(
    "name", ["out/y", "mid/mediator_states", "grad/latent_graphs.0.mediator_latents.codes_", "grad_in/x"]
)
def test_golden_circuit_check_notices_one_wrong_number(
    golden_case, name, altered_golden, read_golden, assert_golden
) -> None:
    with pytest.raises(AssertionError, match=name):
        check_circuit(altered_golden(golden_case, name), read_golden, assert_golden)


def check_regularizers(path: Path, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(path)
    for name, arguments in metadata.items():
        if f"{name}/loss" not in tensors:
            continue
        circuit = load_circuit(metadata, tensors)
        if name.startswith("hinge_repulsion"):
            regularizer = SignatureHingeRepulsion(**arguments)
        else:
            regularized = arguments.pop("latents")
            chosen = {f"regularize_{kind}_latents": kind in regularized for kind in ("input", "mediator", "output")}
            regularizer = StochasticBlockModelRegularization(**arguments, **chosen)
        loss = regularizer(circuit.graph)
        assert_golden(loss, tensors[f"{name}/loss"], f"{name}/loss")
        loss.backward()
        check_gradients(circuit, tensors, f"{name}/grad/", assert_golden)


@pytest.mark.golden_case("nac_regularizers*")
def test_golden_regularizers(golden_case, read_golden, assert_golden) -> None:
    metadata, tensors = read_golden(golden_case)
    assert sum(f"{name}/loss" in tensors for name in metadata) == sum(key.endswith("/loss") for key in tensors) > 0
    check_regularizers(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("nac_regularizers*")
@pytest.mark.parametrize(
    "name",
    [
        "hinge_repulsion_mean/loss",
        "hinge_repulsion_sum/grad/latent_graphs.0.input_latents.signatures_",
        "stochastic_block_model/loss",
        "stochastic_block_model/grad/latent_graphs.0.propagators.1.latent_attention.kernel.bandwidth",
    ],
)
def test_golden_regularizer_check_notices_one_wrong_number(
    golden_case, name, altered_golden, read_golden, assert_golden
) -> None:
    with pytest.raises(AssertionError, match=name):
        check_regularizers(altered_golden(golden_case, name), read_golden, assert_golden)
