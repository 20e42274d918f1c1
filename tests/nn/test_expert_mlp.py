"""The experts' parameters: names, initialisation, options."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm.layers
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.expert_mlp import ExpertLinear, ExpertMLP, activation_name, fastmoe_state_dict
from m2mkd_fast.ops.route import route


def test_published_names_and_shapes() -> None:
    state = ExpertMLP(4, 8, 16, 12).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "htoh4.weight": (4, 16, 8),
        "htoh4.bias": (4, 16),
        "h4toh.weight": (4, 12, 16),
        "h4toh.bias": (4, 12),
    }
    assert set(ExpertMLP(4, 8, bias=(False, True)).state_dict()) == {"htoh4.weight", "h4toh.weight", "h4toh.bias"}
    assert ExpertMLP(4, 8).htoh4.weight.shape == ExpertMLP(4, 8).h4toh.weight.shape == (4, 8, 8)


def test_each_expert_starts_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    experts, linear = ExpertLinear(3, 64, 256), nn.Linear(64, 256)
    bound = linear.weight.abs().max().item()
    assert bound == pytest.approx(1 / 8, rel=0.01)
    for expert in range(3):
        assert experts.weight[expert].abs().max().item() == pytest.approx(bound, rel=0.01)
        assert experts.bias[expert].abs().max().item() == pytest.approx(bound, rel=0.05)
        assert experts.weight[expert].std().item() == pytest.approx(linear.weight.std().item(), rel=0.02)


@pytest.mark.parametrize(("in_features", "out_features", "factor"), [(768, 3072, 55), (3072, 768, 28)])
def test_published_start_is_smaller_by_the_documented_factor(in_features: int, out_features: int, factor: int) -> None:
    torch.manual_seed(0)
    published = ExpertLinear(1, in_features, out_features, expert_init="published")
    linear = ExpertLinear(1, in_features, out_features)
    ratio = linear.weight.std() / published.weight.std()
    assert ratio.item() == pytest.approx(factor, rel=0.02)
    assert published.bias.eq(0).all()


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    experts = ExpertMLP(4, 8, 16, drop=(0.0, 0.5))
    x = torch.randn(50, 8)
    assignment = route(torch.randn(50, 4), top_k=1)
    assert experts.train()(x, assignment).eq(0).any()
    assert not experts.eval()(x, assignment).eq(0).any()
    assert torch.equal(experts(x, assignment), experts(x, assignment))


@pytest.mark.parametrize(
    ("act_layer", "name"),
    [
        (nn.GELU, "gelu"),
        (partial(nn.GELU, approximate="tanh"), "gelu_tanh"),
        (timm.layers.get_act_layer("gelu"), "gelu"),
        (timm.layers.get_act_layer("gelu_tanh"), "gelu_tanh"),
        ("gelu", "gelu"),
        ("gelu_tanh", "gelu_tanh"),
    ],
)
def test_activation_layers(act_layer: object, name: str) -> None:
    assert activation_name(act_layer) == name
    x = torch.linspace(-3, 3, 7)
    layer = nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")
    built = layer if isinstance(act_layer, str) else act_layer()
    assert torch.equal(built(x), layer(x)), "the name stands for what the layer computes"


@pytest.mark.parametrize(("activation", "phi"), [("geglu", nn.functional.gelu), ("swiglu", nn.functional.silu)])
def test_gated_experts(activation: str, phi: Callable) -> None:
    torch.manual_seed(0)
    experts = ExpertMLP(3, 8, 16, 12, act_layer=activation)
    assert experts.htoh4.weight.shape == (3, 32, 8)
    assert experts.htoh4.bias.shape == (3, 32)
    assert experts.h4toh.weight.shape == (3, 12, 16)
    x = torch.randn(5, 8)
    y = experts(x, route(torch.tensor([[0.0, 9.0, 0.0]]).expand(5, 3), top_k=1, gate="top_k_softmax"))
    values, gates = nn.functional.linear(x, experts.htoh4.weight[1], experts.htoh4.bias[1]).split(16, dim=1)
    wanted = nn.functional.linear(values * phi(gates), experts.h4toh.weight[1], experts.h4toh.bias[1])
    torch.testing.assert_close(y, wanted)


def test_dropout_comes_from_the_generator() -> None:
    torch.manual_seed(0)
    experts = ExpertMLP(4, 8, 16, drop=0.5).train()
    x, assignment = torch.randn(50, 8), route(torch.randn(50, 4), top_k=2)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return experts(x, assignment)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


class SingleExpert(nn.Module):
    """Names and shapes of one expert of FastMoE's transformer layer, which has a list of them."""

    def __init__(self) -> None:
        super().__init__()
        self.htoh4, self.h4toh = ExpertLinear(1, 8, 16), ExpertLinear(1, 16, 8)


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), experts


