"""Mixtures that start from a dense MLP: equal to it where the documentation says so, apart where noise is asked for."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import GatedMlp, GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_fast import upcycle
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.modules.split import split, verify_split
from m2mkd_fast.nn.router import ROUTERS
from m2mkd_fast.nn.vision_moe import VisionMoE, auxiliary_losses

TANH = partial(nn.GELU, approximate="tanh")
DENSE = {
    "Mlp": lambda **options: Mlp(8, 16, 12, **options),
    "Mlp of tanh": lambda **options: Mlp(8, 16, act_layer=TANH, **options),
    "GluMlp of GELU": lambda **options: GluMlp(8, 32, 12, act_layer=nn.GELU, **options),
    "GluMlp of SiLU": lambda **options: GluMlp(8, 32, act_layer=nn.SiLU, **options),
    "GluMlp, gates first": lambda **options: GluMlp(8, 32, act_layer=nn.GELU, gate_last=False, **options),
    "SwiGLUPacked": lambda **options: SwiGLUPacked(8, 32, 12, **options),
    "SwiGLU": lambda **options: SwiGLU(8, 16, 12, **options),
    "SwiGLU of GELU": lambda **options: SwiGLU(8, 16, act_layer=nn.GELU, **options),
}
ACTIVATIONS = {"Mlp": "gelu", "Mlp of tanh": "gelu_tanh", "SwiGLUPacked": "swiglu", "SwiGLU of GELU": "geglu"}


def dense(kind: str = "Mlp", **options: object) -> nn.Module:
    torch.manual_seed(0)
    return DENSE[kind](**options).double()


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bias", [True, False, (False, True)])
@pytest.mark.parametrize("kind", DENSE)
def test_equal_to_the_dense_layer_where_weights_sum_to_one(kind: str, bias: bool | tuple[bool, bool]) -> None:
    mlp = dense(kind, bias=bias)
    x, wanted = tokens(), mlp(tokens())
    for options in ({}, {"gate_bias": True, "top_k": 3}, {"gate": "softmax_top_k", "top_k": 5}):
        moe = upcycle(mlp, 5, **options)
        torch.testing.assert_close(moe(x), wanted, rtol=1e-12, atol=1e-13)
        assert moe.experts.activation == ACTIVATIONS.get(kind, moe.experts.activation)


def test_otherwise_a_token_gets_its_weights_times_the_dense_output() -> None:
    mlp = dense()
    moe = upcycle(mlp, 4, gate="softmax_top_k", capacity_factor=0.75).eval()
    x = tokens()
    assignment = moe.gate(x).assignment
    share = torch.zeros(21, dtype=torch.float64).index_add(0, assignment.token, assignment.weight)
    assert share.max() < 1
    assert (assignment.place < 0).any()
    torch.testing.assert_close(moe(x), share.view(3, 7, 1) * mlp(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Mlp", "SwiGLU"])
def test_keeps_dtype_dropout_and_mode(kind: str, dtype: torch.dtype) -> None:
    mlp = dense(kind, drop=(0.25, 0.5)).to(dtype)
    mlp.fc2.eval()
    modes = {name: module.training for name, module in mlp.named_modules()}
    moe = upcycle(mlp, 4)
    assert {name: module.training for name, module in mlp.named_modules()} == modes
    assert moe.training and moe.experts.training and moe.gate.training
    assert (moe.experts.drop1.p, moe.experts.drop2.p) == (0.25, 0.5)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in moe.parameters())
    moe = upcycle(mlp.requires_grad_(False).eval(), 4)
    assert not any(module.training for module in moe.modules())
    assert all(parameter.requires_grad for parameter in moe.parameters())
    difference = (moe(tokens(dtype)) - mlp(tokens(dtype))).abs().max()
    assert difference <= 8 * torch.finfo(dtype).eps * mlp(tokens(dtype)).abs().max()


def test_the_dense_layer_is_left_alone() -> None:
    mlp = dense()
    before = [parameter.clone() for parameter in mlp.parameters()]
    moe = upcycle(mlp, 4, noise=0.1)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in mlp.parameters())


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_has_the_scale_of_each_tensor(noise: float) -> None:
    torch.manual_seed(0)
    mlp = Mlp(64, 256)
    with torch.no_grad():
        mlp.fc1.weight.mul_(20.0)
        mlp.fc2.bias.fill_(3.0)
    moe = upcycle(mlp, 6, noise)
    pairs = {"htoh4.weight": mlp.fc1.weight, "htoh4.bias": mlp.fc1.bias, "h4toh.weight": mlp.fc2.weight}
    for name, tensor in pairs.items():
        noisy = moe.experts.get_parameter(name) - tensor
        assert noisy.std().item() == pytest.approx(noise * tensor.std().item(), rel=0.05)
        assert torch.equal(noisy[0], noisy[1]) == (noise == 0), "each expert draws its own"
    assert torch.equal(moe.experts.h4toh.bias, mlp.fc2.bias.expand(6, -1)), "a tensor without spread stays as it is"


def test_experts_and_routers_train_apart() -> None:
    moe = upcycle(dense().float(), 4, 0.01, **{**ROUTERS["vmoe"], "gate": "top_k_softmax"}).train()
    (moe(torch.randn(8, 20, 8)).square().sum() + auxiliary_losses(moe)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in moe.parameters())
    assert not torch.equal(moe.experts.htoh4.weight.grad[0], moe.experts.htoh4.weight.grad[1])


def test_blocks_of_a_vision_transformer() -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=3).eval()
    images = torch.randn(2, 3, 8, 8)
    wanted = vit(images)
    for i in (1, 3):
        vit.blocks[i].mlp = upcycle(vit.blocks[i].mlp, num_experts=4)
    assert [isinstance(block.mlp, VisionMoE) for block in vit.blocks] == [False, True, False, True]
    torch.testing.assert_close(vit(images), wanted)
    verify_split(vit, split(vit, 2), images)


def test_the_meta_device() -> None:
    with torch.device("meta"):
        moe = upcycle(Mlp(8, 16), 4, 0.1)
    assert all(parameter.is_meta for parameter in moe.parameters())
    assert moe.experts.htoh4.weight.shape == (4, 16, 8)


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SpatialGatingUnit(nn.Linear):
    def __init__(self, width: int, **factory: object) -> None:
        super().__init__(width, width // 2, **factory)


class Scaled(Mlp):
    def __init__(self) -> None:
        super().__init__(8, 16)
        self.gamma = nn.Parameter(torch.ones(8))


def mixed() -> nn.Module:
    mlp = Mlp(8, 16)
    mlp.fc2.half()
    return mlp


def broken() -> nn.Module:
    mlp = Mlp(8, 16)
    nn.init.constant_(mlp.fc1.weight, float("nan"))
    return mlp


REFUSED = {
    "norm": (lambda: Mlp(8, 16, norm_layer=nn.LayerNorm), r"Mlp: experts have no place for its norm \(LayerNorm\)"),
    "response norm": (lambda: GlobalResponseNormMlp(8, 16), r"no place for its grn \(GlobalResponseNorm\)"),
    "gate": (lambda: GatedMlp(8, 16, gate_layer=SpatialGatingUnit), "no place for its gate"),
    "parameter": (Scaled, r"no place for its gamma \(Parameter\)"),
    "convolutions": (lambda: Mlp(8, 16, use_conv=True), "its fc1 is Conv2d, not a nn.Linear"),
    "other module": (lambda: nn.Linear(8, 8), "its fc1 is not there, not a nn.Linear; upcycle takes timm's Mlp"),
    "activation": (lambda: Mlp(8, 16, act_layer=nn.ReLU), r"Mlp with the activation ReLU\(\): experts have nn.GELU"),
    "gated activation": (lambda: GluMlp(8, 16), r"activation Sigmoid\(\): experts have nn.GELU\(\) or nn.SiLU\(\) on"),
    "tanh gates": (lambda: GluMlp(8, 16, act_layer=TANH), "experts have nn.GELU"),
    "SiLU without gates": (lambda: Mlp(8, 16, act_layer=nn.SiLU), "activation SiLU"),
    "dtypes": (mixed, "several dtypes .torch.float16, torch.float32"),
    "forward": (lambda: Residual(8, 16), "Residual: it does not compute what its layers alone do"),
    "NaN": (broken, "not all of that is finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_upcycled_is_named(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(M2MKDError, match=message):
        upcycle(build(), 4)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(M2MKDError, match="noise is -0.1"):
        upcycle(Mlp(8, 16), 4, -0.1)
    with pytest.raises(M2MKDError, match="top_k is 5"):
        upcycle(Mlp(8, 16), 4, top_k=5)
    with pytest.raises(TypeError, match="capacity_faktor"):
        upcycle(Mlp(8, 16), 4, capacity_faktor=2.0)
