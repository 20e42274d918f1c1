"""Attention in the places of timm's with a position bias: the same numbers, parameters and names."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from m2mkd_fast import accelerate, apply, biased_attention
from m2mkd_fast.errors import M2MKDError
from m2mkd_fast.patches.biased_attention import BEiTAttention, SwinAttention

BEIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 32}
MODELS = {
    "BEiT": lambda **options: Beit(**{**BEIT, "use_rel_pos_bias": True, "qkv_bias": True, **options}),
    "BEiT, long sequence": lambda **options: Beit(
        **{**BEIT, "img_size": 96, "depth": 1, "use_rel_pos_bias": True, "qkv_bias": False, **options}
    ),
    "BEiT, shared bias": lambda **options: Beit(
        **{**BEIT, "img_size": 96, "use_shared_rel_pos_bias": True, "qkv_bias": True, **options}
    ),
    "Swin, shifted windows": lambda **options: SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        drop_path_rate=0.0,
        num_heads=(2, 4),
        num_classes=5,
        **options,
    ),
}
RULES = {"BEiT": "blocks.*.attn", "Swin": "layers.*.blocks.*.attn"}


def build(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind](**options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def rules(kind: str) -> dict[str, object]:
    return {RULES[kind.partition(",")[0]]: biased_attention()}


def images(kind: str, dtype: torch.dtype = torch.float64, number: int = 3) -> Tensor:
    size = 96 if "long" in kind or "shared" in kind else 32
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_computes_the_same_with_the_same_parameters(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = build(kind).to(dtype)
    x, parameters, modules = images(kind, dtype), dict(model.named_parameters()), list(model.modules())
    state = [(name, tensor.shape) for name, tensor in model.state_dict().items()]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), list(parameters.values()))

    wanted, wanted_gradients = model(x), gradients()
    handle = apply(model, rules(kind))
    assert sum(isinstance(module, (BEiTAttention, SwinAttention)) for module in model.modules()) == len(handle.report)
    for mode in (True, False, False):  # the second time from what is remembered
        with torch.set_grad_enabled(mode):
            assert (model.train(mode)(x) - wanted).abs().max() <= tolerance * wanted.abs().max()
    largest = max(gradient.abs().max() for gradient in wanted_gradients)
    for got, expected in zip(gradients(), wanted_gradients, strict=True):
        assert (got - expected).abs().max() <= 10 * tolerance * largest
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert [(name, tensor.shape) for name, tensor in model.state_dict().items()] == state
    handle.revert()
    assert list(model.modules()) == modules
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
def test_computes_the_same_on_a_gpu(kind: str) -> None:
    model, x = build(kind).cuda(), images(kind).cuda()
    expected = model(x)
    with apply(model, rules(kind)):
        torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", MODELS)
def test_evaluation_sees_every_change(kind: str) -> None:
    model, other = build(kind).eval(), build(kind).eval()
    apply(model, rules(kind))
    with torch.no_grad():
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.add_(0.1)
        model(images(kind))
        for name, parameter in other.named_parameters():
            if "bias_table" in name:
                parameter.mul_(3)
                model.get_parameter(name).mul_(3)
        wanted = other(images(kind))
        torch.testing.assert_close(model(images(kind)), wanted, rtol=1e-10, atol=1e-11)
        # Another number of images, and another state, moved in.
        torch.testing.assert_close(model(images(kind)[:1]), wanted[:1], rtol=1e-10, atol=1e-11)
        stock = build(kind).eval()
        model.load_state_dict(stock.state_dict())
        torch.testing.assert_close(model(images(kind)), stock(images(kind)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["BEiT, long sequence", "Swin, shifted windows"])
def test_dropout_of_attention_weights_and_autocast(kind: str) -> None:
    model = build(kind, attn_drop_rate=0.5)
    stock = copy.deepcopy(model)
    apply(model, accelerate())
    assert not torch.equal(model(images(kind)), model(images(kind)))
    model, stock = model.eval().float(), stock.eval().float()
    torch.testing.assert_close(model(images(kind).float()), stock(images(kind).float()), rtol=1e-4, atol=1e-4)
    for mode in (torch.enable_grad, torch.no_grad):
        with torch.autocast("cpu", torch.bfloat16), mode():
            got, wanted = model(images(kind).float()), stock(images(kind).float())
        assert got.dtype == wanted.dtype
        assert (got - wanted).abs().max() <= 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["BEiT, long sequence", "Swin, shifted windows"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(kind: str, training: bool) -> None:
    model = build(kind).float().train(training)
    wanted = model(images(kind, torch.float32))
    apply(model, rules(kind))
    with torch.set_grad_enabled(training):
        got = torch.compile(model, fullgraph=True, backend="eager")(images(kind, torch.float32))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path", "shape"),
    [
        ("BEiT, long sequence", "blocks.0", (2, 145, 16)),
        ("Swin, shifted windows", "layers.0.blocks.1", (2, 16, 16, 16)),
    ],
)
def test_compiled_gradients(kind: str, path: str, shape: tuple[int, ...]) -> None:
    model = build(kind).float()
    attention = model.get_submodule(f"{path}.attn")
    block, parameters = model.get_submodule(path), list(attention.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(block(x).square().sum(), parameters)
    apply(model, rules(kind))
    got = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(x).square().sum(), parameters)
    largest = max(gradient.abs().max() for gradient in wanted)
    assert all((a - b).abs().max() <= 1e-3 * largest for a, b in zip(got, wanted, strict=True))


def test_attention_without_a_bias_is_refused_by_name() -> None:
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(M2MKDError, match=r"^blocks.0.attn: .*not a timm.layers.attention.Attention"):
        apply(model, {"blocks.*.attn": biased_attention()})
    with pytest.raises(M2MKDError, match="recognises nothing in this VisionTransformer"):
        apply(model, accelerate())
