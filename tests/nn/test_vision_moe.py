"""The mixture layer: the official V-MoE layer's recorded numbers, and what training and reports read from it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from host_reads import HostReads
from torch import Tensor, nn

from m2mkd_fast._extension import why_missing
from m2mkd_fast.backend import use_backend
from m2mkd_fast.checks import debug
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.router import ROUTERS, inference_routing
from m2mkd_fast.nn.vision_moe import VisionMoE, auxiliary_losses, expert_load

Check = Callable[[Tensor | None, Tensor, str], None]
GATES = {"tokens choose experts": "softmax_top_k", "experts choose tokens": "experts_choose"}
WEIGHTED = {"importance_loss": "importance", "load_loss": "load", "gshard_loss": "gshard"}


def golden_layer(case: dict[str, Any], recorded: dict[str, Tensor]) -> VisionMoE:
    """The layer of one recorded case; every group is a group of one image."""
    losses = {f"{name}_weight": 1.0 for name in WEIGHTED if name in recorded and name != "load_loss"}
    layer = VisionMoE(
        case["dim"],
        case["hidden"],
        case["experts"],
        case["top_k"],
        act_layer={"erf": "gelu", "tanh": "gelu_tanh"}[case["gelu"]],
        gate=GATES[case["router"]],
        noise_std=case["noise_std"],
        capacity_factor=case["capacity_factor"],
        batch_priority=case["batch_priority"],
        group_size=1,
        **losses,
        load_loss_weight=float("load_loss" in recorded),
        dtype=torch.float64,
    )
    state = {"gate.gate.weight": "gate_weight", "experts.htoh4.weight": "w1", "experts.htoh4.bias": "b1"}
    state |= {"experts.h4toh.weight": "w2", "experts.h4toh.bias": "b2"}
    layer.load_state_dict({name: recorded[key] for name, key in state.items()})
    return layer.train()


def check_layer_file(path: Path, read: Callable, check: Check) -> None:
    """Compare all that the file records with the layer: outputs, choices, losses and gradients."""
    metadata, tensors = read(path)
    assert metadata
    for name, case in metadata.items():
        recorded = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        layer = golden_layer(case, recorded)
        x = recorded["x"].clone().requires_grad_()
        noise = None if case["deterministic"] else recorded["noise"]
        routing = layer.gate(x, noise)
        y = layer(x, noise)

        computed = {"y": y, "gates": routing.assignment.gates, "logits": routing.logits}
        weight = layer.gate.gate.weight
        for loss, short in WEIGHTED.items():
            if loss in recorded:
                # The file has one value a group, and the gradient of their sum; the layer has the mean over groups.
                computed[f"grad_gate_weight_{loss}"] = sum_gradient(routing.losses[short], weight, case["groups"])
                check(routing.losses[short], recorded[loss].mean(), f"{name}/{loss}")
        inputs = {"grad_x": x, "grad_gate_weight": weight, "grad_w1": layer.experts.htoh4.weight}
        inputs |= {"grad_b1": layer.experts.htoh4.bias, "grad_w2": layer.experts.h4toh.weight}
        inputs |= {"grad_b2": layer.experts.h4toh.bias}
        gradients = torch.autograd.grad((y * recorded["grad_y"]).sum(), list(inputs.values()))
        computed |= dict(zip(inputs, gradients, strict=True))

        given = {"x", "gate_weight", "w1", "b1", "w2", "b2", "noise", "grad_y"}
        assert computed.keys() | WEIGHTED.keys() & recorded.keys() | given | {"assignment"} == recorded.keys()
        for key, value in computed.items():
            check(value, recorded[key], f"{name}/{key}")
        check_choices(routing.assignment, recorded["assignment"], case)
        assert set(routing.losses) == {WEIGHTED[key] for key in recorded.keys() & WEIGHTED.keys()}
        for group in range(case["groups"]):
            alone = layer.gate(recorded["x"][group : group + 1], None if noise is None else noise[group : group + 1])
            for loss in recorded.keys() & WEIGHTED.keys():
                check(alone.losses[WEIGHTED[loss]], recorded[loss][group], f"{name}/{loss} of group {group}")


def sum_gradient(loss: Tensor, weight: Tensor, groups: int) -> Tensor:
    return torch.autograd.grad(loss * groups, weight, retain_graph=True)[0]


def check_choices(assignment: Any, recorded: Tensor, case: dict[str, Any]) -> None:
    """The set of (token, expert) pairs that were kept, against the recorded buffer places."""
    used = int(assignment.offsets[-1])
    kept = sorted(zip(assignment.token[:used].tolist(), assignment.expert[:used].tolist(), strict=True))
    if case["router"] == "tokens choose experts":
        group, token, choice = torch.nonzero(recorded[..., 1] < case["capacity"], as_tuple=True)
        expert = recorded[group, token, choice, 0]
    else:
        group, token, expert = torch.nonzero(recorded.sum(dim=-1), as_tuple=True)
    wanted = sorted(zip((group * case["tokens"] + token).tolist(), expert.tolist(), strict=True))
    assert kept == wanted


@pytest.mark.golden_case("vmoe_layer*.safetensors")
def test_golden_layer(golden_case: Path, read_golden: Callable, assert_golden: Check) -> None:
    check_layer_file(golden_case, read_golden, assert_golden)


@pytest.mark.golden_case("vmoe_layer*.safetensors")
@pytest.mark.parametrize("changed", ["y", "gates", "load_loss", "grad_w2", "grad_gate_weight_load_loss", "w1"])
def test_golden_layer_notices_a_changed_number(
    golden_case: Path, changed: str, altered_golden: Callable, read_golden: Callable, assert_golden: Check
) -> None:
    copied = altered_golden(golden_case, f"top2_capacity1_vanilla/{changed}")
    with pytest.raises(AssertionError, match="relative error"):
        check_layer_file(copied, read_golden, assert_golden)


def small_layer(**arguments: Any) -> VisionMoE:
    torch.manual_seed(0)
    return VisionMoE(8, 16, **{"num_experts": 4, "top_k": 2, **arguments})


def test_a_token_gets_the_weighted_sum_of_its_experts() -> None:
    layer = small_layer(**ROUTERS["m2mkd"]).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    logits = F.linear(x, layer.gate.gate.weight, layer.gate.gate.bias)
    up, down = layer.experts.htoh4, layer.experts.h4toh
    wanted = torch.zeros_like(x)
    for index in [(image, token) for image in range(3) for token in range(5)]:
        best = logits[index].topk(2)
        for expert, weight in zip(best.indices.tolist(), best.values.softmax(dim=0), strict=True):
            hidden = F.gelu(up.weight[expert] @ x[index] + up.bias[expert])
            wanted[index] += weight * (down.weight[expert] @ hidden + down.bias[expert])
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["m2mkd", "vmoe"])
def test_evaluation_is_deterministic_and_leaves_no_losses(router: str) -> None:
    layer = small_layer(**ROUTERS[router])
    x = torch.randn(4, 6, 8)
    layer.train()(x)
    assert (layer.auxiliary_loss is not None) == (router == "vmoe")
    first = layer.eval()(x)
    assert torch.equal(first, layer(x))
    assert layer.auxiliary_loss is None
    assert layer.losses == {}


def test_same_seed_gives_the_same_bits() -> None:
    def run() -> list[Tensor]:
        layer = small_layer(**ROUTERS["vmoe"], drop=0.1).train()
        x = torch.randn(16, 6, 8, requires_grad=True)
        y = layer(x)
        (y.square().sum() + auxiliary_losses(layer)).backward()
        return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_noise_acts_in_training_only() -> None:
    layer = small_layer(noise_std=1.0).train()
    x = torch.randn(4, 6, 8)
    assert not torch.equal(layer(x), layer(x))


def test_auxiliary_losses_are_the_weighted_sum_over_layers() -> None:
    plain = small_layer()
    router = {"noise_std": 1.0, "importance_loss_weight": 0.5, "load_loss_weight": 0.25, "gshard_loss_weight": 2.0}
    model = nn.Sequential(small_layer(**router, z_loss_weight=3.0), small_layer(**router), plain).train()
    assert auxiliary_losses(model) == 0, "nothing has run yet"
    model(torch.randn(4, 6, 8))
    first, second = model[0].losses, model[1].losses
    assert set(first) == {"importance", "load", "gshard", "z"}
    wanted = 0.5 * first["importance"] + 0.25 * first["load"] + 2.0 * first["gshard"] + 3.0 * first["z"]
    wanted = wanted + 0.5 * second["importance"] + 0.25 * second["load"] + 2.0 * second["gshard"]
    torch.testing.assert_close(auxiliary_losses(model), wanted)
    auxiliary_losses(model).backward()
    assert model[0].gate.gate.weight.grad.abs().sum() > 0
    assert plain.gate.gate.weight.grad is None
    assert auxiliary_losses(nn.Linear(2, 2)) == 0


def test_expert_load_names_the_block_and_adds_up() -> None:
    model = nn.ModuleDict(
        {"block": nn.ModuleDict({"moe": small_layer()}), "idle": nn.ModuleDict({"moe": small_layer()})}
    )
    layer = model["block"]["moe"]
    with torch.no_grad():
        layer.gate.gate.weight.zero_()
        layer.gate.gate.weight[1, 0] = layer.gate.gate.weight[3, 0] = 1.0
    layer(torch.ones(2, 5, 8))
    assert expert_load(model) == {"block": [0.0, 0.5, 0.0, 0.5]}
    layer(torch.ones(0, 5, 8))
    assert expert_load(model) == {"block": [0.0, 0.0, 0.0, 0.0]}


def test_a_layer_that_has_run_can_be_copied_and_pickled() -> None:
    layer = small_layer(**ROUTERS["vmoe"]).train()
    x = torch.randn(4, 6, 8)
    layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.auxiliary_loss is None
        assert copied.losses == {}
        assert torch.equal(copied.eval()(x), layer.eval()(x))
        layer.train()
    assert layer.rows_per_expert is not None, "the original keeps what it holds"


@pytest.mark.parametrize("router", ["m2mkd", "vmoe"])
def test_a_layer_can_start_on_the_meta_device(router: str) -> None:
    layer = small_layer(**ROUTERS[router], act_layer="geglu", device="meta").train()
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.gate(torch.empty(4, 6, 8, device="meta")).assignment.place.shape == (24, 2)
    layer.to_empty(device="cpu").apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
    fresh = small_layer(**ROUTERS[router], act_layer="geglu")
    for parameter, other in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert 0.5 < parameter.std() / other.std() < 2.0
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, 8)
    assert torch.equal(layer.eval()(x), fresh.eval()(x))


def test_in_a_sequence_and_checkpointed() -> None:
    model = nn.Sequential(nn.LayerNorm(8), small_layer(**ROUTERS["vmoe"], drop=0.5), nn.Linear(8, 3)).train()
    x = torch.randn(4, 6, 8)
    gradients = []
    for run in (model, partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)):
        model.zero_grad()
        torch.manual_seed(3)
        (run(x).square().sum() + auxiliary_losses(model)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_inference_routing_reaches_the_layers_of_a_model() -> None:
    model = nn.Sequential(small_layer(), small_layer(num_experts=3)).eval()
    x = torch.randn(4, 6, 8)
    before = model(x)
    with inference_routing(model, top_k=1, capacity_factor=1.0, batch_priority=True):
        model(x)
        assert all(layer.rows_per_expert.sum() <= 24 for layer in model)
        assert all(layer.rows_per_expert.max() <= 8 for layer in model)
    assert torch.equal(model(x), before)


def test_debugging_names_numbers_that_are_not_finite() -> None:
    layer = small_layer(**ROUTERS["m2mkd"])
    x = torch.randn(4, 6, 8)
    with torch.no_grad(), debug():
        layer(x)
        layer.experts.h4toh.weight[:, 5, 2] = float("inf")
        with pytest.raises(M2MKDError, match=r"24 of 192 outputs of experts .*at index \[0, 5\]. Look at the experts"):
            layer(x)
        layer.experts.h4toh.weight[:, 5, 2] = 0.0
    x[2, 3, 0] = float("nan")
    assert layer(x).isfinite().all(dim=-1).sum() == 23, "elsewhere only that token suffers"
    with debug(), pytest.raises(M2MKDError, match=r"4 of 96 routing scores .*at index \[0, 15, 0\]"):
        layer(x)


def test_dropped_tokens_get_zero() -> None:
    layer = small_layer(top_k=1, capacity_factor=0.1).eval()
    y = layer(torch.randn(1, 40, 8))
    assert (y.abs().sum(dim=-1) > 0).sum() == layer.rows_per_expert.sum() < 40


@pytest.mark.parametrize("gate", ["softmax_top_k", "top_k_softmax", "sigmoid", "experts_choose"])
@pytest.mark.parametrize("act_layer", ["gelu", "swiglu"])
def test_autocast_keeps_the_router_in_float32(gate: str, act_layer: str) -> None:
    layer = small_layer(gate=gate, capacity_factor=2.0, act_layer=act_layer, importance_loss_weight=1.0).train()
    x = torch.randn(4, 6, 8, requires_grad=True)
    wanted = layer.gate(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing, y = layer.gate(x), layer(x)
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.assignment.weight.dtype == layer.auxiliary_loss.dtype == torch.float32
    assert torch.equal(routing.logits, wanted.logits)
    assert torch.equal(routing.assignment.token, wanted.assignment.token)
    (y.float().square().sum() + auxiliary_losses(layer)).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())
    assert x.grad.dtype == torch.float32
    assert (y.float() - layer(x)).abs().max() < 0.02 * y.abs().max()
    rounded = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    (layer(x).square().sum() + auxiliary_losses(layer)).backward()
    for parameter, gradient in zip(layer.parameters(), rounded, strict=True):
        assert (gradient - parameter.grad).norm() < 0.03 * parameter.grad.norm()


def test_bfloat16_model_routes_in_float32() -> None:
    layer = small_layer(**ROUTERS["m2mkd"]).bfloat16()
    x = torch.randn(4, 6, 8, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.gate(x).logits.dtype == torch.float32


@pytest.mark.skipif(why_missing("_C") is not None, reason=str(why_missing("_C")))
@pytest.mark.parametrize("router", ["m2mkd", "vmoe"])
def test_a_training_step_reads_nothing_back(router: str) -> None:
    layer = small_layer(**ROUTERS[router], drop=0.25).train()
    x = torch.randn(8, 6, 8, requires_grad=True)
    with HostReads() as reads, use_backend("cpu"):
        torch.ones(()).item()
        y = layer(x)
        (y.square().sum() + auxiliary_losses(layer)).backward()
    assert reads.count == 1, "the first line's own"


COMPILED = {
    "m2mkd": {**ROUTERS["m2mkd"], "gshard_loss_weight": 1.0},
    "vmoe": {**ROUTERS["vmoe"], "z_loss_weight": 1.0, "batch_priority": True, "act_layer": "swiglu", "drop": 0.25},
}


@pytest.mark.parametrize(("router", "training"), [("m2mkd", True), ("vmoe", True), ("vmoe", False)])
def test_compiles_without_graph_breaks(router: str, training: bool) -> None:
    torch._dynamo.reset()
    layer = small_layer(**COMPILED[router]).train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 6, 8)
    results = []
    for module in (layer, compiled):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(7)  # of the noise and of dropout
        y = module(own)
        loss = y.square().sum() + auxiliary_losses(module)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in layer.parameters()]
        results.append([y.detach(), own.grad, loss.detach(), layer.rows_per_expert, *gradients])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    assert (auxiliary_losses(compiled) > 0) == training


def test_serves_as_timm_mlp_layer() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=8,
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        num_classes=3,
        mlp_layer=partial(VisionMoE, num_experts=4),
    )
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    assert list(expert_load(model)) == ["blocks.0"]


def test_a_norm_within_the_experts_is_refused() -> None:
    with pytest.raises(M2MKDError, match="scale_mlp_norm"):
        VisionMoE(8, norm_layer=nn.LayerNorm)


def test_takes_feature_maps() -> None:
    layer = small_layer(out_features=6).eval()
    x = torch.randn(2, 3, 5, 8)
    assert layer(x).shape == (2, 3, 5, 6)
    assert torch.equal(layer(x), layer(x.flatten(1, 2)).view(2, 3, 5, 6))


def test_unknown_router_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="capacity_faktor"):
        VisionMoE(8, capacity_faktor=1.0)
