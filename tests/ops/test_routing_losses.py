"""Losses that even out the use of experts: golden files, the published tests' numbers, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.ops.routing_losses import gshard_loss, importance_loss, load_loss, router_z_loss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def golden_losses(config: dict, tensors: dict[str, Tensor], case: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The gate's weight, and each loss computed from it as in the published layer."""
    weight = tensors[f"{case}/gate_weight"].clone().requires_grad_()
    logits = tensors[f"{case}/x"] @ weight.T
    noisy = logits
    losses = {"importance_loss": importance_loss(logits.softmax(-1))}
    if not config["deterministic"] and config["noise_std"]:
        noise_std = config["noise_std"] / config["experts"]
        noise = tensors[f"{case}/noise"] * noise_std
        noisy = logits + noise
        losses["load_loss"] = load_loss(logits, noise, top_k=config["top_k"], noise_std=noise_std)
    return weight, {**losses, "gshard_loss": gshard_loss(noisy.softmax(-1))}


@pytest.mark.golden_case("vmoe_layer*.safetensors")
def test_losses_golden(golden_case, read_golden, assert_golden):
    cases, tensors = read_golden(golden_case)
    for case, config in cases.items():
        weight, losses = golden_losses(config, tensors, case)
        assert (f"{case}/load_loss" in tensors) == ("load_loss" in losses)
        for name, loss in losses.items():
            assert_golden(loss, tensors[f"{case}/{name}"], f"{case}/{name}")
            (grad,) = torch.autograd.grad(loss.sum(), weight, retain_graph=True)
            assert_golden(grad, tensors[f"{case}/grad_gate_weight_{name}"], f"{case}/grad of {name}")


@pytest.mark.golden_case("vmoe_layer*.safetensors")
@pytest.mark.parametrize("name", ["importance_loss", "load_loss", "gshard_loss"])
def test_losses_golden_rejects_altered_numbers(golden_case, read_golden, assert_golden, altered_golden, name):
    case = next(case for case, config in read_golden(golden_case)[0].items() if not config["deterministic"])
    cases, tensors = read_golden(altered_golden(golden_case, f"{case}/{name}"))
    _, losses = golden_losses(cases[case], tensors, case)
    with pytest.raises(AssertionError, match="relative error"):
        assert_golden(losses[name], tensors[f"{case}/{name}"], name)


def test_numbers_of_the_published_tests():
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]], dtype=torch.float64)
    assert importance_loss(gates).item() == pytest.approx(0.03875, rel=1e-6)
    assert gshard_loss(gates).item() == pytest.approx(1.0875, rel=1e-6)
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]], dtype=torch.float64)
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]], dtype=torch.float64
    )
    assert load_loss(logits, noise, top_k=2, noise_std=0.1).item() == pytest.approx(0.485738645, rel=1e-6)


def test_load_loss_is_the_chance_of_being_chosen_again():
    """p = 1 - Phi(...) is the chance that the logit with a fresh draw of noise exceeds the threshold: count draws."""
    logits, noise_std = randn(1, 5, 4), 0.7
    noise = noise_std * randn(1, 5, 4, seed=1)
    threshold = (logits + noise).sort(descending=True).values[..., 1:2]
    draws = logits + noise_std * randn(200_000, 5, 4, seed=2)
    load = (draws > threshold).double().mean(dim=0).mean(dim=0)
    expected = load.var(unbiased=False) / load.mean() ** 2
    assert load_loss(logits, noise, top_k=2, noise_std=noise_std).item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: importance_loss(x.softmax(-1)),
        lambda x: gshard_loss(x.softmax(-1)),
        lambda x: load_loss(x, 0.3 * randn(2, 6, 4, seed=1), top_k=2, noise_std=0.3),
        router_z_loss,
    ],
    ids=["importance", "gshard", "load", "z"],
)
def test_gradcheck(loss):
    logits = randn(2, 6, 4).requires_grad_()
    assert loss(logits).shape == (2,)
    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("experts", [1, 4])
def test_balanced_use_is_zero_with_a_finite_gradient(experts):
    logits = torch.zeros(2, 3, experts, requires_grad=True)
    losses = importance_loss(logits.softmax(-1)) + load_loss(logits, torch.zeros(2, 3, experts), top_k=1, noise_std=0.1)
    assert losses.tolist() == [0, 0]
    losses.sum().backward()
    assert logits.grad.abs().max() == 0


def test_all_tokens_to_one_expert_is_the_worst():
    gates = torch.zeros(1, 10, 4)
    gates[..., 2] = 1
    assert importance_loss(gates).item() == pytest.approx(3)  # E - 1
    assert gshard_loss(gates).item() == pytest.approx(4)  # E
    assert gshard_loss(torch.eye(4).unsqueeze(0)).item() == pytest.approx(1)


def test_router_z_loss_is_the_mean_square_of_logsumexp():
    assert router_z_loss(torch.zeros(3, 5, 4)).tolist() == pytest.approx([math.log(4) ** 2] * 3)


def test_no_tokens_give_zero():
    empty = torch.zeros(2, 0, 3, requires_grad=True)
    losses = [
        importance_loss(empty),
        gshard_loss(empty),
        load_loss(empty, empty.detach(), top_k=1, noise_std=0.1),
        router_z_loss(empty),
    ]
    assert [loss.tolist() for loss in losses] == [[0, 0]] * 4


def test_groups_are_independent():
    gates = randn(3, 7, 4).softmax(-1)
    for loss in (importance_loss, gshard_loss, router_z_loss):
        assert torch.equal(loss(gates), torch.stack([loss(group) for group in gates]))


def test_compiles_as_one_graph():
    def total(logits: Tensor, noise: Tensor) -> Tensor:
        gates = (logits + noise).softmax(-1)
        losses = importance_loss(gates) + gshard_loss(gates) + router_z_loss(logits)
        return losses + load_loss(logits, noise, top_k=2, noise_std=0.5)

    logits, noise = randn(2, 6, 4), 0.5 * randn(2, 6, 4, seed=1)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, noise), total(logits, noise))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance_loss(torch.zeros(3)), r"gates has shape \(3,\); expected \[..., tokens, experts\]"),
        (lambda: gshard_loss(torch.zeros(3, 0)), "at least one expert"),
        (lambda: router_z_loss(torch.zeros(3)), "logits has shape"),
        (lambda: load_loss(torch.zeros(3, 4), torch.zeros(3, 3), top_k=1, noise_std=1.0), r"noise has shape \(3, 3\)"),
        (lambda: load_loss(torch.zeros(3, 4), torch.zeros(3, 4), top_k=5, noise_std=1.0), "within 1 to 4"),
        (lambda: load_loss(torch.zeros(3, 4), torch.zeros(3, 4), top_k=1, noise_std=0.0), "noise_std is 0.0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(M2MKDError, match=message):
        call()
