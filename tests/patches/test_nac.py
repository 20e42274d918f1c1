"""Layers in the places of the published NAC's, as stand-ins of the same names, shapes and semantics compute them."""

from __future__ import annotations

import copy

import pytest
import torch
from published_nac import FC, KernelModulatedLatentAttention, ModFFN, ReadInAttention
from torch import Tensor, nn

from m2mkd_fast import apply, nac_layer
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.nn.latent_attention import LatentAttention
from m2mkd_fast.nn.modulated_feed_forward import ModulatedFeedForward
from m2mkd_fast.nn.read_in_attention import ReadInAttention as OurReadInAttention

SIZES = {"state_dim": 8, "code_dim": 6, "num_heads": 2, "head_dim": 4}
ATTENTION = {
    "default": {},
    "truncated": {"kernel_kwargs": {"truncation": 0.9, "initial_bandwidth": 0.4}},
    "fixed bandwidth, masked": {
        "kernel_kwargs": {"truncation": 0.9, "learnable_bandwidth": False, "truncation_implementation": "masked"},
        "normalize_kernel_along_keys": False,
    },
    "scaled after the softmax": {
        "scale_attention_by_affinities_after_softmax": True,
        "mask_attn_scores_with_affinities": False,
    },
    "shared norm, no biases": {"share_layernorm": True, "qkv_bias": False, "layer_scale_initial_value": None},
    "no residual, gain": {
        "include_residual": False,
        "mod_fc_kwargs": {"learnable_scale_gain": True, "scale_gain": 0.5, "add_one_to_scale": True},
    },
}
FEED_FORWARD = {
    "default": {},
    "GEGLU": {"use_geglu": True, "capacity_factor": 2.0, "layer_scale_initial_value": None},
    "unnormalised scale": {"mod_fc_kwargs": {"scale_normalization_type": "none", "scale_gain": 0.25}},
}
READ_IN = {"default": {}, "no residual": {"include_residual": False, "qkv_bias": False}}


class Circuit(nn.Module):
    """One of each layer, called as the published code calls them."""

    def __init__(self, attention: dict | None = None, read_in: dict | None = None, ffn: dict | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codes = nn.Parameter(torch.randn(7, 6))
        self.signatures = nn.Parameter(torch.randn(7, 5))
        self.states = nn.Parameter(torch.randn(7, 8))
        self.read_in_attention = ReadInAttention(input_dim=10, **SIZES, **(read_in or {}))
        self.latent_attention = KernelModulatedLatentAttention(**SIZES, **(attention or {}))
        self.ffn = ModFFN(8, 6, **(ffn or {}))

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.states.expand(tokens.shape[0], -1, -1)
        states = self.read_in_attention(states, None, self.codes, tokens)
        messages = self.latent_attention(
            states[:, :4], self.signatures[:4], self.codes[:4], states, self.signatures, self.codes
        )
        return self.ffn(messages, self.codes[:4])


RULES = {"read_in_attention": nac_layer(), "latent_attention": nac_layer(), "ffn": nac_layer()}


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 9, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def check(circuit: Circuit, dtype: torch.dtype, tolerance: float) -> None:
    """The same outputs, gradients, names and parameters; afterwards the very modules that were there."""
    circuit = circuit.to(dtype)
    x, parameters, modules = tokens(dtype), dict(circuit.named_parameters()), list(circuit.modules())
    state = [(name, tensor.shape) for name, tensor in circuit.state_dict().items()]

    def gradients() -> list[Tensor | None]:
        loss = circuit(x).square().sum()
        return torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)

    wanted, wanted_gradients = circuit(x), gradients()
    handle = apply(circuit, RULES)
    assert isinstance(circuit.latent_attention, LatentAttention)
    assert isinstance(circuit.read_in_attention, OurReadInAttention)
    assert isinstance(circuit.ffn, ModulatedFeedForward)
    scale = wanted.abs().max()
    assert (circuit(x) - wanted).abs().max() <= tolerance * scale
    with torch.no_grad():
        assert (circuit(x) - wanted).abs().max() <= tolerance * scale
    for got, expected in zip(gradients(), wanted_gradients, strict=True):
        assert (got - expected).abs().max() <= 20 * tolerance * max(g.abs().max() for g in wanted_gradients)
    assert {name: id(tensor) for name, tensor in circuit.named_parameters()} == {
        name: id(tensor) for name, tensor in parameters.items()
    }
    assert [(name, tensor.shape) for name, tensor in circuit.state_dict().items()] == state
    handle.revert()
    assert list(circuit.modules()) == modules
    assert torch.equal(circuit(x), wanted)


