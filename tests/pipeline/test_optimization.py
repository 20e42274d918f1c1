from __future__ import annotations

import pytest
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.models.registry import create_model
from m2mkd_fast.modules.chain import ModuleChain
from m2mkd_fast.modules.split import split
from m2mkd_fast.modules.student import student_modules
from m2mkd_fast.pipeline.config import TrainingConfig, make_config
from m2mkd_fast.pipeline.optimization import LearningRate, create_optimizer

TINY = {"embed_dim": 8, "depth": 3, "num_heads": 2, "img_size": 8, "num_classes": 4}


def scales(model: nn.Module, decay: float = 0.5) -> dict[str, int]:
    """How many layers lie between each parameter and the last layer."""
    optimizer = create_optimizer(model, TrainingConfig(layer_decay=decay))
    powers = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            powers[names.pop(id(parameter))] = round(torch.tensor(group["lr_scale"]).log2().neg().item())
    assert not names  # every parameter is trained
    return powers


def layer(powers: dict[str, int], start: str) -> int:
    """The power that all parameters of this name have, or begin with."""
    (found,) = {power for name, power in powers.items() if name.startswith(start)}
    return found


@pytest.mark.parametrize("name", ["vit_micro", "vmoe_micro.m2mkd"])
def test_layers_of_a_transformer_are_stem_blocks_and_head(name):
    powers = scales(create_model(name, **TINY))
    assert [layer(powers, start) for start in ("patch_embed", "pos_embed", "blocks.0", "blocks.1", "blocks.2")] == [
        *(4, 4),
        *(3, 2, 1),
    ]
    assert layer(powers, "norm") == 1 and layer(powers, "head") == 0


def test_layers_of_a_chain_are_those_of_its_modules_in_a_row():
    powers = scales(split(create_model("vit_micro", **TINY), 3))
    starts = ["stages.0.patch_embed", "stages.0.blocks", "stages.1.blocks", "stages.2.blocks", "stages.2.head"]
    assert [layer(powers, start) for start in starts] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("name", ["vit_micro", "vmoe_micro.m2mkd"])
def test_stitches_stand_in_the_row(name):
    modules = student_modules(create_model(name, **TINY), 3, [6, 6])
    powers = scales(ModuleChain(modules))
    in_blocks = name.startswith("vmoe")
    place = "blocks.0." if in_blocks else ""
    order = [
        *("stages.0.patch_embed", "stages.0.blocks.0.norm1", f"stages.0.{place}post_stitch"),
        *(f"stages.1.{place}pre_stitch", "stages.1.blocks.0.norm1", f"stages.1.{place}post_stitch"),
        *(f"stages.2.{place}pre_stitch", "stages.2.blocks.0.norm1", "stages.2.head"),
    ]
    expected = [4, 3, 3, 2, 2, 2, 1, 1, 0] if in_blocks else [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [layer(powers, start) for start in order] == expected


def test_layers_of_a_circuit():
    circuit = create_model("nac_micro.ring", num_classes=4, fit_signatures=False)
    powers = scales(circuit)
    graph, depth = "latent_graphs.0", len(circuit.graph.propagators)
    assert [layer(powers, f"{graph}.propagators.{i}.") for i in range(depth)] == list(range(depth, 0, -1))
    assert layer(powers, "input_tokenizer") == depth + 2
    assert layer(powers, f"{graph}.read_in") == layer(powers, f"{graph}.mediator_latents") == depth + 1
    assert layer(powers, f"{graph}.read_out") == layer(powers, "output_tokenizer") == 0
    read_in, *mediators, read_out = student_modules(circuit, None, [6] * (depth + 1))
    assert [layer(scales(read_in), start) for start in ("tokenizer", "read_in", "post_stitch")] == [2, 1, 0]
    for mediator in mediators:
        found = scales(mediator)
        starts = ["pre_stitch", "latent_attention", "ffn", "post_stitch"]
        assert [layer(found, start) for start in starts] == [2, 1, 1, 0]
    found = scales(read_out)
    assert [layer(found, start) for start in ("pre_stitch", "latent_attention", "tokenizer")] == [2, 1, 0]


def test_layers_of_a_model_cut_along_its_graph():
    import timm

    model = timm.create_model("resnet10t", num_classes=4)
    powers = scales(split(model, 2, (3, 32, 32)))
    units = [layer(powers, start) for start in ("stages.0.conv1", "stages.0.layer1.0", "stages.0.layer2.0")]
    units += [layer(powers, start) for start in ("stages.1.layer3.0", "stages.1.layer4.0", "stages.1.fc")]
    assert units == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_the_rate_follows_warm_up_and_cosine_or_a_factor_times_the_scale_of_the_layer(optimizer):
    model = create_model("vit_micro", **TINY)
    config = TrainingConfig(steps=10, learning_rate=1.0, warmup=0.2, layer_decay=0.5, optimizer=optimizer)
    made = create_optimizer(model, config)
    rate = LearningRate(made, config)
    values = []
    for t in range(10):
        rate.set(t)
        values.append(rate.value)
        assert [group["lr"] for group in made.param_groups] == pytest.approx(
            [group["lr_scale"] * rate.value for group in made.param_groups]
        )
    assert values[:3] == pytest.approx([0.01, 0.505, 0.5 + 0.5 * torch.tensor(0.2 * torch.pi).cos().item()])
    assert values[2:] == sorted(values[2:], reverse=True)
    rate = LearningRate(made, config, lambda t: 1 / (1 + t))
    rate.set(3)
    assert rate.value == pytest.approx(0.25)
    assert made.param_groups[0]["lr"] == pytest.approx(0.25 * made.param_groups[0]["lr_scale"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("accumulate", 3, "batch_size=16 cannot be cut into pair.train.accumulate=3 equal micro-batches"),
        ("accumulate", 0, "pair.train.accumulate must be at least 1"),
        ("layer_decay", 1.5, "pair.train.layer_decay must be above 0 and at most 1"),
        ("max_skipped", -1, "pair.train.max_skipped must be at least 0"),
    ],
)
def test_values_that_no_step_could_use_are_named(key, value, message):
    with pytest.raises(M2MKDError, match=message):
        make_config([{"pair": {"train": {"batch_size": 16, key: value}}}])
