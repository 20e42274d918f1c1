"""Mixtures in the places of MLPs: what they compute, what they save, and what they load."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_fast import apply, auxiliary_losses, mixture
from m2mkd_fast.errors import M2MKDError, UnknownNameError
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE

MLPS = {
    "Mlp": lambda: Mlp(8, 16),
    "Mlp without biases": lambda: Mlp(8, 16, bias=False),
    "GluMlp": lambda: GluMlp(8, 32, act_layer=nn.GELU),
    "GluMlp, gates first": lambda: GluMlp(8, 32, act_layer=nn.GELU, gate_last=False),
    "SwiGLU": lambda: SwiGLU(8, 16),
}


def model(kind: str = "Mlp", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), MLPS[kind]()).double()


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **options})


def tokens() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_upcycled_mixture_computes_what_the_dense_model_does(dtype: torch.dtype, tolerance: float) -> None:
    model = vit().to(dtype).eval()
    wanted = model(images(dtype))
    handle = apply(model, {"blocks.*.mlp": mixture(4)})
    assert [type(block.mlp) for block in model.blocks] == [VisionMoE] * 3
    assert (model(images(dtype)) - wanted).abs().max() <= tolerance * wanted.abs().max()
    handle.revert()
    assert torch.equal(model(images(dtype)), wanted)


def test_gradients_of_everything_else_are_the_dense_models() -> None:
    model = vit().double()
    kept = {name: parameter for name, parameter in model.named_parameters() if ".mlp." not in name}

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(model(images(torch.float64)).square().sum(), list(kept.values()))

    wanted = gradients()
    with apply(model, {"blocks.[12].mlp": mixture(4, 3)}):
        torch.testing.assert_close(gradients(), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MLPS)
@pytest.mark.parametrize("upcycled", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_dense_state_dict_upcycles(kind: str, upcycled: bool, assign: bool) -> None:
    dense, patched = model(kind, seed=1), model(kind)
    apply(patched, {"1": mixture(3, upcycled=upcycled)})
    router = patched[1].gate.gate.weight.clone()
    state = dense.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    patched.load_state_dict(state, assign=assign)
    torch.testing.assert_close(patched(tokens()), dense(tokens()), rtol=1e-12, atol=1e-13)
    assert torch.equal(patched[1].gate.gate.weight, router)
    with torch.no_grad():
        patched[1].experts.htoh4.weight[0].zero_()
    assert patched[1].experts.htoh4.weight[1:].any()
    assert list(state) == list(before)
    assert all(torch.equal(dense.state_dict()[name], before[name]) for name in before)


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(MLPS)),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_fuzz_patched_models_compute_the_dense_model(
    kind: str, num_experts: int, top_k: int, upcycled: bool, dtype: torch.dtype
) -> None:
    dense, patched = model(kind, seed=1).to(dtype), model(kind, seed=1).to(dtype)
    handle = apply(patched, {"1": mixture(num_experts, min(top_k, num_experts), upcycled=upcycled)})
    if not upcycled:
        patched.load_state_dict(dense.state_dict())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(patched(tokens().to(dtype)), dense(tokens().to(dtype)), rtol=tolerance, atol=tolerance)
    handle.revert()
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in patched.state_dict().items())


def test_a_model_without_memory_is_patched_and_then_loaded() -> None:
    dense = model()
    with torch.device("meta"):
        patched = nn.Sequential(nn.Linear(8, 8), Mlp(8, 16)).double()
    apply(patched, {"1": mixture(2)})
    assert all(parameter.is_meta for parameter in patched.parameters())
    patched.to_empty(device="cpu")[1].gate.gate.reset_parameters()
    patched.load_state_dict(dense.state_dict())
    torch.testing.assert_close(patched(tokens()), dense(tokens()))


def test_a_dense_state_dict_that_does_not_fit_is_an_error() -> None:
    patched = model()
    apply(patched, {"1": mixture(3)})
    before = copy.deepcopy(patched.state_dict())
    state = model(seed=1).state_dict()
    state["1.fc1.weight"] = torch.zeros(16, 9)
    with pytest.raises(RuntimeError, match=r"size mismatch for 1.fc1.weight.*\(16, 9\).*\(16, 8\)"):
        patched.load_state_dict(state)
    del state["1.fc1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*1.experts.htoh4.weight"):
        patched.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in patched[1].state_dict(prefix="1.").items())


def test_saves_and_loads_its_own_names() -> None:
    patched, other = model(), model(seed=1)
    for one in (patched, other):
        apply(one, {"1": mixture(3, **ROUTERS["m2mkd"])})
    names = [f"1.experts.{layer}.{key}" for layer in ("htoh4", "h4toh") for key in ("weight", "bias")]
    assert list(patched.state_dict())[2:] == ["1.gate.gate.weight", "1.gate.gate.bias", *names]
    other.load_state_dict(patched.state_dict())
    assert torch.equal(other(tokens()), patched(tokens()))


def test_fresh_experts_differ_and_noise_is_refused_for_them() -> None:
    patched = model()
    apply(patched, {"1": mixture(3, upcycled=False)})
    experts = patched[1].experts.htoh4.weight
    assert not torch.equal(experts[0], experts[1])
    with pytest.raises(M2MKDError, match="noise is 0.1, but fresh experts"):
        mixture(3, upcycled=False, noise=0.1)


def test_noise_and_router_arguments_arrive() -> None:
    patched = model().train()
    apply(patched, {"1": mixture(8, 1, noise=0.01, **ROUTERS["vmoe"])})
    experts = patched[1].experts.htoh4.weight
    assert not torch.equal(experts[0], experts[1])
    patched(tokens())
    assert auxiliary_losses(patched) > 0
    with pytest.raises(UnknownNameError, match="'capcity_factor'; did you mean 'capacity_factor'"):
        mixture(3, capcity_factor=2.0)


def test_keeps_mode_and_what_is_frozen() -> None:
    patched = model().eval()
    patched[1].fc1.requires_grad_(False)
    apply(patched, {"1": mixture(3)})
    assert not any(module.training for module in patched.modules())
    frozen = {name for name, parameter in patched[1].named_parameters() if not parameter.requires_grad}
    assert frozen == {"experts.htoh4.weight", "experts.htoh4.bias"}


def test_an_unknown_mlp_is_named() -> None:
    patched = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(M2MKDError, match=r"^0: cannot upcycle a Linear"):
        apply(patched, {"0": mixture(3)})


def test_patched_models_copy_pickle_and_train() -> None:
    patched = model()
    apply(patched, {"1": mixture(3)})
    twin = copy.deepcopy(patched)
    twin.load_state_dict(model(seed=1).state_dict())
    torch.testing.assert_close(twin(tokens()), model(seed=1)(tokens()))
    file = io.BytesIO()
    torch.save(patched.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(tokens()), patched(tokens()))
    patched(tokens()).sum().backward()
    assert all(parameter.grad is not None for name, parameter in patched.named_parameters())


def test_compiles_as_one_graph() -> None:
    patched = vit(depth=1).eval()
    wanted = patched(images())
    apply(patched, {"blocks.0.mlp": mixture(2)})
    got = torch.compile(patched, fullgraph=True, backend="eager")(images())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
