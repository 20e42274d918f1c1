"""Named variants against the published configurations and checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from m2mkd_fast.models.nac import NeuralAttentiveCircuit
from m2mkd_fast.models.nac.variants import variant_config
from m2mkd_fast.models.registry import create_model, list_models

PUBLISHED = {
    "nac_erdos_imnet": "nac_imagenet.erdos",
    "nac_erdos_tinyimnet": "nac_tiny.erdos",
    "nac_planted_imnet": "nac_imagenet.planted",
    "nac_planted_tinyimnet": "nac_tiny.planted",
    "nac_ring_imnet": "nac_imagenet.ring",
    "nac_ring_tinyimnet": "nac_tiny.ring",
    "nac_scale_fewshot": "nac_fewshot.scale_free",
    "nac_scale_imnet": "nac_imagenet.scale_free",
    "nac_scale_tinyimnet": "nac_tiny.scale_free",
}
# Without effect, or equal to the default that holds without it.
WITHOUT_EFFECT = {
    "simplified_interface",
    "input_tokenizer_kwargs.capacity_preset",
    "latent_graph_kwargs.input_latent_kwargs",
    "latent_graph_kwargs.output_latent_kwargs",
    "latent_graph_kwargs.read_in_kwargs.num_heads",
}


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_golden_manifest_has_no_other_circuit(golden_manifest) -> None:
    assert {name for name in golden_manifest if name.startswith("nac_") and "student" not in name} == set(PUBLISHED)


@pytest.mark.parametrize("published", PUBLISHED)
def test_golden_variant_is_the_published_configuration(golden_manifest, published: str) -> None:
    entry = golden_manifest[published]
    ours = variant_config(*PUBLISHED[published].split("."))
    sparsity = ours.pop("graph_sparsity")
    ours, theirs = flat(ours), flat(entry["config"])
    assert {key: value for key, value in ours.items() if key not in WITHOUT_EFFECT} == {
        key: value for key, value in theirs.items() if key not in WITHOUT_EFFECT
    }
    assert sparsity == entry["criterion"]["graph_sparsity"]


@pytest.mark.parametrize("published", PUBLISHED)
def test_golden_state_names_and_shapes(golden_manifest, published: str) -> None:
    entry = golden_manifest[published]
    with torch.device("meta"):
        models = [create_model(PUBLISHED[published]), NeuralAttentiveCircuit.from_config(entry["config"])]
    for model in models:
        assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == entry["state"]


def test_all_are_registered() -> None:
    micro = [f"nac_micro.{graph}" for graph in ("erdos", "planted", "ring", "scale_free")]
    assert list_models("nac_*") == sorted([*PUBLISHED.values(), *micro])


@pytest.mark.parametrize("graph", ["erdos", "planted", "ring", "scale_free"])
def test_micro_learns_a_batch_by_heart(graph: str) -> None:
    torch.manual_seed(0)
    circuit = create_model(f"nac_micro.{graph}")
    images, labels = torch.randn(10, 1, 16, 16), torch.arange(10)
    optimizer = torch.optim.AdamW(circuit.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(circuit(images), labels).backward()
        optimizer.step()
    assert (circuit.eval()(images).argmax(dim=1) == labels).float().mean() >= 0.9


def test_overrides() -> None:
    model = create_model("nac_micro.ring", num_classes=3, img_size=24, in_chans=2, fit_signatures=False)
    assert model(torch.randn(2, 2, 24, 24)).shape == (2, 3)
    deeper = create_model("nac_micro.ring", latent_graph_kwargs={"num_iterations": 5}, fit_signatures=False)
    assert deeper.num_modules == 7
    assert deeper.graph.propagators[0].latent_attention.num_heads == 4, "other nested options stay"


def test_overrides_do_not_leak_into_the_variant() -> None:
    before = variant_config("nac_micro", "ring")
    create_model("nac_micro.ring", latent_graph_kwargs={"num_iterations": 5}, fit_signatures=False)
    assert variant_config("nac_micro", "ring") == before