@pytest.mark.parametrize("variant", ATTENTION)
def test_attention_computes_the_same(variant: str) -> None:
    check(Circuit(attention=ATTENTION[variant]), torch.float64, 1e-12)


@pytest.mark.parametrize("variant", FEED_FORWARD)
def test_feed_forward_computes_the_same(variant: str) -> None:
    check(Circuit(ffn=FEED_FORWARD[variant]), torch.float64, 1e-12)


@pytest.mark.parametrize("variant", READ_IN)
def test_read_in_computes_the_same(variant: str) -> None:
    check(Circuit(read_in=READ_IN[variant]), torch.float64, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    check(Circuit(attention=ATTENTION["truncated"]), dtype, tolerance)


def test_binary_edges_in_evaluation_and_path_drop() -> None:
    kernel = {"stochastic_kernel": True, "stochastic_eval_behaviour": "threshold", "initial_bandwidth": 0.8}
    attention = {"kernel_kwargs": kernel, "path_drop_prob": 0.5}
    check(Circuit(attention=attention, ffn={"path_drop_prob": 0.5}).eval(), torch.float64, 1e-12)


def test_samples_edges_and_drops_paths_in_training() -> None:
    kernel = {"stochastic_kernel": True, "truncation": 0.9}
    circuit = Circuit(attention={"kernel_kwargs": kernel, "path_drop_prob": 0.5}).double()
    apply(circuit, RULES)
    assert not torch.equal(circuit(tokens()), circuit(tokens()))
    circuit.eval()
    assert torch.equal(circuit(tokens()), circuit(tokens()))


def test_states_load_move_and_come_back() -> None:
    circuit, other = (
        Circuit(ATTENTION["fixed bandwidth, masked"]).double(),
        Circuit(ATTENTION["fixed bandwidth, masked"]),
    )
    stock = copy.deepcopy(other)
    with torch.no_grad():
        for parameter in circuit.parameters():
            parameter.mul_(1.5)
        circuit.latent_attention.kernel.bandwidth.fill_(0.7)
    with apply(other, RULES):
        other.double().load_state_dict(circuit.state_dict())
        torch.testing.assert_close(other(tokens()), circuit(tokens()), rtol=1e-11, atol=1e-12)
        stock.double().load_state_dict(other.state_dict())
        other.eval()
    assert torch.equal(other(tokens()), circuit(tokens()))
    assert torch.equal(stock(tokens()), circuit(tokens()))
    assert not any(module.training for module in other.modules())


def test_compiles_as_one_graph() -> None:
    circuit = Circuit(ATTENTION["truncated"])
    wanted = circuit(tokens(torch.float32))
    apply(circuit, RULES)
    got = torch.compile(circuit, fullgraph=True, backend="eager")(tokens(torch.float32))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": {"mod_fc_cls": FC}}, "its query_compiler is a FC, not a ModFC"),
        ({"attention": {"mod_fc_kwargs": {"scale_dropout": 0.1}}}, "query_compiler has an activation or scale_dropout"),
        ({"attention": {"kernel_kwargs": {"use_gumbel_along_functions": True}}}, "use_gumbel_along_functions"),
        (
            {
                "attention": {
                    "kernel_kwargs": {"stochastic_kernel": True},
                    "mask_attn_scores_with_affinities": False,
                    "scale_attention_by_affinities_after_softmax": True,
                }
            },
            "stochastic and does not mask",
        ),
        ({"ffn": {"include_residual": False}}, "no residual connection"),
    ],
)
def test_what_is_not_known_is_refused(options: dict[str, dict], message: str) -> None:
    circuit = Circuit(**options)
    modules = list(circuit.modules())
    with pytest.raises(M2MKDError, match=message):
        apply(circuit, RULES)
    assert list(circuit.modules()) == modules


def test_other_modules_are_refused_by_name() -> None:
    with pytest.raises(M2MKDError, match=r"read_in_attention.sender_layernorm: nac_layer\(\) replaces .* not a torch"):
        apply(Circuit(), {"read_in_attention.sender_layernorm": nac_layer()})
