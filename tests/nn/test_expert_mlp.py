"""The experts' parameters: names, initialisation, options."""

from __future__ import annotations

from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.expert_mlp import ExpertLinear, ExpertMLP, activation_name
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


def test_other_arguments_are_refused() -> None:
    with pytest.raises(M2MKDError, match="no activation ReLU"):
        ExpertMLP(4, 8, act_layer=nn.ReLU)
    with pytest.raises(UnknownNameError, match="'gelu'"):
        ExpertMLP(4, 8, act_layer="gelo")
    with pytest.raises(UnknownNameError, match="'trunc_normal'"):
        ExpertMLP(4, 8, expert_init="trunc_norm")
    with pytest.raises(M2MKDError, match="num_experts=0"):
        ExpertMLP(0, 8)