def singles(count: int = 3) -> Layer:
    return Layer(nn.ModuleList(SingleExpert() for _ in range(count)))


def test_fastmoe_names_load_and_save() -> None:
    torch.manual_seed(0)
    published, model = singles(), Layer(ExpertMLP(3, 8, 16))
    state = published.state_dict()
    names = list(state)
    model.load_state_dict(state)
    assert list(state) == names, "the caller's state is as it was"
    for expert in range(3):
        for name, parameter in published.experts[expert].named_parameters():
            assert torch.equal(model.experts.get_parameter(name)[expert], parameter[0])
    saved = fastmoe_state_dict(model)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    published.load_state_dict(saved)
    again = copy.deepcopy(pickle.loads(pickle.dumps(Layer(ExpertMLP(3, 8, 16)))))
    again.load_state_dict(saved)
    again.load_state_dict(model.state_dict())
    assert set(fastmoe_state_dict(model.experts)) == {name.removeprefix("experts.") for name in names if "exp" in name}


def test_fastmoe_names_load_into_the_meta_device() -> None:
    with torch.device("meta"):
        model = Layer(ExpertMLP(3, 8, 16))
    published = singles()
    model.load_state_dict(published.state_dict(), assign=True)
    assert torch.equal(model.experts.htoh4.weight[2], published.experts[2].htoh4.weight[0])


def test_files_of_fastmoe_names(tmp_path: Path) -> None:
    model = Layer(ExpertMLP(3, 8, 16))
    safetensors.torch.save_file(fastmoe_state_dict(model), tmp_path / "experts.safetensors")
    fresh = Layer(ExpertMLP(3, 8, 16))
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "experts.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_fastmoe_experts_that_do_not_fit_are_named() -> None:
    def message(state: dict[str, torch.Tensor]) -> str:
        model = Layer(ExpertMLP(3, 8, 16))
        before = model.experts.htoh4.weight.clone()
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state)
        assert torch.equal(model.experts.htoh4.weight, before)
        return str(error.value)

    fewer = message(singles(2).state_dict())
    assert 'Missing key(s) in state_dict: "experts.2.htoh4.weight", "experts.2.htoh4.bias"' in fewer
    assert "Unexpected" not in fewer
    state = singles().state_dict()
    del state["experts.1.htoh4.weight"]
    assert '"experts.1.htoh4.weight"' in message(state)
    state = singles().state_dict()
    state["experts.1.htoh4.weight"] = state["experts.1.htoh4.weight"][:, :8]
    assert "size mismatch for experts.1.htoh4.weight: copying a param with shape (1, 8, 8)" in message(state)


def test_fastmoe_experts_beyond_the_layers_are_named() -> None:
    model = Layer(ExpertMLP(3, 8, 16, bias=(False, True)))
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(singles(4).state_dict())
    unexpected = str(error.value).partition("Unexpected key(s) in state_dict: ")[2].split("\n")[0]
    names = [f"experts.{i}.htoh4.bias" for i in range(4)]
    names += [f"experts.3.{name}" for name in ("htoh4.weight", "h4toh.weight", "h4toh.bias")]
    assert sorted(unexpected.rstrip(". ").replace('"', "").split(", ")) == sorted(names)
    both = {**singles(4).state_dict(), **model.state_dict()}
    assert model.load_state_dict(both, strict=False).missing_keys == []


def test_other_arguments_are_refused() -> None:
    with pytest.raises(M2MKDError, match="no activation ReLU"):
        ExpertMLP(4, 8, act_layer=nn.ReLU)
    with pytest.raises(UnknownNameError, match="'gelu'"):
        ExpertMLP(4, 8, act_layer="gelo")
    with pytest.raises(UnknownNameError, match="'trunc_normal'"):
        ExpertMLP(4, 8, expert_init="trunc_norm")
    with pytest.raises(M2MKDError, match="num_experts=0"):
        ExpertMLP(0, 8)
