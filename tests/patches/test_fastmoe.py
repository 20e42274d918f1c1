"""Mixtures in the places of fastmoe's, as a stand-in of the same names, shapes and semantics computes them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from published_fastmoe import FMoETransformerMLP, GShardGate
from torch import Tensor, nn

from m2mkd_fast import apply, fastmoe_mlp, inference_routing
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.vision_moe import VisionMoE, expert_load

TANH = partial(nn.GELU, approximate="tanh")
VARIANTS = {
    "list": {},
    "stacked": {"stacked": True},
    "top-1 of tanh, without bias": {"top_k": 1, "activation": TANH(), "gate_bias": False},
    "stacked, top-3": {"stacked": True, "top_k": 3},
}


def model(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    layer = FMoETransformerMLP(**{"num_expert": 4, "d_model": 8, "d_hidden": 16, "activation": nn.GELU(), **options})
    return nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 3)).double()


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(model: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return torch.autograd.grad(model(tokens(dtype)).square().sum(), list(model.parameters()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_computes_the_same_with_the_same_parameters(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    stock = model(**VARIANTS[variant]).to(dtype)
    layer, parameters, state = stock[1], dict(stock.named_parameters()), stock.state_dict()
    wanted, wanted_gradients = stock(tokens(dtype)), gradients(stock, dtype)
    handle = apply(stock, {"1": fastmoe_mlp()})
    assert isinstance(stock[1], VisionMoE)
    torch.testing.assert_close(stock(tokens(dtype)), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients(stock, dtype), wanted_gradients, rtol=10 * tolerance, atol=10 * tolerance)
    assert all(parameters[name] is parameter for name, parameter in stock.named_parameters())
    assert [(name, tensor.shape) for name, tensor in stock.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in state.items()
    ]
    handle.revert()
    assert stock[1] is layer
    assert torch.equal(stock(tokens(dtype)), wanted)


def test_half_precision_agrees_where_the_choice_is_the_same() -> None:
    stock = model().to(torch.bfloat16)
    x = tokens(torch.bfloat16)
    logits = stock[1].gate.gate(stock[0](x))
    second, third = logits.topk(3).values[..., 1:].unbind(-1)
    clear = (second - third) > 0.05
    assert clear.float().mean() > 0.5
    wanted = stock(x)
    apply(stock, {"1": fastmoe_mlp()})
    assert (stock(x) - wanted)[clear].abs().max() <= 0.03 * wanted.abs().max()


@pytest.mark.parametrize("stacked", [True, False])
def test_trained_values_loaded_states_and_moves_stay_after_revert(stacked: bool) -> None:
    stock = model(stacked=stacked)
    optimizer = torch.optim.SGD(stock.parameters(), 0.1)
    with apply(stock, {"1": fastmoe_mlp()}):
        stock.eval()(tokens())
        stock(tokens()).sum().backward()
        optimizer.step()
        trained = stock.eval()(tokens())
        with torch.no_grad():
            assert torch.equal(stock(tokens()), trained)
            stock[1].get_parameter("gate.gate.weight").mul_(2)
            doubled = stock(tokens())
    assert not stock[1].training
    torch.testing.assert_close(stock(tokens()), doubled, rtol=1e-12, atol=1e-12)
    other = model(stacked=stacked)
    with apply(other, {"1": fastmoe_mlp()}):
        other.load_state_dict(stock.state_dict(), assign=True)
        other.float()
    torch.testing.assert_close(other.double()(tokens()), doubled, rtol=1e-5, atol=1e-5)


def test_evaluation_sees_every_change_of_a_listed_expert() -> None:
    stock = model().eval()
    apply(stock, {"1": fastmoe_mlp()})
    with torch.no_grad():
        before = stock(tokens())
        assert torch.equal(stock(tokens()), before)
        stock.get_parameter("1.experts.2.h4toh.bias").add_(1)
        assert not torch.equal(stock(tokens()), before)


def test_tools_of_mixtures_work_on_it() -> None:
    stock = model().eval()
    apply(stock, {"1": fastmoe_mlp()})
    with inference_routing(stock, top_k=1):
        stock(tokens())
    assert len(expert_load(stock)["1"]) == 4
    assert stock[1].gate.has_loss and torch.equal(stock[1].gate.get_loss(), torch.zeros(1, dtype=torch.float64))
    twin = copy.deepcopy(stock)
    assert torch.equal(twin(tokens()), stock(tokens()))


@pytest.mark.parametrize("stacked", [True, False])
def test_compiles_as_one_graph(stacked: bool) -> None:
    stock = model(stacked=stacked).float()
    apply(stock, {"1": fastmoe_mlp()})
    got = torch.compile(stock, fullgraph=True, backend="eager")(tokens(torch.float32))
    torch.testing.assert_close(got, stock(tokens(torch.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": GShardGate}, "its gate is a GShardGate, not a NaiveGate; build the model with VisionMoE"),
        ({"gate_hook": print}, "it has a gate_hook"),
        ({"activation": nn.ReLU()}, "experts have no activation ReLU"),
    ],
)
def test_what_cannot_be_matched_is_refused(options: dict[str, object], message: str) -> None:
    stock = model(**options)
    with pytest.raises(M2MKDError, match=f"^1: cannot replace this FMoETransformerMLP: {message}"):
        apply(stock, {"1": fastmoe_mlp()})


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("world_size", 2, "world_size is 2"), ("slice_size", 2, "slice_size 2"), ("mask", torch.ones(3), "a mask")],
)
def test_several_workers_and_masks_are_refused(attribute: str, value: object, message: str) -> None:
    stock = model()
    setattr(stock[1], attribute, value)
    with pytest.raises(M2MKDError, match=message):
        apply(stock, {"1": fastmoe_mlp()})


def test_experts_that_differ_are_refused() -> None:
    stock = model()
    stock[1].experts[2].activation = TANH()
    with pytest.raises(M2MKDError, match="different activations"):
        apply(stock, {"1": fastmoe_mlp()})
    stock = model()
    stock[1].experts[1].htoh4.weight = nn.Parameter(torch.zeros(1, 15, 8))
    with pytest.raises(M2MKDError, match=r"has other tensors than .*experts.1.htoh4.weight"):
        apply(stock, {"1": fastmoe_mlp()})
    with pytest.raises(M2MKDError, match="replaces fastmoe's FMoETransformerMLP, not a Linear"):
        apply(stock, {"0": fastmoe_mlp()})
